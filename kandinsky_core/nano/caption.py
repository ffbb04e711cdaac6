"""English prompts for drawn scenes: the whole language the nano family understands."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from .draw import BACKGROUNDS, COLORS, MOTIONS, SHAPES, Scene

MOTION_PHRASES: dict[str, tuple[str, ...]] = {
    "left": ("moves left", "slides to the left", "drifts left", "is moving to the left"),
    "right": ("moves right", "slides to the right", "drifts right", "is moving to the right"),
    "up": ("moves up", "rises", "floats upwards", "is moving up"),
    "down": ("moves down", "falls", "sinks downwards", "is moving down"),
    "grow": ("grows", "gets bigger", "grows larger", "is growing"),
    "shrink": ("shrinks", "gets smaller", "becomes smaller", "is shrinking"),
    "rotate": ("rotates", "spins", "turns around", "is rotating"),
    "still": ("stays still", "does not move", "rests", "is standing still"),
}
BACKGROUND_PHRASES: dict[str, str] = {name: name for name in BACKGROUNDS} | {"forest": "dark green"}
CLIP_FORMS = (
    "{a} {color} {shape} {motion} on a {background} background",
    "{a} {color} {shape} {motion}, {background} background",
    "{color} {shape} that {motion}, the background is {background}",
    "on a {background} background {a} {color} {shape} {motion}",
    "a video of {a} {color} {shape} on {background}, it {motion}",
    "the {color} {shape} {motion} over a {background} background",
)
IMAGE_FORMS = (
    "{a} {color} {shape} on a {background} background",
    "{color} {shape}, {background} background",
    "a picture of {a} {color} {shape} on {background}",
    "on a {background} background there is {a} {color} {shape}",
)

# For a clip that begins with a given picture: what happens to whatever is seen there.
CONTINUATION_FORMS = (
    "it {motion}",
    "now it {motion}",
    "the object {motion}",
    "the shape in the picture {motion}",
)


def finish(text: str, rng: random.Random) -> str:
    """Write a sentence with or without capital and full stop."""
    text = text[0].upper() + text[1:] if rng.random() < 0.5 else text
    return text + "." if rng.random() < 0.5 else text


def caption(scene: Scene, rng: random.Random, *, moving: bool = True) -> str:
    """Describe a scene in one sentence; `moving` False describes a still picture of it."""
    words = {
        "a": "an" if scene.color[0] in "aeiou" else "a",
        "color": scene.color,
        "shape": scene.shape,
        "background": BACKGROUND_PHRASES[scene.background],
        "motion": rng.choice(MOTION_PHRASES[scene.motion]),
    }
    return finish(rng.choice(CLIP_FORMS if moving else IMAGE_FORMS).format(**words), rng)


def continuation(scene: Scene, rng: random.Random) -> str:
    """Say how a given picture goes on, without naming anything that it shows."""
    motion = rng.choice(MOTION_PHRASES[scene.motion])
    return finish(rng.choice(CONTINUATION_FORMS).format(motion=motion), rng)


def language() -> Iterator[str]:
    """Yield sentences that together hold every word and every form of the language."""
    rng = random.Random("language")
    for color, shape, motion in itertools.product(COLORS, SHAPES, MOTIONS):
        for background in BACKGROUNDS:
            scene = Scene(shape=shape, color=color, motion=motion, background=background)
            yield caption(scene, rng)
            yield caption(scene, rng, moving=False)
            yield continuation(scene, rng)
