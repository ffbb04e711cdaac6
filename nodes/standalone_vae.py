"""VAE without ComfyUI: a handle that names an autoencoder file, and the autoencoder at work."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..kandinsky_core.memory.measurement import free_bytes
from ..kandinsky_core.vae.flux import FluxVAE
from ..kandinsky_core.vae.hunyuan import HunyuanVideoVAE
from .host import Workplace


@dataclass(frozen=True, slots=True)
class VAEHandle:
    """VAE: an autoencoder file."""

    path: Path
    kind: str
    dtype: torch.dtype


class StandaloneWorkplace(Workplace):
    """An autoencoder alone on the host's device."""

    def __init__(
        self, network: HunyuanVideoVAE | FluxVAE, device: torch.device, dtype: torch.dtype, drop: Callable[[], None]
    ) -> None:
        """Take a network on the device; `drop` makes its owner forget that it is there."""
        self.network, self.device, self.dtype = network, device, dtype
        self._drop = drop

    def make_room(self, needed_bytes: int) -> None:
        """Nothing is there besides."""

    def free_bytes(self) -> int:
        """Return what the device has left beside the weights, which stay."""
        memory = getattr(torch, self.device.type, None)
        held = memory.memory_allocated(self.device) if hasattr(memory, "memory_allocated") else 0
        return max(0, free_bytes(self.device) - held)

    def release(self) -> None:
        """Collect what is unreachable and return cached blocks."""
        gc.collect()
        memory = getattr(torch, self.device.type, None)  # not all devices have a module
        if hasattr(memory, "empty_cache"):
            memory.empty_cache()

    def to_processor(self) -> None:
        """Move the weights; the next work loads them on the device again."""
        self._drop()
        self.network.to("cpu")
        self.device = torch.device("cpu")
        self.release()
