"""Devices and number types without ComfyUI."""

from __future__ import annotations

from contextlib import nullcontext
from inspect import signature
from pathlib import Path

import torch

from ..kandinsky_core.errors import BackendUnavailable
from ..kandinsky_core.io import open_checkpoint
from .host import NF4

CPU_FLOAT32_BYTES = 1_000_000_000  # weights up to this size are widened on a processor, where float32 is the sure way
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def device_of(name: str | None) -> torch.device:
    """Return the named device, or the accelerator if there is one, else the processor."""
    if name is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise BackendUnavailable(
            f"Device '{name}' cannot be used here: {reason}. Leave it out to choose one."
        ) from error
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 by itself; what does not say so does."""
    module = getattr(torch, device.type, None)
    ask = getattr(module, "is_bf16_supported", None)
    if ask is None:
        return True
    with module.device(device) if hasattr(module, "device") else nullcontext():  # it asks the current one
        tells_emulation = "including_emulation" in signature(ask).parameters  # not every back-end
        return ask(including_emulation=False) if tells_emulation else ask()


def dtype_of(name: str, path: Path, device: torch.device, part: str = "transformer") -> torch.dtype:
    """Return the type that weights in a file are held in; "auto" is bfloat16, for small ones on a processor float32."""
    if name == "auto":
        is_small = device.type == "cpu" and open_checkpoint(path, part=part).nbytes <= CPU_FLOAT32_BYTES
        return torch.float32 if is_small else torch.bfloat16
    if name == NF4:
        raise BackendUnavailable(f"dtype '{NF4}' is for the text encoder only. Convert a transformer instead.")
    if name not in DTYPES:
        raise BackendUnavailable(
            f"dtype '{name}' works inside ComfyUI only. Outside it use one of: auto, {', '.join(DTYPES)}."
        )
    return DTYPES[name]
