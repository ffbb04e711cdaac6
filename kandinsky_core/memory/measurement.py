"""What a run really needed: the device's own count, or on a processor live tensors one by one."""

from __future__ import annotations

from typing import Any

import torch

from .ram import free_ram_bytes
from .tracker import Tracker


class Measurement:
    """`with Measurement(device) as measured: run()`, then `measured.peak_bytes`; None where nothing was measured.

    A device with an allocator that keeps count says how much was in use at the peak, weights included: that costs
    nothing. A processor has none; with `counts` a tracker adds up the tensors of the run, weights not included, which
    takes some time for every operation.
    """

    def __init__(self, device: torch.device, *, counts: bool = False) -> None:
        self.peak_bytes: int | None = None
        self.with_weights = device.type != "cpu"
        self._device = device
        self._tracker = Tracker() if counts and not self.with_weights else None

    def __enter__(self) -> Measurement:
        if self._tracker is not None:
            self._tracker.__enter__()
        elif (memory := _statistics(self._device)) is not None:
            memory.reset_peak_memory_stats(self._device)
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._tracker is not None:
            self._tracker.__exit__(*raised)
            self.peak_bytes = self._tracker.peak_bytes
        elif (memory := _statistics(self._device)) is not None:
            self.peak_bytes = memory.max_memory_allocated(self._device)


def free_bytes(device: torch.device) -> int:
    """Return the memory of a device that a run can have, what PyTorch holds there included; 0: it does not tell."""
    if device.type == "cpu":
        return free_ram_bytes()
    memory = _statistics(device)
    if memory is None or not hasattr(memory, "mem_get_info"):
        return 0
    return memory.mem_get_info(device)[0] + memory.memory_reserved(device)


def _statistics(device: torch.device) -> Any:
    """The module that counts a device's memory, None for a processor and for devices without such a count."""
    if device.type == "cpu":
        return None
    module = getattr(torch, device.type, None)  # not all devices have one
    return module if hasattr(module, "max_memory_allocated") else None
