"""Batches of drawn clips for training the autoencoders: any size, length, pace and part of a motion."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from .codec import pixels
from .draw import Scene, draw, scenes
from .run import Run

PACES = (17, 17, 33, 49)  # frames a whole motion takes, each as likely; fast ones teach most


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The size of one batch; every clip is a random stretch of its motion at a random pace."""

    clips: int
    frames: int = 1
    size_px: int = 64
    later: bool = False  # not the first of the windows in which clips of more than 17 frames are decoded


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of training; the learning rate falls to nearly zero inside it."""

    name: str
    batches: tuple[Batch, ...]  # taken in turn
    steps: int
    lr: float


def whole_clips(chosen: Iterable[Scene], *, size_px: int, frames: int, at_once: int = 25) -> Iterator[Tensor]:
    """Draw scenes from start to end, as pixels `[B,3,T,H,W]` of at most `at_once` clips."""
    waiting = iter(chosen)
    while part := list(islice(waiting, at_once)):
        yield pixels(torch.stack([draw(item, size_px=size_px, frames=frames) for item in part]))


def drawn_batch(run: Run, phase: Phase, step: int) -> Tensor:
    """Draw the pixels of a step, `[B,3,T,H,W]`; they depend on the seed, the phase and the step only."""
    batch = phase.batches[step % len(phase.batches)]
    generator = run.generator(phase.name, step)
    # A stream of its own for every step: no clip is ever seen twice.
    stream = int(torch.randint(2**40, (), generator=generator))
    clips = []
    for item in scenes(stream, batch.clips, unseen=False):
        paces = [pace for pace in PACES if pace >= batch.frames]
        pace = paces[int(torch.randint(len(paces), (), generator=generator))]
        part = (batch.frames - 1) / (pace - 1)
        start = (1 - part) * torch.rand((), generator=generator).item()
        clips.append(draw(item, size_px=batch.size_px, frames=batch.frames, start=start, stop=start + part))
    return pixels(torch.stack(clips)).to(run.device)
