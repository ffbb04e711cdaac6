"""The selection without sorts against the published one."""

from __future__ import annotations

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.sparse import selection
from comfyui_kandinsky5.kandinsky_core.sparse.layout import column_dtype
from comfyui_kandinsky5.kandinsky_core.sparse.selection import published, select, threshold
from comfyui_kandinsky5.kandinsky_core.sparse.tiles import Tiles
from comfyui_kandinsky5.kandinsky_core.sparse.window import sliding_window
from hypothesis import given, settings
from hypothesis import strategies as st

GRIDS = st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 40))
# Rows are summed in float32: where less is to be dropped than those sums are exact to, rounding decides, not the law.
MASSES = st.floats(0.01, 1 - 1e-4) | st.just(1.0)


def smooth(tiles: Tiles, batch: int, heads: int, sharpness: float, seed: int) -> list[torch.Tensor]:
    """Return random q and k, waves over the clip plus noise."""
    generator = torch.Generator().manual_seed(seed)
    t, h, w = tiles.token_thw
    places = torch.cartesian_prod(torch.arange(t) / 5, torch.arange(h) / 16, torch.arange(w) / 16)
    waves = torch.cos(places @ (6 * torch.randn(heads, 3, 16, generator=generator)))[:, tiles.order_N] * sharpness
    return [waves + torch.randn(batch, *waves.shape, generator=generator) for _ in range(2)]


@settings(deadline=None, max_examples=40)
@given(GRIDS, st.integers(1, 2), st.integers(1, 3), MASSES, st.floats(0.5, 4), st.integers(0, 99))
def test_follows_the_published_selection(grid, batch, heads, mass, sharpness, seed):
    tiles = Tiles(grid)
    window = sliding_window(tiles, (3, 3, 1))
    q, k = smooth(tiles, batch, heads, sharpness, seed)
    layout = select(q, k, tiles, mass, window)
    live, right = layout.live(), select(q, k, tiles, mass, window, exact=True).live()
    # The search may stop a little early, and then keeps more: it never drops what the published selection keeps.
    weight = torch.softmax(tiles.mean(q) @ tiles.mean(k).mT / q.shape[-1] ** 0.5, -1)
    assert (weight * (right & ~live)).sum(-1).max() <= 1e-6
    assert (weight * ~live).sum(-1).max() <= 1 - mass + 1e-6
    assert (live & ~right).sum() <= 4 + 0.01 * live.numel()
    assert (layout.counts_R >= 1).all() and (live | ~window).all()
    assert layout.columns_M.dtype == column_dtype(tiles.blocks)


@pytest.mark.parametrize("mass", [0.7, 0.8, 0.9])
@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_nearly_every_block_of_a_large_map(mass, sharpness):
    tiles = Tiles((20, 32, 48))
    window = sliding_window(tiles, (11, 3, 3))
    q, k = smooth(tiles, 1, 2, sharpness, 0)
    live = select(q, k, tiles, mass, window).live()
    assert (live != select(q, k, tiles, mass, window, exact=True).live()).float().mean() <= 1e-4


def test_more_mass_keeps_more():
    tiles = Tiles((4, 32, 32))
    q, k = smooth(tiles, 1, 2, 3.0, 0)
    window = sliding_window(tiles, (1, 1, 1))
    kept = [select(q, k, tiles, mass, window).kept for mass in (0.0, 0.3, 0.6, 0.9, 0.99, 1.0)]
    assert kept == sorted(kept) and kept[0] < 0.1 and kept[-1] == 1.0


@pytest.mark.parametrize("chunk", [1, 1 << 12, 1 << 30])
def test_chunks_change_nothing(monkeypatch, chunk):
    tiles = Tiles((4, 24, 32))
    q, k = smooth(tiles, 2, 3, 2.0, 1)
    window = sliding_window(tiles, (3, 3, 3))
    whole = select(q, k, tiles, 0.8, window)
    monkeypatch.setattr(selection, "CHUNK_BYTES", chunk)
    parts = select(q, k, tiles, 0.8, window)
    assert torch.equal(whole.starts_R1, parts.starts_R1) and torch.equal(whole.columns_M, parts.columns_M)


@pytest.mark.parametrize("dropped", [0.05, 0.3, 0.7])
@pytest.mark.parametrize("kind", ["flat", "one", "steps", "powers"])
def test_threshold_of_hard_rows(kind, dropped):
    """Rows with equal entries, one entry, or magnitudes far apart."""
    row = {
        "flat": torch.ones(64),
        "one": torch.cat((torch.ones(1), torch.full((63,), 1e-30))),
        "steps": torch.arange(1, 65).div(8, rounding_mode="floor") + 1.0,
        "powers": 2.0 ** -torch.arange(64),
    }[kind]
    weight = (row / row.sum()).view(1, 1, -1)
    kept = weight > threshold(weight, dropped)
    assert kept.any()
    assert weight[~kept].sum() < dropped
    # Nothing more could be dropped but for entries of the same size.
    least = weight[kept].min()
    assert weight[~kept].sum() + weight[kept & (weight <= least * 1.001)].sum() >= dropped - 1e-6


def test_exact_keeps_the_published_order_of_equal_weights():
    """A flat map has no smallest entries; the published recipe drops the ones its sort puts first."""
    tiles = Tiles((1, 32, 32))
    q = torch.zeros(1, 1, tiles.tokens, 16)
    keep = published(q, q, tiles, 0.5)
    assert keep.sum(-1).unique().tolist() in ([8], [9])
