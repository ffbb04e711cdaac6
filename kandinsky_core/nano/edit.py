"""Drawn edits: two pictures that differ in one named attribute, the sentence that asks for it, and a judgement.

The object stays where it is and keeps its size: what the names leave open (position, radius, tints) is the same in
both pictures.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from .caption import BACKGROUND_PHRASES, finish
from .draw import BACKGROUNDS, COLORS, SHAPES, Scene, held_out, scene, unit_area
from .grade import NOTHING, border_color, grade, object_mask, positions

KINDS: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "background": tuple(BACKGROUNDS),
}
INSTRUCTION_FORMS: dict[str, tuple[str, ...]] = {
    "color": (
        "make it {color}",
        "make the {shape} {color}",
        "paint the {shape} {color}",
        "turn the {shape} {color}",
        "change the color to {color}",
        "change the color from {old_color} to {color}",
        "the {old_color} {shape} should be {color}",
        "recolor the {shape} to {color}",
    ),
    "shape": (
        "make it a {shape}",
        "turn it into a {shape}",
        "turn the {old_shape} into a {shape}",
        "change the {old_color} {old_shape} to a {shape}",
        "replace the {old_shape} with a {shape}",
        "change the shape to a {shape}",
        "it should be a {shape}",
        "the {old_shape} should become a {shape}",
    ),
    "background": (
        "make the background {background}",
        "change the background to {background}",
        "change the background from {old_background} to {background}",
        "paint the background {background}",
        "replace the background with {background}",
        "the background should be {background}",
        "put it on a {background} background",
        "put the {shape} on a {background} background",
    ),
}

MOVED = 0.05  # sides of the picture; an object that moved farther was not kept
RESIZED = 1.2  # ratio of the radii, of areas measured in the area of the shape; one step of growth is 1.5


@dataclass(frozen=True, slots=True)
class Edit:
    """Two resting scenes that differ in the attribute `kind`: color, shape or background."""

    before: Scene
    after: Scene
    kind: str

    @property
    def value(self) -> str:
        """The name that the attribute shall have afterwards."""
        return self.after.names[self.kind]


@dataclass(frozen=True, slots=True)
class EditGrade:
    """What became of an edit: `asked` and `others` by name, the object's way in sides, the ratio of its radii (≥ 1)."""

    asked: bool
    others: bool
    moved: float
    resized: float

    @property
    def kept(self) -> bool:
        """True when all that was not asked for is as it was."""
        return self.others and self.moved < MOVED and self.resized < RESIZED


def edit(seed: int, index: int, *, unseen: bool | None = None) -> Edit:
    """Return edit `index` of stream `seed`.

    `unseen` True draws edits that lead to a held-out combination, from any; False edits that never touch one.
    """
    rng = random.Random(f"{seed}/{index}/edit")
    while True:
        before = replace(scene(rng.randrange(2**31), 0), motion="still")
        kind = rng.choice(tuple(KINDS))
        value = rng.choice([name for name in KINDS[kind] if name != before.names[kind]])
        drawn = Edit(before, replace(before, **{kind: value}), kind)
        if unseen is None or held_out(drawn.after) == unseen and (unseen or not held_out(before)):
            return drawn


def edits(seed: int, count: int, *, unseen: bool | None = None) -> Iterator[Edit]:
    """Yield the first `count` edits of stream `seed`."""
    return (edit(seed, index, unseen=unseen) for index in range(count))


def instruction(wanted: Edit, rng: random.Random) -> str:
    """Ask for an edit in one sentence."""
    before, after = wanted.before, wanted.after
    return finish(
        rng.choice(INSTRUCTION_FORMS[wanted.kind]).format(
            color=after.color,
            shape=after.shape,
            background=BACKGROUND_PHRASES[after.background],
            old_color=before.color,
            old_shape=before.shape,
            old_background=BACKGROUND_PHRASES[before.background],
        ),
        rng,
    )


def instructions_language() -> Iterator[str]:
    """Yield sentences that together hold every word and every form of the instructions."""
    rng = random.Random("instructions")
    for color, shape, background in itertools.product(COLORS, SHAPES, BACKGROUNDS):
        before = Scene(color=color, shape=shape, background=background, motion="still")
        for kind, values in KINDS.items():
            for value in values:
                if value != before.names[kind]:
                    yield instruction(Edit(before, replace(before, **{kind: value}), kind), rng)


def judge(before_HWC: Tensor, after_HWC: Tensor, wanted: Edit) -> EditGrade:
    """Compare the picture before an edit with the one that came out of it, both `[H,W,3]` in 0…1."""
    seen = grade(after_HWC[None])
    names = {kind: getattr(seen, kind) for kind in KINDS}
    asked = names.pop(wanted.kind) == wanted.value
    others = all(name == wanted.before.names[kind] for kind, name in names.items())
    first, last = outline(before_HWC), outline(after_HWC)
    if first is None or last is None:
        return EditGrade(asked, False, math.inf, math.inf)
    # A shape that nobody asked for is measured as what it is: its size is no second fault.
    shape = wanted.after.shape if seen.shape == NOTHING else seen.shape
    ratio = math.sqrt(last[2] / unit_area(shape) / (first[2] / unit_area(wanted.before.shape)))
    return EditGrade(asked, others, math.dist(first[:2], last[:2]), max(ratio, 1 / ratio))


def outline(picture_HWC: Tensor) -> tuple[float, float, float] | None:
    """Return the object's centre (x, y) in sides and its area in squared sides; None without an object."""
    picture_1HWC = picture_HWC[None].float().clamp(0, 1)
    cover_1HW, ink = object_mask(picture_1HWC, border_color(picture_1HWC))
    if ink is None:
        return None
    x_1, y_1, area_1 = positions(cover_1HW)
    return x_1.item(), y_1.item(), area_1.item()
