"""CLIP without ComfyUI: a handle that names the text encoders' files, loaded when a prompt is encoded."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from ..kandinsky_core.io import open_checkpoint
from ..kandinsky_core.io.quant import FLOATS
from ..kandinsky_core.memory.measurement import free_bytes
from ..kandinsky_core.memory.plan import Plan
from ..kandinsky_core.memory.stream import BlockStream
from ..kandinsky_core.packed.nf4 import NF4 as NF4_BLOCKS
from ..kandinsky_core.text import TextEncoder, load_text_encoder

logger = logging.getLogger("kandinsky5")

TEXT_ROOM_BYTES = 1_000_000_000  # CLIP and what a prompt needs while it is encoded


@dataclass(frozen=True, slots=True)
class TextHandle:
    """CLIP: the two text encoders' files."""

    qwen: Path
    clip: Path
    tokenizer: Path | None
    dtype: torch.dtype
    plan: Plan | None = None  # None: all weights on the device
    nf4: bool = False  # Qwen's linear weights packed into four bits


def load(clip: TextHandle, device: torch.device) -> tuple[TextEncoder, list[BlockStream]]:
    """Load both text encoders as their plan says; without one, layers travel, as streams, if they do not fit whole."""
    streamed = _streams(clip, device)
    # No page-locked copies: a prompt reads every layer once or twice, and making them would read all of them, too.
    encoder = load_text_encoder(
        clip.qwen, clip.clip, tokenizer_path=clip.tokenizer, dtype=clip.dtype, nf4=clip.nf4, device=device,
        streamed=streamed, prefetch=1 if clip.plan is None else clip.plan.prefetch,
    )  # fmt: skip
    return encoder, encoder.streams


def _streams(clip: TextHandle, device: torch.device) -> bool:
    if clip.plan is not None:
        return clip.plan.streams_text
    needed = weight_bytes(clip) + TEXT_ROOM_BYTES
    free = free_bytes(device)  # 0 where the device does not tell
    if needed <= free or not free:
        return False
    logger.info(
        "%s needs %.1f GB, %.1f GB are free on %s: its layers visit it one by one, with the same result.",
        clip.qwen.name, needed / 1e9, free / 1e9, device,
    )  # fmt: skip
    return True


def weight_bytes(clip: TextHandle) -> int:
    """Return what Qwen's weights take once they are loaded: packed ones as they are stored, the rest in `dtype`."""
    total = 0.0
    for name, info in open_checkpoint(clip.qwen, part="text_encoder").tensors.items():
        if clip.nf4 and len(info.shape) == 2 and "embed" not in name:  # linear layers
            total += math.prod(info.shape) * NF4_BLOCKS.nbytes / NF4_BLOCKS.elements
        elif info.dtype in FLOATS:
            total += math.prod(info.shape) * clip.dtype.itemsize
        else:
            total += info.nbytes
    return int(total)
