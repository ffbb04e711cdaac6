"""The last stages of the recipe: measure the finished family, sound and broken."""

from __future__ import annotations

from collections.abc import Callable

from ..variants import Variant, variant
from .controls import controls
from .evaluate import evaluate, measure_vae
from .family import MEMBERS, TEXT, load_family
from .grade import LEAST_OVERLAP
from .recipe import Recipe
from .run import Files, Run, hashed, read_json, write_json
from .trial import shares, trial

Measure = Callable[[Run, str, Recipe, Files], dict[str, object]]


def grade_stage(run: Run, recipe: Recipe, out: Files) -> None:
    """Measure everything with the trained autoencoders; writes grade.json and a contact sheet a member."""
    write_json(run.folder / "grade.json", measured(run, "grade", recipe, out, grade_member))


def controls_stage(run: Run, recipe: Recipe, out: Files) -> None:
    """Measure what happens when one thing is broken, with the trained autoencoders; writes controls.json."""
    write_json(run.folder / "controls.json", measured(run, "controls", recipe, out, break_member))


def measured(run: Run, name: str, recipe: Recipe, out: Files, measure: Measure) -> dict[str, object]:
    """Measure every member that was not measured with these very weights and settings before."""
    report = {}
    for member in MEMBERS:
        path = run.folder / f"{name}_{member}.json"
        row = variant(f"nano_{member}")
        identity = run.identity(
            weights=hashed(out[kind] for kind in (*MEMBERS[member], *TEXT)),
            counts=[recipe.grade_count, recipe.gate_count], least_overlap=LEAST_OVERLAP,
            settings={key: getattr(row, key) for key in ("steps", "guidance", "shift", "sizes", "frames")},
        )  # fmt: skip
        if run.resume and path.exists() and (found := read_json(path))["identity"] == identity:
            report[member] = found["report"]
            continue
        report[member] = measure(run, member, recipe, out)
        write_json(path, {"identity": identity, "report": report[member]})
    return report


def grade_member(run: Run, member: str, recipe: Recipe, out: Files) -> dict[str, object]:
    """Measure a member: its first size and length in full, the others on fewer clips and in shares only."""

    def note(what: str) -> None:
        run.log("grade", now=f"{member}: {what}")

    family = load_family(out, run.device, member)
    row = family.variant
    first = {"frames": row.frames[0], "size_px": row.sizes[0][0]}
    report = evaluate(
        family, recipe.grade_count, seen_count=recipe.grade_count // 2, sheet=run.folder / f"grade_{member}.png",
        note=note, **first,
    )  # fmt: skip
    report["vae"] = measure_vae(family.vae, recipe.grade_count, device=run.device, **first)
    report["other_sizes"] = {}
    for side, length in other_sizes(row):
        note(f"{side} px, {length} frames")
        size = {"frames": length, "size_px": side}
        count = max(1, min(recipe.grade_count // 4, recipe.grade_count * 64**2 // side**2))
        report["other_sizes"][f"{side}px_{length}f"] = {
            "vae": measure_vae(family.vae, count, device=run.device, **size),
            **{
                task: shares(trial(family, task, count, **size))
                for task in row.tasks if task != "t2i" or row.tasks == ("t2i",)
            },
        }  # fmt: skip
    return report


def break_member(run: Run, member: str, recipe: Recipe, out: Files) -> dict[str, object]:
    """Measure a member sound and broken."""
    family = load_family(out, run.device, member)
    return controls(
        family, recipe.gate_count, frames=family.variant.frames[0], size_px=family.variant.sizes[0][0],
        note=lambda what: run.log("controls", now=f"{member}: {what}"),
    )  # fmt: skip


def other_sizes(row: Variant) -> list[tuple[int, int]]:
    """Return the sides in px and lengths in frames that a variant is trained on besides its first of both."""
    sides = [side for side, _ in row.sizes[1:]]
    return [*((side, row.frames[0]) for side in sides), *((row.sizes[0][0], length) for length in row.frames[1:])]
