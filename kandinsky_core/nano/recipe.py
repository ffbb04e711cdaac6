"""Everything that decides the nano weights besides the code: how much data, how many steps, how much of what."""

from __future__ import annotations

from dataclasses import dataclass, replace

from . import autoencoder
from .autoencoder import Schedule
from .corpus import Slice


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """How often a training step takes a slice of the data."""

    slice: int  # of the course
    weight: float  # relative to the other open shares
    begin: float = 0.0  # part of all steps after which it comes in


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """The training of one transformer."""

    slices: tuple[Slice, ...]
    shares: tuple[Share, ...]
    steps: int
    lr: float = 2e-3  # peak
    shift: float = 1.5  # of the training times towards noise


# Small clips from the start, larger and longer ones later; half of the clips continue a given picture.
VIDEO = Course(
    slices=(
        Slice(kind="clip", size_px=64, frames=17, clips=4000, batch=32),
        Slice(kind="continuation", size_px=64, frames=17, clips=3000, batch=32),
        Slice(kind="picture", size_px=64, clips=1500, batch=48),
        Slice(kind="clip", size_px=128, frames=17, clips=2000, batch=8),
        Slice(kind="continuation", size_px=128, frames=17, clips=1000, batch=8),
        Slice(kind="picture", size_px=128, clips=1000, batch=32),
        Slice(kind="clip", size_px=256, frames=17, clips=400, batch=2),
        Slice(kind="continuation", size_px=256, frames=17, clips=200, batch=2),
        Slice(kind="clip", size_px=64, frames=49, clips=600, batch=12),
        Slice(kind="continuation", size_px=64, frames=49, clips=300, batch=12),
    ),
    shares=(
        Share(slice=0, weight=0.5), Share(slice=1, weight=0.5), Share(slice=2, weight=0.1),
        Share(slice=3, weight=0.5, begin=0.35), Share(slice=4, weight=0.5, begin=0.35),
        Share(slice=5, weight=0.1, begin=0.35),
        Share(slice=6, weight=0.2, begin=0.45), Share(slice=7, weight=0.2, begin=0.45),
        Share(slice=8, weight=0.1, begin=0.5), Share(slice=9, weight=0.1, begin=0.5),
    ),
    steps=28_000,
)  # fmt: skip
IMAGE = Course(
    slices=(
        Slice(kind="picture", size_px=128, clips=6000, batch=32),
        Slice(kind="picture", size_px=256, clips=1500, batch=8),
    ),
    shares=(Share(slice=0, weight=0.75), Share(slice=1, weight=0.25)),
    steps=4000,
)
EDIT = Course(
    slices=(
        Slice(kind="edit", size_px=128, clips=6000, batch=32),
        Slice(kind="edit", size_px=256, clips=1500, batch=8),
        Slice(kind="picture", size_px=128, clips=1500, batch=32),
    ),
    shares=(Share(slice=0, weight=0.6), Share(slice=1, weight=0.2), Share(slice=2, weight=0.2)),
    steps=6000,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The whole family."""

    vae: Schedule = autoencoder.VIDEO
    image_vae: Schedule = autoencoder.IMAGE
    text_steps: int = 1200
    video: Course = VIDEO
    image: Course = IMAGE
    edit: Course = EDIT
    grade_count: int = 200
    gate_count: int = 100  # of the measurements between stages


RECIPE = Recipe()


def shortened(recipe: Recipe, steps: int) -> Recipe:
    """The same recipe with at most `steps` steps in every phase and little data: a rehearsal, not a training."""

    def schedule(given: Schedule) -> Schedule:
        return Schedule(**{
            part: tuple(
                replace(
                    phase, steps=min(phase.steps, steps),
                    batches=tuple(replace(batch, clips=min(batch.clips, 2)) for batch in phase.batches),
                )
                for phase in getattr(given, part)
            )
            for part in ("encoder", "decoder", "finish")
        })  # fmt: skip

    def course(given: Course) -> Course:
        slices = tuple(replace(item, clips=8, batch=min(item.batch, 4)) for item in given.slices)
        return replace(given, slices=slices, steps=min(given.steps, steps))

    return replace(
        recipe, vae=schedule(recipe.vae), image_vae=schedule(recipe.image_vae),
        text_steps=min(recipe.text_steps, steps), video=course(recipe.video), image=course(recipe.image),
        edit=course(recipe.edit), grade_count=4, gate_count=4,
    )  # fmt: skip
