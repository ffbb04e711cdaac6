"""Measure the nano family on clips, pictures and edits it has never seen: one report and one contact sheet a member.

A report is a dict for JSON, `{"held_out": …, "seen": …}` for every task of the member's variant (t2v, i2v, t2i, i2i):
combinations kept from training, and combinations that training draws (other clips of them).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .caption import caption
from .codec import Codec, reconstruct
from .draw import Scene, draw, scenes
from .edit import Edit, EditGrade, edits, instruction, judge
from .family import Family
from .generate import generate
from .grade import ATTRIBUTES, Grade
from .score import STILL_ATTRIBUTES, decibels, flickering, graded, rate, right, summary
from .sheet import Entry, contact_sheet, strip, verdict

UNSEEN_SEED = 1_000_003  # stream of evaluation clips; training streams use small seeds
NOISE_SEED = {"t2v": 0, "i2v": 50_000, "t2i": 90_000, "i2i": 130_000}
SPLITS = {"held_out": True, "seen": False}
SHEET_ENTRIES = 8  # per task

Note = Callable[[str], None]


def measure_vae(
    codec: Codec, count: int = 64, *, size_px: int = 64, frames: int = 17, device: torch.device | None = None
) -> dict[str, object]:
    """Reconstruct unseen clips, or pictures when `frames` is 1: PSNR in dB, flicker, what the grader recognises."""
    asked = list(scenes(UNSEEN_SEED + 1, count))
    real = torch.stack([draw(item, size_px=size_px, frames=frames) for item in asked])
    made = reconstruct(codec, real, device)
    attributes = ATTRIBUTES if frames > 1 else STILL_ATTRIBUTES
    report = {"count": count, "size_px": size_px, "frames": frames, **decibels(made, real)}
    if frames > 1:
        report["picture"] = decibels(reconstruct(codec, real[:, :1], device), real[:, :1])
        report["flicker"] = {"reconstructed": flickering(made), "true": flickering(real)}
    return report | {"grades": summary(graded(made, asked), attributes)}


def evaluate(
    family: Family, count: int = 200, *, seen_count: int = 100, frames: int = 17, size_px: int = 64,
    sheet: Path | None = None, note: Note = lambda _: None, **settings: object,
) -> dict[str, object]:  # fmt: skip
    """Measure every task of the member's variant; `settings` are those of `generate`."""
    row = family.variant
    report: dict[str, object] = {
        "variant": row.name, "size_px": size_px, "frames": frames,
        "settings": {name: settings.get(name, getattr(row, name)) for name in ("steps", "guidance", "shift")},
    }  # fmt: skip
    sections: dict[str, list[Entry]] = {}
    for task in row.tasks:
        report[task] = {}
        for split, unseen in SPLITS.items():
            wanted = count if unseen else seen_count
            if not wanted:
                continue
            note(f"{task}, {split}")
            report[task][split], entries = TASKS[task](
                family, wanted, unseen=unseen, frames=frames, size_px=size_px, **settings
            )
            sections[f"{row.name}: {task}, {split.replace('_', ' ')} combinations"] = entries
    if sheet is not None:
        contact_sheet(sections, sheet)
    return report


def text_to_video(
    family: Family, count: int, *, unseen: bool, frames: int, size_px: int, **settings: object
) -> tuple[dict[str, object], list[Entry]]:
    """Grade clips made from prompts; their flicker beside that of true and reconstructed clips."""
    asked, real, words = _clips(count, unseen, frames, size_px)
    made = generate(family, words, frames=frames, size_px=size_px, seed=NOISE_SEED["t2v"], **settings)
    pairs = graded(made, asked)
    return {**summary(pairs), "flicker": _flicker(family, made, real)}, _entries(words, made, pairs, ATTRIBUTES)


def image_to_video(
    family: Family, count: int, *, unseen: bool, frames: int, size_px: int, **settings: object
) -> tuple[dict[str, object], list[Entry]]:
    """Grade clips made from first frames, which do not tell the motion, and prompts.

    "identity": colour, shape and background of the whole clip are those of the given picture. "first_frame": the
    clip's own first frame against what the codec alone makes of the picture.
    """
    asked, real, words = _clips(count, unseen, frames, size_px)
    made = generate(
        family, words, images_BHWC=real[:, 0], frames=frames, size_px=size_px, seed=NOISE_SEED["i2v"], **settings
    )
    pairs = graded(made, asked)
    report = {
        **summary(pairs),
        "identity": rate(right(*pair, STILL_ATTRIBUTES) for pair in pairs),
        "first_frame": decibels(made[:, :1], reconstruct(family.vae, real[:, :1], family.device)),
        "flicker": _flicker(family, made, real),
    }
    return report, _entries(words, made, pairs, ATTRIBUTES)


def text_to_image(
    family: Family, count: int, *, unseen: bool, frames: int, size_px: int, **settings: object  # noqa: ARG001
) -> tuple[dict[str, object], list[Entry]]:  # fmt: skip
    """Grade pictures made from prompts."""
    rng = random.Random(f"evaluation/{unseen}/picture")
    asked = _scenes(count, unseen)
    words = [caption(item, rng, moving=False) for item in asked]
    made = generate(family, words, frames=1, size_px=size_px, seed=NOISE_SEED["t2i"], **settings)
    pairs = graded(made, asked)
    return summary(pairs, STILL_ATTRIBUTES), _entries(words, made, pairs, STILL_ATTRIBUTES)


def editing(
    family: Family, count: int, *, unseen: bool, frames: int, size_px: int, **settings: object  # noqa: ARG001
) -> tuple[dict[str, object], list[Entry]]:  # fmt: skip
    """Judge changed pictures: what was asked, everything else kept, both at once, also by kind of change."""
    rng = random.Random(f"evaluation/{unseen}/edit")
    wanted = list(edits(UNSEEN_SEED, count, unseen=unseen))
    words = [instruction(item, rng) for item in wanted]
    before, after = (
        torch.stack([draw(getattr(item, side), size_px=size_px, frames=1)[0] for item in wanted])
        for side in ("before", "after")
    )
    made = generate(
        family, words, edit_BHWC=before, frames=1, size_px=size_px, seed=NOISE_SEED["i2i"], **settings
    )[:, 0]
    ceiling = reconstruct(family.vae, after[:, None], family.device)[:, 0]
    judged = [judge(*pictures, item) for *pictures, item in zip(before, made, wanted, strict=True)]
    best = [judge(*pictures, item) for *pictures, item in zip(before, ceiling, wanted, strict=True)]
    report = {
        **edit_summary(judged),
        "kinds": {
            kind: edit_summary([one for one, item in zip(judged, wanted, strict=True) if item.kind == kind])
            for kind in sorted({item.kind for item in wanted})
        },
        "true_edits_reconstructed": edit_summary(best),
    }
    return report, [
        _edit_entry(*given) for given in zip(words, before, made, wanted, judged, strict=True)
    ][:SHEET_ENTRIES]  # fmt: skip


TASKS = {"t2v": text_to_video, "i2v": image_to_video, "t2i": text_to_image, "i2i": editing}


def edit_summary(judged: Sequence[EditGrade]) -> dict[str, dict[str, object]]:
    """Return the share of edits with the asked change, with the rest kept, and with both."""
    return {
        "asked": rate(one.asked for one in judged),
        "kept": rate(one.kept for one in judged),
        "both": rate(one.asked and one.kept for one in judged),
    }


def _scenes(count: int, unseen: bool) -> list[Scene]:
    return list(scenes(UNSEEN_SEED, count, unseen=unseen))


def _clips(count: int, unseen: bool, frames: int, size_px: int) -> tuple[list[Scene], Tensor, list[str]]:
    """Scenes, their true clips and their prompts."""
    rng = random.Random(f"evaluation/{unseen}/clip")
    asked = _scenes(count, unseen)
    real = torch.stack([draw(item, size_px=size_px, frames=frames) for item in asked])
    return asked, real, [caption(item, rng) for item in asked]


def _flicker(family: Family, made: Tensor, real: Tensor) -> dict[str, object]:
    return {
        "made": flickering(made),
        "reconstructed": flickering(reconstruct(family.vae, real, family.device)),
        "true": flickering(real),
    }


def _entries(
    words: Sequence[str], made: Tensor, pairs: Sequence[tuple[Scene, Grade]], attributes: Sequence[str]
) -> list[Entry]:
    found = []
    for word, clip, (item, result) in zip(words, made, pairs, strict=True):
        asked = {attribute: item.names[attribute] for attribute in attributes}
        found.append(Entry(word, strip(clip), verdict(asked, {name: getattr(result, name) for name in asked})))
    return found[:SHEET_ENTRIES]


def _edit_entry(word: str, before: Tensor, made: Tensor, wanted: Edit, judged: EditGrade) -> Entry:
    answers = [
        (f"{wanted.kind} {wanted.value}" if judged.asked else f"WRONG: not {wanted.value}", judged.asked),
        ("rest kept" if judged.kept else "WRONG: rest changed", judged.kept),
    ]
    return Entry(word, [before, made], answers)
