"""Bytes that encoding one prompt keeps alive at its peak, derived from the order of Qwen2.5-VL's tensors.

L positions of the prompt (template and pictures included), D width, F feed-forward width, E head width.
"""

from __future__ import annotations

from ..variants import TextSpec

FLOAT, LONG = 4, 8


def encode_bytes(text: TextSpec, positions: int, *, itemsize: int, vision_patches: int = 0) -> int:
    """Most bytes alive at once beyond the weights while a prompt runs through both towers.

    The widest moment is a layer's feed-forward, where gate, up and their product meet: 3 F, on top of the embeddings,
    the residual and the normed states, and two rotary tables. A picture adds the vision tower's layers before that.
    CLIP's 77 positions are fewer and narrower.
    """
    qwen, vision = text.qwen, text.vision
    row = (3 * qwen.ff_dim + 4 * qwen.width + 2 * qwen.head_dim) * itemsize + LONG
    seen = vision_patches * (3 * vision.ff_dim + 5 * vision.width) * itemsize
    embedded = positions * qwen.width * itemsize
    clip = text.clip.positions * (3 * text.clip.ff_dim + 4 * text.clip.width) * FLOAT
    return max(positions * row, embedded + seen, clip)
