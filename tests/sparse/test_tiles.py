"""Token order, padding, block means and windows on any grid."""

from __future__ import annotations

from itertools import product

import torch
from comfyui_kandinsky5.kandinsky_core.sparse.tiles import BLOCK_TOK, SIDE, Tiles
from comfyui_kandinsky5.kandinsky_core.sparse.window import sliding_window
from hypothesis import given, settings
from hypothesis import strategies as st

GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 27), st.integers(1, 27))


def block_of(tiles: Tiles) -> torch.Tensor:
    """Return the block of every token of the raster order, by plain arithmetic."""
    t, h, w = tiles.token_thw
    _, bh, bw = tiles.blocks_thw
    return torch.tensor(
        [(f * bh + i // SIDE) * bw + j // SIDE for f in range(t) for i in range(h) for j in range(w)]
    )


@settings(deadline=None, max_examples=50)
@given(GRIDS)
def test_order_is_a_permutation_that_groups_blocks(grid):
    tiles = Tiles(grid)
    raster = torch.arange(tiles.tokens)
    assert torch.equal(tiles.order_N.sort().values, raster)
    assert torch.equal(tiles.order_N[tiles.inverse_N], raster)
    block_N = block_of(tiles)[tiles.order_N]
    assert torch.equal(block_N, block_N.sort().values)
    assert torch.equal(tiles.lengths_K, torch.bincount(block_N))
    assert tiles.blocks == len(tiles.lengths_K) and tiles.is_whole == bool((tiles.lengths_K == BLOCK_TOK).all())
    for block in range(tiles.blocks):  # raster order inside
        inside = tiles.order_N[block_N == block]
        assert torch.equal(inside, inside.sort().values)


@settings(deadline=None, max_examples=50)
@given(GRIDS)
def test_padding_comes_off_again_and_means_ignore_it(grid):
    tiles = Tiles(grid)
    x = torch.randn(2, 3, tiles.tokens, 4, generator=torch.Generator().manual_seed(0))
    padded = tiles.pad(x)
    assert padded.shape == (2, 3, tiles.blocks * BLOCK_TOK, 4)
    assert torch.equal(tiles.unpad(padded), x)
    means = torch.stack([part.mean(2) for part in x.split(tiles.lengths_K.tolist(), dim=2)], dim=2)
    assert torch.allclose(tiles.mean(x), means, atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(GRIDS, st.tuples(*[st.integers(0, 6)] * 3))
def test_window(grid, window):
    tiles = Tiles(grid)
    places = list(product(*map(range, tiles.blocks_thw)))
    mask = sliding_window(tiles, window)
    assert mask.shape == (tiles.blocks, tiles.blocks)
    for query, key in ((0, tiles.blocks - 1), (tiles.blocks // 2, 0), (tiles.blocks // 3, tiles.blocks // 2)):
        near = all(abs(x - y) <= size // 2 for x, y, size in zip(places[query], places[key], window, strict=True))
        assert mask[query, key] == near
    assert mask.diagonal().all()
