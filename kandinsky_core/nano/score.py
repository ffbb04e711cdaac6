"""Numbers from graded clips: shares with their intervals, fidelity in dB, flicker in grey levels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .draw import Scene
from .grade import ATTRIBUTES, Grade, border_color, grade, object_mask

STILL_ATTRIBUTES = ("color", "shape", "background")  # what a picture shows; also an object's identity
INSIDE = 0.9  # opacity from which a pixel belongs to the object
OUTSIDE_PX = 3 / 64  # distance from the object, in sides, from which a pixel belongs to the background

Pairs = Sequence[tuple[Scene, Grade]]


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % Wilson confidence interval of a share."""
    if count == 0:
        return 0.0, 1.0
    share = hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def rate(right: Iterable[bool]) -> dict[str, object]:
    """Return the share of True with its interval."""
    answers = list(right)
    hits, count = sum(answers), len(answers)
    low, high = wilson(hits, count)
    return {
        "right": hits, "count": count, "share": round(hits / max(1, count), 4),
        "interval": [round(low, 4), round(high, 4)],
    }  # fmt: skip


def graded(made_BTHWC: Tensor, asked: Sequence[Scene]) -> list[tuple[Scene, Grade]]:
    """Grade clips against the scenes they should show."""
    return [(item, grade(clip)) for item, clip in zip(asked, made_BTHWC, strict=True)]


def right(item: Scene, result: Grade, attributes: Sequence[str]) -> bool:
    """Say whether all of the attributes are what the scene asked for."""
    matches = result.matches(item)
    return all(matches[attribute] for attribute in attributes)


def summary(pairs: Pairs, attributes: Sequence[str] = ATTRIBUTES) -> dict[str, dict[str, object]]:
    """Return the share of clips that show what was asked for: each attribute, and "all" of them in one clip."""
    out = {attribute: rate(right(*pair, (attribute,)) for pair in pairs) for attribute in attributes}
    return out | {"all": rate(right(*pair, attributes) for pair in pairs)}


def decibels(made_BTHWC: Tensor, true_BTHWC: Tensor) -> dict[str, object]:
    """Return the mean of the peak signal-to-noise ratios of clips in 0…1, its 95 % interval, and the least."""
    error_B = (made_BTHWC - true_BTHWC).square().flatten(1).mean(1)
    psnr_B = -10 * torch.log10(error_B.clamp_min(1e-10))
    return {
        "psnr_mean_db": round(psnr_B.mean().item(), 2), "psnr_interval_db": interval(psnr_B),
        "psnr_least_db": round(psnr_B.min().item(), 2),
    }  # fmt: skip


def interval(values_B: Tensor) -> list[float] | None:
    """Return the 95 % interval of the mean (normal approximation); None of fewer than two values."""
    if len(values_B) < 2:
        return None
    mean, half = values_B.mean().item(), 1.96 * values_B.std().item() / math.sqrt(len(values_B))
    return [round(mean - half, 3), round(mean + half, 3)]


def flicker(clip_THWC: Tensor) -> tuple[float, float]:
    """Return how restless background and object are, in 1/255: mean absolute second difference in time.

    Of every background pixel that the object stays away from in three frames running, and of the object's mean
    colour. Steady colour and steady change of colour give 0. NaN where there are no such pixels or frames.
    """
    clip_THWC = clip_THWC.float().clamp(0, 1)
    cover_THW, _ = object_mask(clip_THWC, border_color(clip_THWC))
    reach = 2 * round(OUTSIDE_PX * clip_THWC.shape[1]) + 1
    near_THW = torch.nn.functional.max_pool2d(cover_THW[None], reach, 1, reach // 2)[0] > 0.5
    free_THW = ~(near_THW[:-2] | near_THW[1:-1] | near_THW[2:])
    background = (clip_THWC[:-2] - 2 * clip_THWC[1:-1] + clip_THWC[2:]).abs().mean(-1)[free_THW].mean()
    inside_THW1 = (cover_THW > INSIDE)[..., None]
    ink_TC = (clip_THWC * inside_THW1).sum((1, 2)) / inside_THW1.sum((1, 2))
    object_T = (ink_TC[:-2] - 2 * ink_TC[1:-1] + ink_TC[2:]).abs().mean(-1)
    return background.item() * 255, object_T[object_T.isfinite()].mean().item() * 255


def flickering(clip_BTHWC: Tensor) -> dict[str, object]:
    """Return the mean flicker of clips, its 95 % interval and the worst, and how many had no object to look at."""
    found_BK = torch.tensor([flicker(clip) for clip in clip_BTHWC]).reshape(-1, 2)
    out: dict[str, object] = {}
    for name, values_B in zip(("background", "object"), found_BK.T, strict=True):
        values_B = values_B[values_B.isfinite()]
        out[name] = round(values_B.mean().item(), 3) if len(values_B) else None
        out[f"{name}_interval"] = interval(values_B)
        out[f"{name}_worst"] = round(values_B.max().item(), 3) if len(values_B) else None
    return out | {"without_object": int((~found_BK[:, 1].isfinite()).sum())}
