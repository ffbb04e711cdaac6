"""What block-sparse attention did during a run: kept shares by step and layer, and one head's blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..variants import FULL, Attention
from .layout import BlockLayout
from .tiles import Tiles


@dataclass(slots=True)
class Record:
    """Kept shares of block pairs by (step, visual block), averaged over heads, batch and passes."""

    steps: int = 0
    blocks: int = 0  # visual blocks of the network
    token_thw: tuple[int, int, int] | None = None
    attention: Attention = FULL
    example: Example | None = None
    _sums: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)  # kept pairs, all pairs

    def see(self, token_thw: tuple[int, int, int], blocks: int, attention: Attention) -> None:
        """Note the size and the policy of a network evaluation."""
        self.token_thw, self.blocks, self.attention = token_thw, blocks, attention

    def add(self, step: int, block: int, layout: BlockLayout) -> None:
        """Count a layout in; the middle block's first head is kept as an example."""
        kept, pairs = self._sums.get((step, block), (0, 0))
        new = len(layout.counts_R) * layout.tiles.blocks
        self._sums[step, block] = (kept + len(layout.columns_M), pairs + new)
        if block == self.blocks // 2:
            self.example = Example.of(step, block, layout)

    @property
    def kept(self) -> dict[tuple[int, int], float]:
        """Return the kept share by (step, visual block); what is missing ran dense."""
        return {place: kept / pairs for place, (kept, pairs) in sorted(self._sums.items())}

    @property
    def tiles(self) -> Tiles | None:
        """Return the grid of the last evaluation."""
        return None if self.token_thw is None else Tiles(self.token_thw)


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
