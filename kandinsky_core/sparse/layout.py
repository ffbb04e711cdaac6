"""Which key blocks every query block attends to, as lists.

Shapes: B batch, A heads, K blocks, R = B*A*K query blocks, M kept pairs of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .tiles import Tiles


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Compressed sparse rows: query block r attends to key blocks `columns_M[starts_R1[r]:starts_R1[r + 1]]`.

    Rows run over batch, head, query block; `starts_R1` is int64, `columns_M` the smallest integer type that holds K,
    ascending within a row. Rows are never empty.
    """

    tiles: Tiles
    batch: int
    heads: int
    starts_R1: Tensor
    columns_M: Tensor

    @property
    def counts_R(self) -> Tensor:
        """Return the number of key blocks of every query block, int64."""
        return self.starts_R1.diff()

    @property
    def kept(self) -> float:
        """Return the share of block pairs that is attended to, 0…1."""
        return self.columns_M.numel() / (self.batch * self.heads * self.tiles.blocks**2)

    def live(self) -> Tensor:
        """Return the same as a bool mask `[B,A,K,K]`; for small sizes and pictures."""
        rows, blocks = self.starts_R1.numel() - 1, self.tiles.blocks
        live_RK = torch.zeros(rows, blocks, dtype=torch.bool, device=self.columns_M.device)
        row_M = torch.arange(rows, device=live_RK.device).repeat_interleave(self.counts_R)
        live_RK[row_M, self.columns_M.long()] = True
        return live_RK.view(self.batch, self.heads, blocks, blocks)

    def live_tokens(self) -> Tensor:
        """Return the mask between tokens in tile order, bool `[B,A,N,N]`; N² bytes a head, for checks."""
        lengths_K = self.tiles.lengths_K
        return self.live().repeat_interleave(lengths_K, 2).repeat_interleave(lengths_K, 3)


def from_live(tiles: Tiles, live_BAKK: Tensor) -> BlockLayout:
    """Return the layout of a bool mask `[B,A,K,K]`."""
    batch, heads, blocks, _ = live_BAKK.shape
    starts_R1 = starts(live_BAKK.sum(-1).flatten())
    columns = live_BAKK.reshape(-1, blocks).nonzero()[:, 1]
    return BlockLayout(tiles, batch, heads, starts_R1, columns.to(column_dtype(blocks)))


def starts(counts_R: Tensor) -> Tensor:
    """Return where each row starts, and the end of the last: `[R+1]`."""
    return torch.cat((counts_R.new_zeros(1), counts_R.cumsum(0)))


def column_dtype(blocks: int) -> torch.dtype:
    """Return the type of block indices: 16 bits reach over two million tokens."""
    return torch.int16 if blocks <= torch.iinfo(torch.int16).max else torch.int32
