"""Measure colour, shape, motion and background of a clip without any learning.

Background is the median of the border, colour the median of the object, shape the best overlap with a rotated
template, motion a straight line fitted to centroid, area and angle over the frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .draw import BACKGROUNDS, COLORS, GROWTH, SHAPES, SYMMETRY, TRAVEL, TURN, Scene, coverage, unit_area

NOTHING = "none"
ATTRIBUTES = ("color", "shape", "motion", "background")

NAME_RADIUS = 0.30  # farthest RGB distance at which a colour still has its name
VISIBLE = 0.18  # RGB distance to the background that counts as an object
SMALLEST, LARGEST = 0.012, 0.6  # share of the picture an object may cover
TEMPLATE_CELLS = 28  # side of the normalised object window
TEMPLATE_REACH = 1.75  # half side of that window in radii of a disc of the object's area
TEMPLATE_ANGLES = 16  # rotations per symmetry period
LEAST_OVERLAP = 0.70  # soft intersection over union below which nothing is recognised
# Change over the whole clip that is typical of drawn ones and makes the kinds comparable; the area grows squared.
MOTION_TYPICAL = {
    "shift": sum(TRAVEL) / 2,
    "growth": 2 * math.log(sum(GROWTH) / 2),
    "turn": sum(TURN) / 2,
}
MOTION_LEAST = 0.45  # of the typical change


@dataclass(frozen=True, slots=True)
class Grade:
    """What a clip shows; names are those of `draw`, or "none" where nothing recognisable is there."""

    color: str
    shape: str
    motion: str
    background: str

    def matches(self, scene: Scene) -> dict[str, bool]:
        """Say for each attribute whether it is what the scene asked for."""
        return {attribute: getattr(self, attribute) == scene.names[attribute] for attribute in ATTRIBUTES}


def grade(clip_THWC: Tensor) -> Grade:
    """Grade a clip `[T,H,W,3]` in 0…1; a picture (T = 1) has motion "none"."""
    clip_THWC = clip_THWC.float().clamp(0, 1)
    paper = border_color(clip_THWC)
    background = nearest_name(paper, BACKGROUNDS)
    cover_THW, ink = object_mask(clip_THWC, paper)
    if ink is None:
        return Grade(NOTHING, NOTHING, NOTHING, background)
    shape = shape_name(cover_THW)
    return Grade(nearest_name(ink, COLORS), shape, motion_name(cover_THW, shape), background)


def border_color(clip_THWC: Tensor) -> Tensor:
    """Return the median RGB of the outermost pixels of all frames."""
    width = max(1, clip_THWC.shape[1] // 32)
    edge = torch.ones(clip_THWC.shape[1:3], dtype=torch.bool)
    edge[width:-width, width:-width] = False
    return clip_THWC[:, edge].reshape(-1, 3).median(0).values


def nearest_name(rgb: Tensor, names: dict[str, tuple[float, float, float]]) -> str:
    """Return the name of the closest reference colour, or "none" when all are far."""
    distances = {name: (rgb - torch.tensor(reference)).norm().item() for name, reference in names.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= NAME_RADIUS else NOTHING


def object_mask(clip_THWC: Tensor, paper: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the object's opacity `[T,H,W]` and its RGB; RGB is None when there is no object."""
    distance_THW = (clip_THWC - paper).norm(dim=-1)
    peak = distance_THW.flatten().topk(max(1, int(SMALLEST / 2 * distance_THW.numel()))).values[-1]
    if peak < VISIBLE:
        return torch.zeros_like(distance_THW), None
    ink = clip_THWC[distance_THW > 0.75 * peak].median(0).values
    contrast = ink - paper
    cover_THW = ((clip_THWC - paper) @ contrast / contrast.square().sum()).clamp(0, 1)
    cover_THW = ((cover_THW - 0.15) / 0.7).clamp(0, 1)  # clears ringing far away, keeps the soft edge
    share = cover_THW.mean()
    return cover_THW, ink if SMALLEST <= share <= LARGEST else None


def positions(cover_THW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return centroid x, centroid y and area of each frame, in sides and squared sides of the picture, `[T]`."""
    frames, height, width = cover_THW.shape
    mass_T = cover_THW.sum((1, 2)).clamp_min(1e-6)
    axis_x, axis_y = (torch.arange(width) + 0.5) / width, (torch.arange(height) + 0.5) / height
    return (
        (cover_THW.sum(1) @ axis_x) / mass_T,
        (cover_THW.sum(2) @ axis_y) / mass_T,
        mass_T / (height * width),
    )


@cache
def templates() -> dict[str, Tensor]:
    """Return each shape in every rotation, `[angles, cells, cells]`, scaled to the area of a unit disc."""
    axis = torch.linspace(-1, 1, TEMPLATE_CELLS) * TEMPLATE_REACH
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    out = {}
    for shape in SHAPES:
        radius = math.sqrt(math.pi / unit_area(shape))
        turns = max(1, SYMMETRY[shape])
        angles = [2 * math.pi / turns * k / TEMPLATE_ANGLES for k in range(TEMPLATE_ANGLES)]
        out[shape] = torch.stack([
            coverage(
                shape,
                math.cos(a) * x + math.sin(a) * y,
                math.cos(a) * y - math.sin(a) * x,
                radius,
                edge=0.25,
            )
            for a in angles
        ])  # fmt: skip
    return out


def normalized(cover_THW: Tensor) -> Tensor:
    """Cut the object out of each frame, centred and scaled to the area of a unit disc: `[T, cells, cells]`."""
    x_T, y_T, area_T = positions(cover_THW)
    radius_T = (area_T / math.pi).sqrt()
    axis = torch.linspace(-1, 1, TEMPLATE_CELLS) * TEMPLATE_REACH
    at_x = 2 * (x_T[:, None] + radius_T[:, None] * axis) - 1
    at_y = 2 * (y_T[:, None] + radius_T[:, None] * axis) - 1
    frames = len(x_T)
    grid = torch.stack([
        at_x[:, None, :].expand(frames, TEMPLATE_CELLS, TEMPLATE_CELLS),
        at_y[:, :, None].expand(frames, TEMPLATE_CELLS, TEMPLATE_CELLS),
    ], -1)  # fmt: skip
    return F.grid_sample(cover_THW[:, None], grid, align_corners=False)[:, 0]


def shape_scores(cover_THW: Tensor) -> dict[str, float]:
    """Return the overlap (soft intersection over union, best rotation, mean over frames) with every shape."""
    window_TYX = normalized(cover_THW)
    scores = {}
    for shape, template_AYX in templates().items():
        both = torch.minimum(window_TYX[:, None], template_AYX).sum((2, 3))
        either = torch.maximum(window_TYX[:, None], template_AYX).sum((2, 3))
        scores[shape] = (both / either).max(1).values.mean().item()
    return scores


def shape_name(cover_THW: Tensor) -> str:
    """Return the best matching shape, or "none" when nothing overlaps well or the clip's halves show different ones."""
    names = set()
    for part_THW in cover_THW.tensor_split(2) if len(cover_THW) > 1 else (cover_THW,):
        scores = shape_scores(part_THW)
        best = max(scores, key=scores.__getitem__)
        names.add(best if scores[best] >= LEAST_OVERLAP else NOTHING)
    return names.pop() if len(names) == 1 else NOTHING


def turned(cover_THW: Tensor, symmetry: int) -> Tensor:
    """Return the accumulated rotation of each frame in radians `[T]`, from the phase of an angular moment."""
    window_TYX = normalized(cover_THW)
    axis = torch.linspace(-1, 1, TEMPLATE_CELLS) * TEMPLATE_REACH
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    phase_T = torch.angle((window_TYX * torch.complex(x, y) ** symmetry).sum((1, 2)))
    steps = torch.remainder(phase_T.diff() + math.pi, 2 * math.pi) - math.pi
    return torch.cat([torch.zeros(1), steps.cumsum(0)]) / symmetry


def change(values_T: Tensor) -> float:
    """Return the change over the whole clip of the straight line fitted to the values."""
    time_T = torch.linspace(-0.5, 0.5, len(values_T))
    return ((time_T * (values_T - values_T.mean())).sum() / time_T.square().sum()).item()


def motion_name(cover_THW: Tensor, shape: str) -> str:
    """Return the strongest motion, "still" when all are weak, "none" for a single frame."""
    if len(cover_THW) < 2:
        return NOTHING
    x_T, y_T, area_T = positions(cover_THW)
    moved_x = change(x_T) / MOTION_TYPICAL["shift"]
    moved_y = change(y_T) / MOTION_TYPICAL["shift"]
    grown = change(area_T.clamp_min(1e-4).log()) / MOTION_TYPICAL["growth"]
    symmetry = SYMMETRY.get(shape, 0)
    spun = change(turned(cover_THW, symmetry)) / MOTION_TYPICAL["turn"] if symmetry else 0.0
    strength = {
        "left": -moved_x, "right": moved_x, "up": -moved_y, "down": moved_y,
        "grow": grown, "shrink": -grown, "rotate": abs(spun),
    }  # fmt: skip
    best = max(strength, key=strength.__getitem__)
    return best if strength[best] >= MOTION_LEAST else "still"
