"""What block-sparse attention did during a run: kept shares by step and layer, and one head's blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..variants import FULL, Attention
from .layout import BlockLayout
from .tiles import BLOCK_TOK, Tiles

FLOPS_PER_PAIR = 4 * BLOCK_TOK**2  # of a pair of blocks, per channel of a head: two products, multiply and add


@dataclass(slots=True)
class Record:
    """Kept shares of block pairs by (step, visual block), averaged over heads, batch and passes."""

    steps: int = 0
    blocks: int = 0  # visual blocks of the network
    token_thw: tuple[int, int, int] | None = None
    attention: Attention = FULL
    head_dim: int = 0
    example: Example | None = None
    dense: set[tuple[int, int]] = field(default_factory=set)  # (step, visual block) that were set to be dense
    _sums: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)  # kept pairs, all pairs

    def see(self, token_thw: tuple[int, int, int], blocks: int, attention: Attention) -> None:
        """Note the size and the policy of a network evaluation."""
        self.token_thw, self.blocks, self.attention = token_thw, blocks, attention

    def add(self, step: int, block: int, layout: BlockLayout, head_dim: int, has_head_0: bool = True) -> None:
        """Count the layout of some heads in; head 0 of the block nearest the middle is kept as an example."""
        kept, pairs = self._sums.get((step, block), (0, 0))
        new = len(layout.counts_R) * layout.tiles.blocks
        self._sums[step, block] = (kept + len(layout.columns_M), pairs + new)
        self.head_dim = head_dim
        if has_head_0 and (self.example is None or self._off_middle(block) <= self._off_middle(self.example.block)):
            self.example = Example.of(step, block, layout)

    def _off_middle(self, block: int) -> int:
        return abs(block - self.blocks // 2)

    @property
    def grid(self) -> list[list[float | None]]:
        """Return the kept share by step, then layer; None where attention was dense."""
        kept = self.kept
        steps = max(self.steps, 1 + max((step for step, _ in kept), default=-1))
        return [[kept.get((step, block)) for block in range(self.blocks)] for step in range(steps)]

    @property
    def flops_saved(self) -> int:
        """Return the floating-point operations of the attention that was skipped (its two matrix products)."""
        return FLOPS_PER_PAIR * self.head_dim * sum(pairs - kept for kept, pairs in self._sums.values())

    @property
    def kept(self) -> dict[tuple[int, int], float]:
        """Return the kept share by (step, visual block); what is missing ran dense."""
        return {place: kept / pairs for place, (kept, pairs) in sorted(self._sums.items())}

    @property
    def mean_kept(self) -> float:
        """Return the kept share of all block pairs in steps and layers that were not dense."""
        sums = self._sums.values()
        return sum(kept for kept, _ in sums) / sum(pairs for _, pairs in sums)


@dataclass(frozen=True, slots=True)
class Example:
    """The blocks that one head kept."""

    step: int
    block: int
    tiles: Tiles
    starts_K1: Tensor
    columns_M: Tensor

    @classmethod
    def of(cls, step: int, block: int, layout: BlockLayout) -> Example:
        """Copy the first head of a layout into main memory."""
        starts_K1 = layout.starts_R1[: layout.tiles.blocks + 1].cpu()
        # A copy: a slice would keep every head's list alive.
        columns_M = layout.columns_M[: int(starts_K1[-1])].cpu().clone()
        return cls(step, block, Tiles(layout.tiles.token_thw), starts_K1, columns_M)

    def live(self) -> Tensor:
        """Return the bool mask `[K,K]`."""
        return BlockLayout(self.tiles, 1, 1, self.starts_K1, self.columns_M).live()[0, 0]
