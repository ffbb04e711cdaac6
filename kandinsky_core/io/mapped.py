"""Which dtype to ask of a loader so that weights stay mapped."""

from __future__ import annotations

import torch

from .checkpoint import Checkpoint

PLAIN = ("F64", "F32", "F16", "BF16")  # safetensors names


def mapping_dtype(checkpoint: Checkpoint, dtype: torch.dtype | None) -> torch.dtype | None:
    """Return None (as stored, nothing is copied) for plain weights: whoever moves them converts them then.

    Packed weights are unpacked by their layers or by the loader, which must know `dtype`.
    """
    return None if all(info.dtype in PLAIN for info in checkpoint.tensors.values()) else dtype
