"""What the nano transformers train on: drawn clips, pictures and edits as latents of the basis, with prompts.

Shapes: see `train.data`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..text.encoder import TextEncoder
from ..train.data import Bucket, Prompts
from .batch import whole_clips
from .caption import caption, continuation
from .draw import Scene, scenes
from .edit import edits, instruction
from .latent_basis import LatentBasis
from .run import Run
from .text import TEMPLATE_OF, encode_batch

PROMPTS = 3  # of a clip
UNNAMED = 0.5  # share of the prompts of a given picture that do not name what it shows
EMPTY = 0.1  # share of empty prompts, for classifier-free guidance
ENCODED = 200  # prompts encoded at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Training data of one kind and size: how much of it there is, and how much of it a step takes."""

    kind: str  # of TEMPLATE_OF
    size_px: int
    frames: int = 1
    clips: int
    batch: int


@torch.no_grad()
def make_bucket(run: Run, basis: LatentBasis, encoder: TextEncoder, part: Slice, stream: int) -> Bucket:
    """Draw, encode and describe the scenes or edits of a slice; `stream` sets its random numbers."""
    rng = random.Random(f"{run.seed}/{stream}")
    if part.kind == "edit":
        changes = list(edits(stream, part.clips, unseen=False))
        sentences = [partial(instruction, item, rng) for item in changes]
        items = [item.after for item in changes]
        before = [item.before for item in changes]
        # The text encoder sees the picture to edit, also beside an empty instruction.
        pictures = [
            picture_CTHW[:, 0]
            for pixels in whole_clips(before, size_px=part.size_px, frames=1)
            for picture_CTHW in pixels
            for _ in range(PROMPTS)
        ]
        edited = latents_of(before, part, basis).to(run.device)
    else:
        items = list(scenes(stream, part.clips, unseen=False))
        sentences = [partial(_sentence, part.kind, item, rng) for item in items]
        pictures, edited = [], None
    words = ["" if rng.random() < EMPTY else sentence() for sentence in sentences for _ in range(PROMPTS)]
    prompts = encode_prompts(encoder, words, TEMPLATE_OF[part.kind], pictures)
    rows_NK = torch.arange(len(words)).view(-1, PROMPTS)
    return Bucket(latents_of(items, part, basis).to(run.device), rows_NK, prompts, edited)


def _sentence(kind: str, item: Scene, rng: random.Random) -> str:
    if kind == "continuation" and rng.random() < UNNAMED:
        return continuation(item, rng)
    return caption(item, rng, moving=kind != "picture")


def latents_of(items: Sequence[Scene], part: Slice, basis: LatentBasis) -> Tensor:
    """Return the scenes' latents `[N,C,T,H,W]` float16."""
    clips = whole_clips(items, size_px=part.size_px, frames=part.frames)
    return torch.cat([basis.encode(pixels.to(basis.mean_S.device)).half() for pixels in clips])


def encode_prompts(
    encoder: TextEncoder, words: Sequence[str], template: str, images: Sequence[Tensor] = ()
) -> Prompts:
    """Encode prompts, each with its picture `[3,H,W]` in -1…1 if there are any; padded to one length."""
    parts = [
        encode_batch(encoder, words[start : start + ENCODED], template, images[start : start + ENCODED])
        for start in range(0, len(words), ENCODED)
    ]
    length = max(mask_BL.shape[1] for _, mask_BL, _ in parts)
    return Prompts(
        torch.cat([F.pad(features.half(), (0, 0, 0, length - features.shape[1])) for features, _, _ in parts]),
        torch.cat([F.pad(mask, (0, length - mask.shape[1])) for _, mask, _ in parts]),
        torch.cat([pooled.float() for _, _, pooled in parts]),
    )
