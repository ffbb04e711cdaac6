"""How a 3-D convolution is computed: torch's own, or as 2-D convolutions where torch's own is broken on a device.

Some torch and cuDNN releases run 16-bit `conv3d` through a matrix of all taps (27 times the input) or return wrong
numbers. Which do is found by trying: lists of versions age, and other back-ends have troubles of their own.
Shape legend: B batch, C/O channels in and out, T/H/W frames, rows, columns; weights are `[O,C,t,h,w]`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import BackendUnavailable

log = logging.getLogger("kandinsky5")

Triple = tuple[int, int, int]
Convolve = Callable[[Tensor, Tensor, Tensor | None, Triple], Tensor]  # without padding

# The trial: a layer of the published decoder's last level on a piece that is done in a moment.
TRIAL_CHANNELS, TRIAL_THW = 128, (6, 66, 66)
TOLERANCE = 0.03  # of the largest value; rounding to bfloat16 gives 0.004
TAPS = 27


def framewise(x_BCTHW: Tensor, weight: Tensor, bias: Tensor | None, stride: Triple = (1, 1, 1)) -> Tensor:
    """Convolve as the sum over temporal taps of 2-D convolutions of the shifted frames.

    The same up to the order of summation, for one more output of memory.
    """
    batch, _, frames = x_BCTHW.shape[:3]
    frames_out = (frames - weight.shape[2]) // stride[0] + 1
    x_BTCHW = x_BCTHW.transpose(1, 2)

    def seen_by(tap: int) -> Tensor:
        return x_BTCHW[:, tap : tap + stride[0] * (frames_out - 1) + 1 : stride[0]].flatten(0, 1)

    out = F.conv2d(seen_by(0), weight[:, :, 0], bias, stride[1:])
    for tap in range(1, weight.shape[2]):
        out += F.conv2d(seen_by(tap), weight[:, :, tap], None, stride[1:])
    return out.unflatten(0, (batch, frames_out)).transpose(1, 2)


FORMS: Mapping[str, Convolve] = {"conv3d": F.conv3d, "three conv2d": framewise}


class Framewise(TorchFunctionMode):
    """Within it every `conv3d` without padding is computed frame by frame, whoever calls it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        return _framewise(*args, **given) if func is torch.conv3d else func(*args, **given)


def _framewise(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int | Triple = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    if (padding, dilation, groups) not in ((0, 1, 1), ((0, 0, 0), (1, 1, 1), 1)):
        return torch.conv3d(input, weight, bias, stride, padding, dilation, groups)
    return framewise(input, weight, bias, (stride,) * 3 if isinstance(stride, int) else tuple(stride))


def sound_convolutions(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Return the context in which 3-D convolutions are right and lean on a device."""
    return Framewise() if convolution_for(device, dtype) is framewise else nullcontext()


@dataclass(frozen=True, slots=True)
class Trial:
    """What one form did with the trial piece."""

    error: float  # largest difference to float32 over the largest value
    extra_bytes: int  # beyond the input and output

    @property
    def is_right(self) -> bool:
        """Whether the error is no more than rounding; nan is not."""
        return self.error <= TOLERANCE

    def fault(self, allowed_bytes: int) -> str | None:
        """Say what is wrong with it, or None."""
        if not self.is_right:
            return f"differs from float32 by {self.error:.1%}"
        if self.extra_bytes > allowed_bytes:
            return f"takes {self.extra_bytes >> 20} MiB beside its output, where {allowed_bytes >> 20} are the limit"
        return None


@cache
def convolution_for(device: torch.device, dtype: torch.dtype) -> Convolve:
    """Return the form to use on a device, tried once and said in one log line.

    Processors and float32 take torch's own without a trial: the faults are those of 16-bit kernels of accelerators.
    """
    if device.type in ("cpu", "meta") or dtype.itemsize > 2:
        return F.conv3d
    x, weight, bias = _trial_piece(device, dtype)
    # Half of the matrix of all taps, which is what the regression builds; workspaces that are normal are far smaller.
    allowed_bytes = TAPS * x.numel() * dtype.itemsize // 2
    return choose(
        ((name, _try(form, x, weight, bias)) for name, form in FORMS.items()),
        allowed_bytes,
        f"{dtype} on {device}",
    )


def choose(trials: Iterable[tuple[str, Trial]], allowed_bytes: int, where: str) -> Convolve:
    """Take the first form without a fault, and say so; trials after it are not asked for.

    If all have one, take the first that is right for all its memory; raise `BackendUnavailable` if none is.
    """
    faults: list[str] = []
    right: list[str] = []
    for name, trial in trials:
        if (fault := trial.fault(allowed_bytes)) is None:
            because = f" because {'; '.join(faults)}" if faults else ""
            log.info("VAE convolutions (%s): %s%s.", where, name, because)
            return FORMS[name]
        faults.append(f"{name} {fault}")
        if trial.is_right:
            right.append(name)
    if right:
        log.warning("VAE convolutions (%s): %s, though %s.", where, right[0], "; ".join(faults))
        return FORMS[right[0]]
    raise BackendUnavailable(
        f"3-D convolutions in {where} do not work here: {'; '.join(faults)}. Load the VAE in float32, or use another "
        "torch version."
    )


def _trial_piece(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (1, TRIAL_CHANNELS, *TRIAL_THW), (TRIAL_CHANNELS, TRIAL_CHANNELS, 3, 3, 3), (TRIAL_CHANNELS,),
    )  # fmt: skip
    x, weight, bias = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return x, weight / math.sqrt(TAPS * TRIAL_CHANNELS), bias


@torch.no_grad()
def _try(form: Convolve, x: Tensor, weight: Tensor, bias: Tensor) -> Trial:
    memory = getattr(torch, x.device.type, None)
    counts = hasattr(memory, "max_memory_allocated")  # not every back-end tells its peak
    form(x, weight, bias, (1, 1, 1))  # libraries load and search for a kernel the first time
    before = 0
    if counts:
        memory.synchronize(x.device)
        memory.reset_peak_memory_stats(x.device)
        before = memory.memory_allocated(x.device)
    out = form(x, weight, bias, (1, 1, 1))
    peak = memory.max_memory_allocated(x.device) - before if counts else 0
    # The reference in float32 on the processor: the device's own conv3d is what is in doubt.
    wanted = F.conv3d(x.cpu().float(), weight.cpu().float(), bias.cpu().float())
    error = (out.cpu().float() - wanted).abs().max() / wanted.abs().max()
    return Trial(error.item(), peak - out.numel() * out.element_size())
