"""NABLA's order and mask against diffusers', on random input."""

from __future__ import annotations

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.sparse.kernels.trial import masked, relative_error
from comfyui_kandinsky5.kandinsky_core.sparse.layout import from_live
from comfyui_kandinsky5.kandinsky_core.sparse.selection import select
from comfyui_kandinsky5.kandinsky_core.sparse.tiles import Tiles
from comfyui_kandinsky5.kandinsky_core.sparse.window import sliding_window
from diffusers.models.transformers import transformer_kandinsky as peer

GRIDS = ((1, 16, 24), (2, 16, 24), (3, 24, 16), (2, 40, 16), (5, 16, 32), (4, 32, 24), (7, 24, 40))
CASES = list(zip(GRIDS, (0.9, 0.8, 0.7, 0.5, 0.9, 0.3, 0.8), (1, 2, 3, 2, 1, 2, 1), strict=True))


def queries(tiles: Tiles, heads: int, width: int = 16) -> tuple[torch.Tensor, ...]:
    """Return random q and k, similar within a block so that the map between blocks is not flat."""
    generator = torch.Generator().manual_seed(tiles.tokens)
    blocks = torch.randn(2, 1, heads, tiles.blocks, width, generator=generator).repeat_interleave(64, dim=3)
    return (blocks + torch.randn(blocks.shape, generator=generator)).unbind()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_token_order(grid):
    raster = torch.arange(torch.Size(grid).numel()).view(1, *grid, 1)
    flat, _ = peer.fractal_flatten(raster, raster, (1, *grid), block_mask=True)
    assert torch.equal(Tiles(grid).order_N, flat.flatten())


@pytest.mark.parametrize(("grid", "mass", "heads"), CASES, ids=str)
def test_mask(grid, mass, heads):
    tiles = Tiles(grid)
    window = sliding_window(tiles, (3, 3, 3))
    q, k = queries(tiles, heads)
    theirs = peer.nablaT_v2(q.transpose(1, 2), k.transpose(1, 2), window, mass).to_dense().bool()
    assert 0.05 < theirs.float().mean() < 0.98
    assert torch.equal(select(q, k, tiles, mass, window, exact=True).live(), theirs)
    assert (select(q, k, tiles, mass, window).live() != theirs).float().mean() <= 5e-4


def test_their_mask_is_the_one_our_kernels_are_held_to():
    """Dense attention under diffusers' mask and under the layout made of it are the same."""
    tiles = Tiles((2, 16, 24))
    q, k = queries(tiles, 2)
    mask = peer.nablaT_v2(q.transpose(1, 2), k.transpose(1, 2), sliding_window(tiles, (1, 1, 1)), 0.5).to_dense().bool()
    tokens = mask.repeat_interleave(64, 2).repeat_interleave(64, 3)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=tokens)
    assert relative_error(masked(q, k, k, from_live(tiles, mask)), expected) <= 1e-6
