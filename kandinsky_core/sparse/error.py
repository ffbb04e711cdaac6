"""How far block-sparse attention is from dense, layer by layer, measured along a dense run.

Shapes: B batch, A heads, N visual tokens, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .nabla import Attend, AttentionForward, Forward, Nabla
from .tiles import Tiles


@dataclass(slots=True)
class Measurement:
    """Takes NABLA's place in a run: attends densely, and beside it by every one of `runs`.

    `squares[i]` holds, by (step, visual block), the squared norms of the difference between `runs[i]` and dense
    attention and of dense attention itself, summed over passes.
    """

    runs: Sequence[Nabla]
    squares: list[dict[tuple[int, int], tuple[float, float]]] = field(default_factory=list)

    def begin(self, sigmas: Sequence[float]) -> None:
        """Start a run; what was measured before is dropped."""
        self.squares = [{} for _ in self.runs]
        for run in self.runs:
            run.begin(sigmas)

    def forward(
        self, token_thw: tuple[int, int, int], blocks: int, sigma: float, device: torch.device
    ) -> AttentionForward | None:
        """Prepare one evaluation; None when none of the runs is block-sparse there."""
        forwards = [run.forward(token_thw, blocks, sigma, device) for run in self.runs]
        if all(forward is None for forward in forwards):
            return None
        return _MeasuredForward(self, Tiles(token_thw, device), forwards)

    def errors(self, index: int) -> dict[tuple[int, int], float]:
        """Return the relative error of `runs[index]` by (step, visual block): norm of difference over norm."""
        return {place: (wrong / right) ** 0.5 for place, (wrong, right) in sorted(self.squares[index].items())}


@dataclass(frozen=True)
class _MeasuredForward:
    measurement: Measurement
    tiles: Tiles
    forwards: Sequence[Forward | None]

    def attend(
        self, q_BANE: Tensor, k_BANE: Tensor, v_BANE: Tensor, *, block: int, dense: Attend, is_ordered: bool = True
    ) -> Tensor:
        right_BANE = dense(q_BANE, k_BANE, v_BANE)
        for forward, squares in zip(self.forwards, self.measurement.squares, strict=True):
            if forward is None:
                continue
            out_BANE = forward.attend(q_BANE, k_BANE, v_BANE, block=block, dense=dense, is_ordered=is_ordered)
            wrong, right = squares.get((forward.step, block), (0.0, 0.0))
            squares[forward.step, block] = (
                wrong + float((out_BANE.float() - right_BANE.float()).square().sum()),
                right + float(right_BANE.float().square().sum()),
            )
        return right_BANE
