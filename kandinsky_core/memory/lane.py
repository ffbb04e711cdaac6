"""How bytes get from the host into a buffer on the device: at once, or on a stream beside the computation."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .cargo import Cargo

STAGES = 2  # page-locked buffers between mapped weights and a device: one is filled while the other is read

Mark = Any
"""A point in the device's work that can be waited for; None where everything is done when it is asked for."""


class Lane:
    """Copies when asked: for the processor and for devices without streams."""

    def mark(self) -> Mark:
        """Return the point up to which the device has been given work."""
        return None

    def carry(self, cargo: Cargo, image: Tensor | None, buffer: Tensor, after: Mark) -> Mark:  # noqa: ARG002
        """Fill `buffer` with a cargo once `after` has passed; `image` is its ready copy on the host, if there is one.

        The returned mark has passed when the buffer is filled.
        """
        if image is None:
            cargo.write(buffer)
        else:
            buffer[: cargo.nbytes].copy_(image)

    def wait(self, mark: Mark) -> None:
        """Let all work that the device is given from now on come after `mark`."""

    def finish(self) -> None:
        """Return when no copy is under way."""


class StreamLane(Lane):
    """Copies on a stream of their own, so that the device computes meanwhile.

    `kind` is torch's module for the device, `allocate` gives page-locked host bytes.
    """

    def __init__(
        self,
        device: torch.device,
        largest_bytes: int,
        allocate: Callable[[int], Tensor],
        kind: ModuleType | None = None,
    ) -> None:
        self.device = device
        self._kind: Any = kind or torch.get_device_module(device)
        self.stream = self._kind.Stream(device)
        self._allocate = allocate
        self._largest_bytes = largest_bytes
        self._stages: list[tuple[Tensor, Mark]] = []

    def mark(self) -> Mark:
        """Record an event on the stream that computes."""
        return self._kind.current_stream(self.device).record_event()

    def carry(self, cargo: Cargo, image: Tensor | None, buffer: Tensor, after: Mark) -> Mark:
        """Copy behind `after`. Mapped weights go through page-locked memory, which the host writes here and now."""
        stage = None
        if image is None:
            stage = image = self._stage()
            cargo.write(image)
        if after is not None:
            self.stream.wait_event(after)
        with self._kind.stream(self.stream):
            buffer[: cargo.nbytes].copy_(image[: cargo.nbytes], non_blocking=True)
        done = self.stream.record_event()
        if stage is not None:
            self._stages.append((stage, done))
        return done

    def wait(self, mark: Mark) -> None:
        """Let the computing stream wait; the host goes on."""
        if mark is not None:
            self._kind.current_stream(self.device).wait_event(mark)

    def finish(self) -> None:
        """Wait on the host for the copies and for what computes with them."""
        self.stream.synchronize()
        self._kind.current_stream(self.device).synchronize()

    def _stage(self) -> Tensor:
        if len(self._stages) < STAGES:
            return self._allocate(self._largest_bytes)
        stage, read = self._stages.pop(0)
        read.synchronize()
        return stage


def has_streams(device: torch.device) -> bool:
    """Whether copies to a device can run beside its work."""
    return device.type != "cpu" and hasattr(getattr(torch, device.type, None), "Stream")


def page_locked(nbytes: int) -> Tensor:
    """Return host bytes that a device reads without the processor's help."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
