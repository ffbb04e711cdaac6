"""Measure the nano family on clips, pictures and edits it has never seen: one report and one contact sheet a member.

A report is a dict for JSON: for every task of the member's variant (t2v, i2v and its continuation, t2i, i2i)
"held_out", combinations kept from training, and "seen", other scenes of combinations that training draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .codec import Codec, reconstruct
from .draw import draw, scenes
from .edit import judge
from .family import Family
from .grade import ATTRIBUTES
from .score import STILL_ATTRIBUTES, decibels, flickering, graded, summary
from .sheet import Entry, contact_sheet, strip, verdict
from .trial import FROM_PICTURE, SHOWN, UNSEEN_SEED, Trial, edit_shares, shares, trial

SPLITS = {"held_out": True, "seen": False}
SHEET_ENTRIES = 8  # per task and split

Note = Callable[[str], None]


def measure_vae(
    codec: Codec, count: int = 64, *, size_px: int = 64, frames: int = 17, device: torch.device | None = None
) -> dict[str, object]:
    """Reconstruct unseen clips, or pictures when `frames` is 1: PSNR in dB, flicker, what the grader recognises."""
    asked = list(scenes(UNSEEN_SEED - 1, count))
    real = torch.stack([draw(item, size_px=size_px, frames=frames) for item in asked])
    made = reconstruct(codec, real, device)
    report = {"count": count, "size_px": size_px, "frames": frames, **decibels(made, real)}
    if frames > 1:
        report["picture"] = decibels(reconstruct(codec, real[:, :1], device), real[:, :1])
        report["flicker"] = {"reconstructed": flickering(made), "true": flickering(real)}
    return report | {"grades": summary(graded(made, asked), ATTRIBUTES if frames > 1 else STILL_ATTRIBUTES)}


def evaluate(
    family: Family, count: int = 200, *, seen_count: int = 100, frames: int = 17, size_px: int = 64,
    tasks: Sequence[str] | None = None, sheet: Path | None = None, note: Note = lambda _: None, **settings: object,
) -> dict[str, object]:  # fmt: skip
    """Measure tasks, by default all of the member's variant; `settings` (steps, guidance, shift, …) replace its own."""
    row = family.variant
    report: dict[str, object] = {
        "variant": row.name, "size_px": size_px, "frames": frames,
        "settings": {name: settings.get(name, getattr(row, name)) for name in ("steps", "guidance", "shift")},
    }  # fmt: skip
    sections: dict[str, list[Entry]] = {}
    for task in tasks or (*row.tasks, *(["continuation"] if "i2v" in row.tasks else [])):
        report[task] = {}
        for split, unseen in SPLITS.items():
            wanted = count if unseen else seen_count
            if wanted:
                note(f"{task}, {split}")
                found = trial(family, task, wanted, unseen=unseen, frames=frames, size_px=size_px, **settings)
                report[task][split] = shares(found) | details(family, found)
                sections[f"{row.name}: {task}, {split.replace('_', ' ')} combinations"] = entries(found)
    if sheet is not None:
        contact_sheet(sections, sheet)
    return report


def details(family: Family, found: Trial) -> dict[str, object]:
    """Return what is measured besides shares.

    "flicker" of clips, beside that of true clips (`measure_vae` has the codec's own); with a given picture the
    "first_frame" against it and against what the codec makes of it, and the "seam", the step from the first frame to
    the second in 1/255, beside that of true clips; edits by kind, and what the codec leaves of true edits.
    """
    if found.task == "t2i":
        return {}
    if found.task == "i2i":
        own_BTHWC = reconstruct(family.vae, found.real_BTHWC, family.device)
        kinds = sorted({item.kind for item in found.asked})
        pairs = list(zip(found.asked, found.grades, strict=True))
        return {
            "kinds": {kind: edit_shares([one for item, one in pairs if item.kind == kind]) for kind in kinds},
            "true_edits_reconstructed": edit_shares([
                judge(before, after, item)
                for before, after, item in zip(found.given_BHWC, own_BTHWC[:, 0], found.asked, strict=True)
            ]),
        }  # fmt: skip
    flicker = {"made": found.made_BTHWC, "true": found.real_BTHWC}
    out: dict[str, object] = {"flicker": {name: flickering(clips) for name, clips in flicker.items()}}
    if found.task in FROM_PICTURE:
        first = reconstruct(family.vae, found.real_BTHWC[:, :1], family.device)
        made = found.made_BTHWC[:, :1]
        out["first_frame"] = {
            "against_codec": decibels(made, first), "against_given": decibels(made, found.real_BTHWC[:, :1])
        }
        out["seam"] = {name: seam(clips) for name, clips in flicker.items()}
    return out


def seam(clip_BTHWC: Tensor) -> float:
    """Return the mean absolute difference of the first two frames, in 1/255."""
    return round(255 * (clip_BTHWC[:, 1] - clip_BTHWC[:, 0]).abs().mean().item(), 3)


def entries(found: Trial) -> list[Entry]:
    """Return the first results of a trial for a contact sheet; pictures that were given stand in front."""
    out = []
    for index in range(min(SHEET_ENTRIES, len(found.asked))):
        item, result, made_THWC = found.asked[index], found.grades[index], found.made_BTHWC[index]
        if found.task == "i2i":
            answers = [
                (f"{item.kind} {item.value}" if result.asked else f"WRONG: not {item.value}", result.asked),
                ("rest kept" if result.kept else "WRONG: rest changed", result.kept),
            ]
        else:
            asked = {name: item.names[name] for name in SHOWN[found.task]}
            answers = verdict(asked, {name: getattr(result, name) for name in asked})
        given: list[Tensor] = [] if found.given_BHWC is None else [found.given_BHWC[index]]
        out.append(Entry(found.prompts[index], given + strip(made_THWC), answers))
    return out
