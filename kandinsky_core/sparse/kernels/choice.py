"""One function over all kernels: the first that works here, and the next one when it fails.

Shapes: B batch, A heads, N visual tokens, E head width.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec

from torch import Tensor

from ...errors import BackendUnavailable
from .. import selection
from ..layout import BlockLayout
from . import blockwise, flex, fused, sparge, trial
from .gradient import Kernel, with_gradient

logger = logging.getLogger("kandinsky5")

AUTO, TRITON, FLEX, TORCH, SPARGE, DENSE = "auto", "triton", "flex", "torch", "spargeattn", "dense"
THRESHOLD = "triton selection"  # in the list of what was left
NAMES = (AUTO, TRITON, FLEX, TORCH, SPARGE, DENSE)
# On a CPU a compilation (half a minute and more) pays from about here, and only where it multiplies 16-bit numbers.
COMPILE_TOK = 16_384
# What compilers, allocators and other packages' argument checks raise. A kernel's failure must not end a run.
FAILURES = (RuntimeError, ImportError, AttributeError, TypeError, ValueError, AssertionError, OSError)


@dataclass(slots=True)
class Kernels:
    """Block-sparse attention for one run. A kernel that fails once is not tried again; each failure is logged once."""

    wanted: str = AUTO
    left: dict[str, str] = field(default_factory=dict)  # kernels given up, and why
    used: Counter[str] = field(default_factory=Counter)  # calls by kernel

    def __post_init__(self) -> None:
        if self.wanted not in NAMES:
            raise BackendUnavailable(f"Unknown kernel '{self.wanted}'. Possible: {', '.join(NAMES)}.")

    def attend(self, q_BANE: Tensor, k_BANE: Tensor, v_BANE: Tensor, layout: BlockLayout) -> Tensor | None:
        """Return attention of tile-ordered `q_BANE`, `k_BANE`, `v_BANE` over the kept blocks only.

        None when every kernel has failed, or "dense" is wanted: then attention is to be full.
        """
        for name in self.candidates(q_BANE):
            kernel = _KERNELS[name]
            limit = trial.ROUNDED_LIMIT if name == SPARGE else None
            try:
                trial.check(kernel, q_BANE, layout.tiles.is_whole, limit)
                out_BANE = with_gradient(kernel, q_BANE, k_BANE, v_BANE, layout)
            except FAILURES as error:
                self._leave(name, error, q_BANE)
                continue
            self.used[name] += 1
            return out_BANE
        return None

    def threshold(self, weight_RCK: Tensor, dropped: float) -> Tensor:
        """Do what `selection.threshold` does, on a GPU in one pass over the weights where Triton works."""
        wants = self.wanted in (AUTO, TRITON) and not weight_RCK.is_cpu
        if wants and _has_triton() and THRESHOLD not in self.left:
            try:
                trial.check_threshold(fused.threshold, weight_RCK.device)
                return fused.threshold(weight_RCK, dropped)
            except FAILURES as error:
                self.left[THRESHOLD] = _reason(error)
                logger.warning(
                    "NABLA: plain torch operations select blocks for the rest of this run, which is slower (%s)",
                    self.left[THRESHOLD],
                )
        return selection.threshold(weight_RCK, dropped)

    def candidates(self, q_BANE: Tensor) -> list[str]:
        """Return the kernels to try for such a tensor, best first."""
        if self.wanted == DENSE:
            return []
        if not q_BANE.is_cpu:
            found = [TRITON, FLEX, TORCH] if _has_triton() else [TORCH]  # compiling for a GPU goes through Triton, too
        elif q_BANE.dtype.itemsize == 2 and q_BANE.shape[2] >= COMPILE_TOK and flex.multiplies_16_bit():
            found = [FLEX, TORCH]
        else:
            found = [TORCH]  # in float32, and where 16 bits are computed in it, the fastest anyway
        named = [] if self.wanted == AUTO else [self.wanted]
        return [name for name in dict.fromkeys((*named, *found)) if name not in self.left]

    def _leave(self, name: str, error: Exception, q_BANE: Tensor) -> None:
        self.left[name] = reason = _reason(error)
        rest = self.candidates(q_BANE)
        logger.warning(
            "NABLA: the %s kernel is left for the rest of this run (%s). %s",
            name,
            reason,
            f"The {rest[0]} kernel takes over: same result, other speed."
            if rest
            else "No block-sparse kernel is left: attention is computed in full, which is slower and skips nothing.",
        )


@cache
def _has_triton() -> bool:
    """Tell whether Triton is installed; said once a process, not once a run."""
    if find_spec("triton") is not None:
        return True
    logger.info("NABLA: Triton is not installed (on Windows: triton-windows); a slower kernel of plain torch is used.")
    return False


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0] or 'no message'}"


_KERNELS: dict[str, Kernel] = {
    TRITON: fused.attend,
    FLEX: flex.attend,
    TORCH: blockwise.attend,
    SPARGE: sparge.attend,
}
