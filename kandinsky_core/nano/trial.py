"""One task tried on many scenes: what was asked, what was made, what the grader says of each.

`generate` makes, `grade` and `judge` look; a report (`evaluate`) and the controls are sums over trials.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .caption import caption, continuation
from .draw import Scene, draw, held_out_picture, scene
from .edit import Edit, EditGrade, edit, instruction, judge
from .family import Family
from .generate import generate
from .grade import ATTRIBUTES, Grade
from .score import STILL_ATTRIBUTES, graded, rate, right, summary

UNSEEN_SEED = -1  # stream of evaluation scenes; those of the training are not negative
NOISE_SEED = {"t2v": 0, "i2v": 50_000, "continuation": 70_000, "t2i": 90_000, "i2i": 130_000}
FROM_PICTURE = ("i2v", "continuation")  # clips with a given first frame: fully described, or only its motion
# What is graded of a task without a judge.
SHOWN = {"t2v": ATTRIBUTES, "i2v": ATTRIBUTES, "continuation": ATTRIBUTES, "t2i": STILL_ATTRIBUTES}

Shares = dict[str, dict[str, object]]


@dataclass(frozen=True, slots=True)
class Trial:
    """Results of one task, in order; `asked` are scenes or, for i2i, edits."""

    task: str
    asked: Sequence[Scene] | Sequence[Edit]
    prompts: Sequence[str]
    real_BTHWC: Tensor  # the drawn clips, or the pictures after the edit
    given_BHWC: Tensor | None  # first frames or pictures before the edit (i2i)
    made_BTHWC: Tensor
    grades: Sequence[Grade] | Sequence[EditGrade]


def trial(
    family: Family, task: str, count: int, *, unseen: bool = True, frames: int = 17, size_px: int = 64,
    order: Sequence[int] | None = None, **settings: object,
) -> Trial:  # fmt: skip
    """Try a task on `count` scenes of combinations held out of the training (`unseen`), or of those that it draws.

    A "continuation" is "i2v" with prompts that say what happens and name nothing of what the picture shows: identity
    comes from the picture alone.

    `order` gives the prompts to other scenes than their own; `settings` are those of `generate`.
    """
    moving = task == "t2v" or task in FROM_PICTURE
    frames = frames if moving else 1
    rng = random.Random(f"evaluation/{task}/{unseen}")
    common = {"frames": frames, "size_px": size_px, "seed": NOISE_SEED[task], **settings}
    if task == "i2i":
        asked = asked_for(task, count, unseen=unseen)
        prompts = _ordered([instruction(item, rng) for item in asked], order)
        given, real = (_drawn([getattr(item, side) for item in asked], 1, size_px) for side in ("before", "after"))
        made = generate(family, prompts, edit_BHWC=given[:, 0], **common)
        judged = [judge(*pair, item) for *pair, item in zip(given[:, 0], made[:, 0], asked, strict=True)]
        return Trial(task, asked, prompts, real, given[:, 0], made, judged)
    asked = asked_for(task, count, unseen=unseen)
    words = [
        continuation(item, rng) if task == "continuation" else caption(item, rng, moving=moving) for item in asked
    ]
    prompts = _ordered(words, order)
    real = _drawn(asked, frames, size_px)
    first = real[:, 0] if task in FROM_PICTURE else None
    made = generate(family, prompts, images_BHWC=first, **common)
    return Trial(task, asked, prompts, real, first, made, [result for _, result in graded(made, asked)])


def asked_for(task: str, count: int, *, unseen: bool) -> list[Scene] | list[Edit]:
    """Draw what a trial of a task asks for; a picture shows no motion, so only the other pairs are held out of it."""
    draw_one = edit if task == "i2i" else scene
    drawn = (draw_one(UNSEEN_SEED, index, unseen=unseen) for index in itertools.count())
    if unseen and task in ("t2i", "i2i"):
        drawn = (item for item in drawn if held_out_picture(item.after if task == "i2i" else item))
    return list(itertools.islice(drawn, count))


def shares(found: Trial) -> Shares:
    """Return the shares of right answers of a trial.

    Scenes: each attribute and "all"; with a first frame also "identity": colour, shape and background of the whole
    clip are those of the given picture. Edits: "asked" the change, "kept" the rest, and "all", both at once.
    """
    if found.task == "i2i":
        return edit_shares(found.grades)
    pairs = list(zip(found.asked, found.grades, strict=True))
    out = summary(pairs, SHOWN[found.task])
    if found.task in FROM_PICTURE:
        out["identity"] = rate(right(*pair, STILL_ATTRIBUTES) for pair in pairs)
    return out


def edit_shares(judged: Sequence[EditGrade]) -> Shares:
    """Return the shares of edits with the asked change, with the rest kept, with both."""
    return {
        "asked": rate(one.asked for one in judged),
        "kept": rate(one.kept for one in judged),
        "all": rate(one.asked and one.kept for one in judged),
    }


def _ordered(prompts: list[str], order: Sequence[int] | None) -> list[str]:
    return prompts if order is None else [prompts[index] for index in order]


def _drawn(items: Sequence[Scene], frames: int, size_px: int) -> Tensor:
    return torch.stack([draw(item, size_px=size_px, frames=frames) for item in items])
