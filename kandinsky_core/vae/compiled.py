"""A decode's norms by one compiled kernel each: affine map, SiLU and the write into the padded tensor in one pass.

Between the convolutions and the attention, which compiling does not speed up, this is what there is to fuse. Positions,
caches and plans stay outside: what is compiled sees one frame, whatever its size, so after the trial at first use
nothing is compiled again. On a processor the kernel needs no temporaries; on a GPU a frame that does not lie on a
multiple of 16 bytes may be copied first.

Shape legend: B batch, C channels, T/H/W frames, rows, columns.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BackendUnavailable
from .statistics import Affine, in_slices

logger = logging.getLogger("kandinsky5")

# What compilers and their packages raise; what is no subclass of these, torch itself wraps into a RuntimeError.
FAILURES = (
    RuntimeError, ImportError, AttributeError, TypeError, ValueError, LookupError, AssertionError, OSError,
)  # fmt: skip
ROUNDINGS = 32  # that a compiled norm may be off before its result is rounded, relative to the largest value

Kernel = Callable[[Tensor, Tensor, Tensor], None]


class Compiled:
    """Computes norms with SiLU by a compiled kernel, until that fails: then `announce` gets one line, once.

    A norm whose kernel fails is computed as if nothing had been compiled. Running out of memory is not the compiler's
    failure and passes through; only where it happens twice running, with no norm computed in between, it counts as one.
    """

    def __init__(
        self,
        is_out_of_memory: Callable[[BaseException], bool],
        announce: Callable[[str], None] = logger.warning,
    ) -> None:
        self.left: str | None = None  # why compiling was given up
        self._is_out_of_memory = is_out_of_memory
        self._announce = announce
        self._ran_out = False

    def __call__(self, x_BCTHW: Tensor, affine: Affine, out_BCTHW: Tensor, *, silu: bool) -> None:
        """Write the norm of `x` to `out`."""
        if not silu or self.left is not None or not self._fused(x_BCTHW, affine, out_BCTHW):
            in_slices(x_BCTHW, affine, out_BCTHW, silu=silu)

    def _fused(self, x_BCTHW: Tensor, affine: Affine, out_BCTHW: Tensor) -> bool:
        try:
            check(x_BCTHW.device, x_BCTHW.dtype)
            in_frames(_kernel(), x_BCTHW, affine, out_BCTHW)
        except FAILURES as error:
            if self._is_out_of_memory(error) and not self._ran_out:
                self._ran_out = True
                raise
            self.left = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0] or 'no message'}"
            self._announce(
                f"torch.compile is left for the rest of this decode ({self.left}): torch's own kernels take over, with "
                "the same picture."
            )
            return False
        self._ran_out = False
        return True


def in_frames(kernel: Kernel, x_BCTHW: Tensor, affine: Affine, out_BCTHW: Tensor) -> None:
    """Compute a norm with SiLU frame by frame: a single frame is no special case, as a time of one would be."""
    for sample in range(x_BCTHW.shape[0]):
        scale_C = affine.weight_C * torch.rsqrt(affine.variance_BC[sample] + affine.eps)
        parameters_3C = torch.stack([affine.mean_BC[sample], scale_C, affine.bias_C])
        for frame in range(x_BCTHW.shape[2]):
            kernel(_bare(x_BCTHW[sample, :, frame]), parameters_3C, _bare(out_BCTHW[sample, :, frame]))


def _bare(x_CHW: Tensor) -> Tensor:
    """Show the compiler no more than it need know, for what it is shown it compiles for.

    `.data` is no view of a larger tensor; in the order `[C,W,H]` it does not ask whether rows lie close together, and
    then merge them.
    """
    return x_CHW.mT.data


@cache  # of successes only: an error is raised again at the next try
@torch.no_grad()
def check(device: torch.device, dtype: torch.dtype) -> None:
    """Raise `BackendUnavailable` if the kernel's numbers are wrong on a device, beside what the compiler raises."""
    wide = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=wide).add_(0.5).to(device)

    affine = Affine(drawn(2, 12), drawn(2, 12), drawn(12), drawn(12), 1e-6)
    # A piece of a larger tensor, whole frames and a single one: for 16-bit types the compiler tells these apart, so all
    # that is to be compiled is compiled here. No two sides are alike.
    for frames, height, width in ((3, 8, 11), (2, 5, 7), (1, 5, 7)):
        x_BCTHW = (drawn(2, 12, frames, height, width) * 4 - 4).to(dtype)[..., :5, :7]
        out_BCTHW, wanted_BCTHW = (
            torch.zeros(2, 12, 2 + frames, 7, 9, device=device, dtype=kind)[:, :, 2:, 1:-1, 1:-1]
            for kind in (dtype, wide)
        )
        in_frames(_kernel(), x_BCTHW, affine, out_BCTHW)
        in_slices(x_BCTHW.to(wide), affine, wanted_BCTHW, silu=True)
        error = float((out_BCTHW.to(wide) - wanted_BCTHW).abs().max() / wanted_BCTHW.abs().max())
        limit = torch.finfo(dtype).eps + ROUNDINGS * torch.finfo(wide).eps
        if not error <= limit:  # NaN is an error, too
            raise BackendUnavailable(f"wrong results: off by {error:.2g} of the largest; {limit:.2g} is the limit")


@cache
def _kernel() -> Kernel:
    return torch.compile(_normalised, dynamic=True)


def _normalised(x_CWH: Tensor, parameters_3C: Tensor, out_CWH: Tensor) -> None:
    if not torch.compiler.is_compiling():  # switched off, or compiled for too many kinds of tensors: run as it stands
        raise BackendUnavailable("torch runs the kernel without compiling it")
    mean, scale, bias = parameters_3C[..., None, None]
    out_CWH.copy_(F.silu((x_CWH.to(mean.dtype) - mean) * scale + bias))
