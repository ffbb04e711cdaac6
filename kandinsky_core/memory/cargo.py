"""What of a block travels: its tensors, packed into one flat piece of memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ALIGN_BYTES = 256  # where a tensor begins inside a flat piece: what device kernels like best
LINE_BYTES = 64  # of a processor's cache

DtypeOf = Callable[[nn.Module, str, Tensor], torch.dtype]
"""(owner, name of its parameter, tensor as stored) -> dtype the owner computes with."""


def as_stored(owner: nn.Module, name: str, tensor: Tensor) -> torch.dtype:  # noqa: ARG001
    """Keep the dtype of every tensor."""
    return tensor.dtype


def in_dtype(dtype: torch.dtype) -> DtypeOf:
    """Return the policy of one dtype for all floating-point parameters.

    Layers that hold bytes or integers are quantised: their scales belong to the format and stay as they are.
    """

    def dtype_of(owner: nn.Module, name: str, tensor: Tensor) -> torch.dtype:  # noqa: ARG001
        return tensor.dtype if is_quantised(owner) or not tensor.is_floating_point() else dtype

    return dtype_of


def is_quantised(owner: nn.Module) -> bool:
    """Whether a layer's own tensors are packed: bytes or integers among its parameters and buffers."""
    own = (*owner.parameters(recurse=False), *owner.buffers(recurse=False))
    return any(tensor.element_size() == 1 or not tensor.is_floating_point() for tensor in own)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a module and where it stands in the flat piece."""

    holder: Tensor  # the parameter or buffer itself: what the module reads
    master: Tensor  # its data as loaded
    dtype: torch.dtype
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes in the dtype it travels in."""
        return self.master.numel() * self.dtype.itemsize


class Cargo:
    """The tensors of one block: where they come from, and the form in which the block computes with them.

    `in_line` keeps each tensor's place within a cache line, if its dtype stays: files hold tensors at any address, and
    a processor's product with a single vector rounds differently from one place in a line to another.
    """

    def __init__(
        self,
        modules: Iterator[nn.Module] | Collection[nn.Module],
        dtype_of: DtypeOf = as_stored,
        *,
        in_line: bool = False,
    ) -> None:
        self.entries: list[Entry] = []
        self.nbytes = 0
        seen = set()
        for owner in modules:
            for name, holder in (*owner._parameters.items(), *owner._buffers.items()):
                if holder is None or id(holder) in seen:
                    continue
                seen.add(id(holder))
                dtype = dtype_of(owner, name, holder) if name in owner._parameters else holder.dtype
                place = holder.data_ptr() % LINE_BYTES if in_line and dtype == holder.dtype else 0
                start = self.nbytes + (0 if place % dtype.itemsize else place)
                self.entries.append(Entry(holder, holder.data, dtype, start))
                self.nbytes = -(-(start + self.entries[-1].nbytes) // ALIGN_BYTES) * ALIGN_BYTES

    def write(self, flat: Tensor) -> None:
        """Copy every master into a flat piece of bytes, converted to the dtype it travels in."""
        for entry, view in zip(self.entries, self._views(flat), strict=True):
            view.copy_(entry.master)

    def bind(self, flat: Tensor) -> None:
        """Let the modules read a flat piece that was written."""
        for entry, view in zip(self.entries, self._views(flat), strict=True):
            entry.holder.data = view

    def settle(self, device: torch.device) -> None:
        """Let the modules read tensors of their own on a device; what needs no copy stays the master."""
        for entry in self.entries:
            entry.holder.data = entry.master.to(device, entry.dtype)

    def restore(self) -> None:
        """Give the modules their masters back."""
        for entry in self.entries:
            entry.holder.data = entry.master

    def _views(self, flat: Tensor) -> Iterator[Tensor]:
        for entry in self.entries:
            yield flat[entry.start : entry.start + entry.nbytes].view(entry.dtype).view(entry.master.shape)
