"""Random attention problems."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from comfyui_kandinsky5.kandinsky_core.sparse.layout import BlockLayout, from_live
from comfyui_kandinsky5.kandinsky_core.sparse.tiles import Tiles
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """q, k, v in tile order and the blocks they may see."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: BlockLayout

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v


def problem(
    grid: tuple[int, int, int], *, batch: int = 1, heads: int = 2, width: int = 16, kept: float = 0.3, seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Problem:  # fmt: skip
    """Return a random problem whose tensors are strided as the model's projections leave them."""
    tiles = Tiles(grid)
    generator = torch.Generator().manual_seed(seed)
    shape = (3, batch, tiles.tokens, heads, width)
    q, k, v = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).transpose(2, 3)
    live = torch.rand(batch, heads, tiles.blocks, tiles.blocks, generator=generator) < kept
    live[..., torch.arange(tiles.blocks), torch.randint(tiles.blocks, (tiles.blocks,), generator=generator)] = True
    return Problem(q, k, v, from_live(tiles, live))
