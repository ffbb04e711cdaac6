"""The token order of block-sparse attention: tiles of 8 x 8 tokens of one frame, each an attention block of 64.

Shapes: B batch, A heads, N visual tokens, E head width, K blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

SIDE = 8
BLOCK_TOK = SIDE * SIDE


@dataclass(frozen=True)
class Tiles:
    """A (frames, rows, columns) grid of visual tokens cut into tiles, and the index tensors that go with it.

    Blocks follow each other by frame, tile row, tile column; tokens inside a block in raster order. A grid whose rows
    or columns are no multiple of 8 has smaller tiles at that edge: tile order stays a permutation of the tokens, and
    only `pad` fills every block up to 64 slots, real tokens first.
    """

    token_thw: tuple[int, int, int]
    device: torch.device | str = "cpu"

    @property
    def blocks_thw(self) -> tuple[int, int, int]:
        """Return how many tiles the grid has along frames, rows, columns."""
        t, h, w = self.token_thw
        return t, -(-h // SIDE), -(-w // SIDE)

    @property
    def tokens(self) -> int:
        """Return the number of visual tokens N."""
        return prod(self.token_thw)

    @property
    def blocks(self) -> int:
        """Return the number of blocks K."""
        return prod(self.blocks_thw)

    @property
    def is_whole(self) -> bool:
        """Tell whether every tile has all its 64 tokens: rows and columns are multiples of 8."""
        return self.tokens == self.blocks * BLOCK_TOK

    @cached_property
    def order_N(self) -> Tensor:
        """Return the raster index (int64) of the token at each place of the tile order."""
        return torch.argsort(self._slots_by_raster)

    @cached_property
    def inverse_N(self) -> Tensor:
        """Return the place (int64) in the tile order of each token of the raster order."""
        return torch.argsort(self.order_N)

    @cached_property
    def lengths_K(self) -> Tensor:
        """Return the number of tokens (int64) of each block."""
        _, h, w = self.token_thw
        t, bh, bw = self.blocks_thw
        down, across = (
            (side - SIDE * torch.arange(count, device=self.device)).clamp(max=SIDE)
            for side, count in ((h, bh), (w, bw))
        )
        return torch.outer(down, across).flatten().repeat(t)

    @cached_property
    def slots_N(self) -> Tensor:
        """Return the slot (int64) in the padded order of each token of the tile order."""
        missing_K = BLOCK_TOK - self.lengths_K
        shift_K = missing_K.cumsum(0) - missing_K
        return torch.arange(self.tokens, device=self.device) + shift_K.repeat_interleave(self.lengths_K)

    def pad(self, x_BANE: Tensor) -> Tensor:
        """Return tile-ordered `x_BANE` with every block filled up with zeros to 64 slots, `[B,A,K*64,E]`."""
        if self.is_whole:
            return x_BANE
        batch, heads, _, width = x_BANE.shape
        padded = x_BANE.new_zeros(batch, heads, self.blocks * BLOCK_TOK, width)
        return padded.index_copy(2, self.slots_N, x_BANE)

    def unpad(self, x_BASE: Tensor) -> Tensor:
        """Return the tokens of a padded `[B,A,K*64,E]` in tile order."""
        return x_BASE if self.is_whole else x_BASE.index_select(2, self.slots_N)

    def mean(self, x_BANE: Tensor) -> Tensor:
        """Return the float32 mean `[B,A,K,E]` of the tokens of every block."""
        blocks_BAKSE = self.pad(x_BANE).unflatten(2, (-1, BLOCK_TOK))
        if self.is_whole:
            return blocks_BAKSE.mean(3, dtype=torch.float32)
        return blocks_BAKSE.sum(3, dtype=torch.float32) / self.lengths_K.unsqueeze(-1)

    @property
    def _slots_by_raster(self) -> Tensor:
        """Return for each token of the raster order its slot, were every tile whole."""
        t, h, w = self.token_thw
        _, bh, bw = self.blocks_thw
        frame, row, column = (torch.arange(side, device=self.device) for side in (t, h, w))
        block_THW = (frame[:, None, None] * bh + row[:, None] // SIDE) * bw + column // SIDE
        return (block_THW * BLOCK_TOK + (row[:, None] % SIDE) * SIDE + column % SIDE).flatten()
