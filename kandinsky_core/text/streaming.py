"""Text towers whose layers visit the device one after the other."""

from __future__ import annotations

import torch
from torch import nn

from ..memory.cargo import as_stored, in_dtype
from ..memory.stream import BlockStream


def stream_qwen(
    tower: nn.Module,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    prefetch: int = 1,
    pinned_bytes: int = 0,
) -> BlockStream:
    """Stream the layers of Qwen's text tower and leave its embeddings on the host, where rows are looked up.

    `dtype` None computes in what is stored.
    """
    return BlockStream(
        tower,
        list(tower.layers),
        device,
        prefetch=prefetch,
        pinned_bytes=pinned_bytes,
        dtype_of=as_stored if dtype is None else in_dtype(dtype),
        keep=[tower.embed_tokens],
    )


def stream_clip(tower: nn.Module, device: torch.device, *, prefetch: int = 1) -> BlockStream:
    """Stream the layers of CLIP's text tower."""
    layers = getattr(tower, "text_model", tower).encoder.layers
    return BlockStream(tower, list(layers), device, prefetch=prefetch)
