"""The sliding-tile window that every query block sees besides what NABLA selects (arXiv 2502.04507)."""

from __future__ import annotations

import torch
from torch import Tensor

from .tiles import Tiles


def sliding_window(tiles: Tiles, window_thw: tuple[int, int, int]) -> Tensor:
    """Return a bool mask `[K,K]`: query block (row) and key block are at most half a window apart on every axis.

    `window_thw` counts latent frames, tile rows and tile columns; halves are rounded down, so 3 reaches one tile to
    either side and 0 or 1 is the block itself.
    """
    near_TKK = [
        ((at[:, None] - at).abs() <= size // 2)
        for at, size in zip(
            (torch.arange(count, device=tiles.device) for count in tiles.blocks_thw), window_thw, strict=True
        )
    ]
    time, rows, columns = near_TKK
    near = time[:, None, None, :, None, None] & rows[:, None, None, :, None] & columns[:, None, None, :]
    return near.reshape(tiles.blocks, tiles.blocks)
