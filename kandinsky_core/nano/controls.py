"""Controls: the same measurement with one thing broken. What costs nothing here would not be noticed elsewhere.

Nothing in the core knows of them: a break is another setting, another order of prompts, or a wrapped transformer.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..model.crossdit import CrossDiT
from ..sampling.flow import Transformer
from ..variants import Variant
from .draw import Scene
from .edit import Edit
from .family import Family
from .trial import SHOWN, Shares, shares, trial

LEAST_TAIL = 1e-3  # probability below which a count of hits is no longer called chance


class Unmasked:
    """A transformer that is never told which frames or pictures are given: the mask channel is 0, the rest is left."""

    def __init__(self, family: Family) -> None:
        self.model = family.transformer
        self.spec = family.transformer.spec

    def __call__(self, x_BTHWC: Tensor, *args: object, **options: object) -> Tensor:
        """Velocity, channels last."""
        return self.model(torch.cat([x_BTHWC[..., :-1], torch.zeros_like(x_BTHWC[..., -1:])], -1), *args, **options)


class SwappedAxes(CrossDiT):
    """A transformer that takes rows for columns in its rotary positions."""

    @classmethod
    def of(cls, family: Family) -> SwappedAxes:
        """Share the weights of a sound one."""
        model = family.transformer
        made = cls(model.spec, device="meta")
        made.load_state_dict(model.state_dict(), assign=True)
        return made.eval()

    def run_blocks(self, x_BND: Tensor, text_BLD: Tensor, time_BE: Tensor, rope_NP2: Tensor, *rest: object) -> Tensor:
        """Run the visual blocks."""
        time, height, width = rope_NP2.split([pairs // 2 for pairs in self.spec.axes_dims], dim=-2)
        return super().run_blocks(x_BND, text_BLD, time_BE, torch.cat([time, width, height], dim=-2), *rest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Break:
    """One thing that is wrong, and the tasks that can show it."""

    tasks: tuple[str, ...] = ("t2v", "continuation", "t2i", "i2i")
    model: Callable[[Family], Transformer] | None = None  # None: the family's own
    settings: Callable[[Variant], dict[str, object]] = lambda _: {}
    shuffled: bool = False


BREAKS = {
    "prompts_shuffled": Break(shuffled=True),
    "guidance_1": Break(settings=lambda _: {"guidance": 1.0}),
    "shift_inverse": Break(settings=lambda row: {"shift": 1 / row.shift}),
    "shift_1": Break(settings=lambda _: {"shift": 1.0}),
    "mask_dropped": Break(tasks=("continuation", "i2i"), model=Unmasked),
    "axes_swapped": Break(model=SwappedAxes.of),
}


def permutation(count: int) -> list[int]:
    """Return one fixed random order; each prompt is equally likely to go to each scene, its own included."""
    return random.Random("shuffled").sample(range(count), count)


def chance(asked: Sequence[Scene] | Sequence[Edit], task: str) -> dict[str, float]:
    """Return the share of right answers of a perfect model whose prompts are shuffled, expected over all orders.

    That is how often two of these prompts, drawn with replacement, agree. Of a task with a picture only what the prompt
    alone decides: motion (continuation; a circle told to rotate also looks as if told to rest), the change (i2i).
    """
    count = len(asked)

    def agreeing(values: list[object]) -> float:
        return sum((n / count) ** 2 for n in Counter(values).values())

    if task == "i2i":
        return {"asked": agreeing([(item.kind, item.value) for item in asked])}
    names = ("motion",) if task == "continuation" else SHOWN[task]
    out = {name: agreeing([item.names[name] for item in asked]) for name in names}
    if task == "continuation":
        return out
    return out | {"all": agreeing([tuple(item.names[name] for name in names) for item in asked])}


def binomial_tail(hits: int, count: int, share: float) -> float:
    """Return the probability of at least `hits` right answers of `count` when each is right with `share`."""
    return sum(math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(hits, count + 1))


def controls(
    family: Family, count: int = 100, *, frames: int = 17, size_px: int = 64, tasks: Sequence[str] | None = None,
    breaks: Sequence[str] = tuple(BREAKS), note: Callable[[str], None] = lambda _: None,
) -> dict[str, object]:  # fmt: skip
    """Measure tasks on held-out combinations sound and broken.

    For every task the "sound" shares, and for every break its "shares" and "drop": how many points each is below the
    sound one. Shuffled prompts also have "chance", and "above_chance": names whose hits chance explains with less than
    `LEAST_TAIL`.
    """
    report: dict[str, object] = {"variant": family.variant.name, "count": count, "size_px": size_px, "frames": frames}
    common = {"frames": frames, "size_px": size_px}
    own = ("continuation" if task == "i2v" else task for task in family.variant.tasks)
    for task in tasks or own:
        note(f"{task}, sound")
        sound = shares(trial(family, task, count, **common))
        report[task] = {"sound": sound}
        for name in breaks:
            broken = BREAKS[name]
            if task not in broken.tasks:
                continue
            note(f"{task}, {name}")
            model = family.transformer if broken.model is None else broken.model(family)
            found = trial(
                replace(family, transformer=model), task, count, order=permutation(count) if broken.shuffled else None,
                **common, **broken.settings(family.variant),
            )  # fmt: skip
            measured = shares(found)
            report[task][name] = {"shares": measured, "drop": drop(sound, measured)}
            if broken.shuffled:
                expected = chance(found.asked, task)
                report[task][name] |= {
                    "chance": {key: round(value, 4) for key, value in expected.items()},
                    "above_chance": [
                        key for key, value in expected.items()
                        if binomial_tail(measured[key]["right"], count, value) < LEAST_TAIL
                    ],
                }  # fmt: skip
    return report


def drop(sound: Shares, broken: Shares) -> dict[str, float]:
    """Return how many points each share is lower when broken."""
    return {name: round(100 * (sound[name]["share"] - broken[name]["share"]), 1) for name in sound}
