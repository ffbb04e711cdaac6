"""Causal convolutions that go on where the last call stopped, and the exact short form of convolving repeated cells.

Input is written straight into the padded tensor the convolution reads. A cache holds the last input frames a kernel
still needs; it is brought up to date in place, after everything that can fail: a call that raises has changed nothing.

Shape legend: B batch, C channels, T/H/W frames, rows, columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hunyuan import CausalConv3d, Upsampler

Write = Callable[[Tensor], object]  # fills the [B,C,T,H,W] view it is given
Finish = Callable[[Tensor], Tensor]  # may fail, so it runs before the cache is brought up to date


@dataclass(frozen=True, slots=True)
class Padded:
    """A tensor with `front` frames before and one replicated cell around what is written into it."""

    buffer: Tensor
    front: int

    @classmethod
    def filled(cls, write: Write, x: Tensor, channels: int, front: int, cache: Tensor | None) -> Padded:
        """Let `write` fill the frames of `x`; those before come from the cache or repeat the first."""
        batch, _, frames, height, width = x.shape
        padded = cls(x.new_empty(batch, channels, front + frames, height + 2, width + 2), front)
        inner = padded.inner
        write(inner[:, :, front:])
        if front:
            inner[:, :, :front] = inner[:, :, front : front + 1] if cache is None else cache
        replicate_border(padded.buffer)
        return padded

    @property
    def inner(self) -> Tensor:
        """The view without the border."""
        return self.buffer[..., 1:-1, 1:-1]

    def tail(self, frames: int, cache: Tensor | None) -> Tensor | None:
        """Keep the last frames, if any, in the storage of the cache if there is one."""
        if not frames:
            return None
        inner = self.inner
        if inner.shape[2] < frames:  # a lone first frame, which stands for those before it
            inner = inner[:, :, -1:].expand(-1, -1, frames, -1, -1)
        tail = inner[:, :, -frames:]
        return tail.clone(memory_format=torch.contiguous_format) if cache is None else cache.copy_(tail)


def replicate_border(buffer: Tensor) -> None:
    """Copy the outermost rows and columns one cell out."""
    buffer[..., 0, 1:-1] = buffer[..., 1, 1:-1]
    buffer[..., -1, 1:-1] = buffer[..., -2, 1:-1]
    buffer[..., 0] = buffer[..., 1]
    buffer[..., -1] = buffer[..., -2]


class StreamedConv:
    """A 3 x 3 x 3 causal convolution with its past as a value."""

    def __init__(self, conv: CausalConv3d) -> None:
        self.history = (
            conv.conv.kernel_size[0] - conv.conv.stride[0]
        )  # a strided kernel reaches back one frame only
        self._conv = conv

    def __call__(
        self,
        write: Write,
        x: Tensor,
        channels: int,
        cache: Tensor | None,
        finish: Finish | None = None,
        *,
        keep: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Convolve what `write` makes of `x`, in `channels` channels; return the output and, to `keep`, the cache."""
        layer = self._conv.conv
        if cache is None and x.shape[2] == 1 and type(layer) is nn.Conv3d:
            padded = Padded.filled(write, x, channels, 0, None)
            out = self._conv.one_frame(padded.buffer.squeeze(2)).unsqueeze(2)
        else:
            front = layer.kernel_size[0] - 1 if cache is None else self.history
            padded = Padded.filled(write, x, channels, front, cache)
            out = layer(padded.buffer)
        out = out if finish is None else finish(out)
        return out, padded.tail(self.history if keep else 0, cache)


class StreamedUp:
    """Repeat cells and convolve, with the past before repetition as a value.

    With torch's own layer the repeated tensor is never made: every output phase sees each input cell through the sum of
    the taps that meet it, so its kernel has two taps where the plain one has three.
    """

    def __init__(self, up: Upsampler) -> None:
        self.time = up.factors[0]
        self.history = 1 if self.time == 2 else 2  # input frames: two copies of one frame are two frames
        self._layer = up.conv.conv
        own = type(self._layer) is nn.Conv3d
        self._kernels = phase_kernels(self._layer.weight.detach(), self.time) if own else None

    def __call__(
        self, x: Tensor, cache: Tensor | None, *, keep: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Return the enlarged `x` and, to `keep`, the cache; the clip's first frame is not repeated in time."""
        padded = Padded.filled(lambda view: view.copy_(x), x, x.shape[1], self.history, cache)
        out = (
            self._plain(padded, cache is None)
            if self._kernels is None
            else self._phases(padded, cache is None)
        )
        return out, padded.tail(self.history if keep else 0, cache)

    def _plain(self, padded: Padded, first: bool) -> Tensor:
        x = padded.inner
        if self.time == 2:
            # Of the repeated frame before x the kernel sees both copies; a first frame is no copy of it.
            x = x.repeat_interleave(2, 2)
            x = torch.cat([x[:, :, :2], x[:, :, 3:]], 2) if first else x
        batch, channels, frames, height, width = x.shape
        wide = x.new_empty(batch, channels, frames, 2 * height + 2, 2 * width + 2)
        for row in range(2):
            for column in range(2):
                wide[..., 1 + row : -1 : 2, 1 + column : -1 : 2] = x
        replicate_border(wide)
        return self._layer(wide)

    def _phases(self, padded: Padded, first: bool) -> Tensor:
        layer, buffer = self._layer, padded.buffer
        batch, _, frames, height, width = padded.inner.shape
        alone = first and frames == padded.front + 1
        frames = (frames - padded.front) * self.time - (first and self.time == 2)
        early, late = (
            (1, 0) if first else (0, 1)
        )  # where a frame's copies go; the clip's first has no early one
        out = buffer.new_empty(batch, layer.out_channels, frames, 2 * height, 2 * width)
        for row in range(2):
            for column in range(2):
                x = buffer[..., row : row + height + 1, column : column + width + 1].contiguous()
                cells = out[..., row::2, column::2]
                kernels = self._kernels[row][column]
                if alone:
                    cells[:, :, 0] = F.conv2d(x[:, :, 0], _summed(kernels[0]), layer.bias)
                elif self.time == 1:
                    cells.copy_(F.conv3d(x, kernels[0], layer.bias))
                else:
                    cells[:, :, late::2] = F.conv3d(x, kernels[0], layer.bias)
                    cells[:, :, early::2] = F.conv3d(x[:, :, int(first) :], kernels[1], layer.bias)
        return out


def phase_kernels(weight: Tensor, time: int) -> list[list[list[Tensor]]]:
    """Sum the taps of a 3 x 3 x 3 kernel that meet the same cell of the input: `[row copy][column copy][time]`.

    Along time the late copy comes first: it is the one a clip's first frame has. Sums are formed in float32 or more.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return [
        [
            [kernel.to(weight.dtype) for kernel in (_phases(columns, 2) if time == 2 else (columns,))]
            for columns in _phases(rows, 4)
        ]
        for rows in _phases(wide, 3)
    ]


def _phases(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    # In space the first copy of a cell sees the cell before it once and its own twice, the second copy its own twice
    # and the next once. In time, where a kernel only looks back, the late copy sees the frame before once, the early
    # one twice.
    before, here, after = weight.split(1, dim)
    return torch.cat([before, here + after], dim), torch.cat([before + here, after], dim)


def _summed(kernel: Tensor) -> Tensor:
    return kernel.sum(2, dtype=torch.promote_types(kernel.dtype, torch.float32)).to(kernel.dtype)
