"""Procedural clips for the nano family: one soft-edged shape that moves over a plain background.

Positions and sizes are measured in sides of the picture, so the same scene can be drawn at any size and length; the
edge is measured in pixels, so a larger picture is a sharper one.

Every clip starts alike: a shape of one size near the middle. The first frame says nothing about the motion, so a clip
made from it follows the prompt or does not.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "cross")
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.12, 0.12),
    "green": (0.10, 0.72, 0.18),
    "blue": (0.15, 0.30, 0.95),
    "yellow": (0.97, 0.88, 0.10),
    "orange": (0.98, 0.52, 0.06),
    "purple": (0.58, 0.16, 0.78),
    "cyan": (0.10, 0.82, 0.90),
    "white": (0.97, 0.97, 0.97),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "black": (0.05, 0.05, 0.05),
    "gray": (0.50, 0.50, 0.50),
    "navy": (0.06, 0.09, 0.32),
    "forest": (0.05, 0.26, 0.10),
    "beige": (0.87, 0.78, 0.62),
    "pink": (0.95, 0.68, 0.76),
}
MOTIONS = ("left", "right", "up", "down", "grow", "shrink", "rotate", "still")
DIRECTION = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
SYMMETRY = {"circle": 0, "square": 4, "triangle": 3, "cross": 4}  # turns by 360/n look the same

EDGE_PX = 2.4  # width of the soft edge
# What the names leave open, drawn evenly from these ranges; no outline crosses the border.
OFFSET = 0.03  # largest distance from the middle at the start, along x and along y
RADIUS = (0.21, 0.23)  # at the start
TRAVEL = (0.17, 0.19)
GROWTH = (1.50, 1.60)  # final radius / first radius; a shrinking shape divides by it
TURN = (math.radians(85), math.radians(95))  # clockwise
JITTER = 0.015  # largest change of a colour channel between clips of one colour name
# Compositions, not looks: every shape is seen at every size, every motion with every kind of outline.
HELD_OUT_PAIRS = (
    {"color": "purple", "shape": "square"},
    {"color": "cyan", "shape": "triangle"},
    {"color": "orange", "background": "navy"},
    {"shape": "triangle", "motion": "left"},
)
HELD_OUT_SHARE = 0.1  # of the remaining combinations


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One clip before it is drawn: four names and the numbers they leave open."""

    shape: str
    color: str
    motion: str
    background: str
    center: tuple[float, float] = (0.5, 0.5)  # x, y at the start
    radius: float = 0.22  # at the start
    travel: float = 0.18  # path of a moving shape
    growth: float = 1.55  # end radius / start radius of a growing shape
    turn: float = math.radians(90)  # of a rotating shape, clockwise
    tint: tuple[float, ...] = (0.0,) * 6  # added to the colour and the background

    @property
    def names(self) -> dict[str, str]:
        """The graded attributes."""
        return {a: getattr(self, a) for a in ("color", "shape", "motion", "background")}


def possible(shape: str, motion: str) -> bool:
    """A turning circle looks like a resting one, so it is never drawn."""
    return SYMMETRY[shape] > 0 or motion != "rotate"


def held_out(scene: Scene) -> bool:
    """True for combinations that no clip of the training shows: whole pairs and a fixed tenth of the rest."""
    if _has_pair(scene, HELD_OUT_PAIRS):
        return True
    digest = hashlib.sha256("/".join(scene.names.values()).encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def held_out_picture(scene: Scene) -> bool:
    """True for combinations that no picture of the training shows, whatever moves: the pairs without a motion."""
    return _has_pair(scene, [pair for pair in HELD_OUT_PAIRS if "motion" not in pair])


def _has_pair(scene: Scene, pairs: Sequence[dict[str, str]]) -> bool:
    return any(all(scene.names[key] == value for key, value in pair.items()) for pair in pairs)


def scene(seed: int, index: int, *, unseen: bool | None = None) -> Scene:
    """Return clip `index` of stream `seed`; `unseen` False / True draws training / held-out combinations only."""
    rng = random.Random(f"{seed}/{index}")
    while True:
        names = {
            "shape": rng.choice(SHAPES),
            "color": rng.choice(tuple(COLORS)),
            "motion": rng.choice(MOTIONS),
            "background": rng.choice(tuple(BACKGROUNDS)),
        }
        chosen = Scene(**names)
        if possible(chosen.shape, chosen.motion) and (unseen is None or held_out(chosen) == unseen):
            break
    return replace(
        chosen,
        center=(0.5 + rng.uniform(-OFFSET, OFFSET), 0.5 + rng.uniform(-OFFSET, OFFSET)),
        radius=rng.uniform(*RADIUS),
        travel=rng.uniform(*TRAVEL),
        growth=rng.uniform(*GROWTH),
        turn=rng.uniform(*TURN),
        tint=tuple(rng.uniform(-JITTER, JITTER) for _ in range(6)),
    )


def scenes(seed: int, count: int, *, unseen: bool | None = None) -> Iterator[Scene]:
    """Yield the first `count` clips of stream `seed`."""
    return (scene(seed, index, unseen=unseen) for index in range(count))


def signed_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Distance to the outline of a shape of about unit radius, negative inside; y points down."""
    if shape == "circle":
        return torch.hypot(x, y) - 0.92
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.80
    if shape == "triangle":
        y = y - 0.18  # centroid of the equilateral triangle at the origin, apex up
        sides = (y - 0.48, 0.866 * x - 0.5 * y - 0.66, -0.866 * x - 0.5 * y - 0.66)
        return torch.maximum(torch.maximum(sides[0], sides[1]), sides[2])
    if shape == "cross":
        x, y = x.abs(), y.abs()
        return torch.minimum(torch.maximum(x - 1.0, y - 0.40), torch.maximum(x - 0.40, y - 1.0))
    raise KeyError(shape)


def coverage(shape: str, x: Tensor, y: Tensor, radius: Tensor | float, edge: float) -> Tensor:
    """Opacity 0…1 of the shape at points (x, y) relative to its centre; smooth over `edge`."""
    ramp = (0.5 - signed_distance(shape, x / radius, y / radius) * radius / edge).clamp(0, 1)
    return ramp * ramp * (3 - 2 * ramp)


@cache
def unit_area(shape: str) -> float:
    """Return the area of a shape of radius 1."""
    axis = torch.linspace(-1.5, 1.5, 301)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return (coverage(shape, x, y, 1.0, edge=0.02).sum() * (axis[1] - axis[0]) ** 2).item()


def draw(clip: Scene, *, size_px: int = 64, frames: int = 17, start: float = 0.0, stop: float = 1.0) -> Tensor:
    """Draw a scene as `[T,H,W,3]` float32 in 0…1; `start` and `stop` cut a part of its time."""
    time_T11 = torch.linspace(start, stop, frames)[:, None, None]
    axis = (torch.arange(size_px) + 0.5) / size_px
    dx, dy = DIRECTION.get(clip.motion, (0.0, 0.0))
    x_THW = axis[None, None, :] - clip.center[0] - dx * clip.travel * time_T11
    y_THW = axis[None, :, None] - clip.center[1] - dy * clip.travel * time_T11
    sign = {"grow": 1.0, "shrink": -1.0}.get(clip.motion, 0.0)
    radius_T11 = clip.radius * torch.exp(sign * math.log(clip.growth) * time_T11)
    angle_T11 = time_T11 * (clip.turn if clip.motion == "rotate" else 0.0)
    cos, sin = torch.cos(angle_T11), torch.sin(angle_T11)
    turned_x, turned_y = cos * x_THW + sin * y_THW, cos * y_THW - sin * x_THW
    cover_THW1 = coverage(clip.shape, turned_x, turned_y, radius_T11, EDGE_PX / size_px)[..., None]
    ink = (torch.tensor(COLORS[clip.color]) + torch.tensor(clip.tint[:3])).clamp(0, 1)
    paper = (torch.tensor(BACKGROUNDS[clip.background]) + torch.tensor(clip.tint[3:])).clamp(0, 1)
    return torch.lerp(paper.expand(frames, size_px, size_px, 3), ink.expand(frames, size_px, size_px, 3), cover_THW1)
