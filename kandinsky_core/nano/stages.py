"""The stages of the recipe: what each makes from what, and what it must reach."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from ..errors import KandinskyError
from ..io.checkpoint import save_checkpoint
from ..io.identity import spec_metadata
from ..io.load import load_vae
from ..text.encoder import TextEncoder, load_text_encoder
from ..train.data import Bucket, Prompts
from ..variants import Variant, variant
from .autoencoder import (
    basis_facts,
    image_basis,
    recipe_facts,
    save_vae,
    train_image_vae,
    train_video_vae,
    video_basis,
)
from .codec import ScaledVAE
from .corpus import make_bucket
from .evaluate import evaluate, measure_vae
from .family import TEXT, load_family
from .gate import CONTROLS, LEAST_READING, LIMITS, above_chance, gate
from .latent_basis import LatentBasis
from .recipe import Course, Recipe
from .reports import controls_stage, grade_stage
from .run import Files, MissingError, Run, hashed, read_json, write_json
from .text import train_text
from .transformer import Lesson, train_transformer

RECIPE_KEY = "kandinsky5.recipe"  # safetensors metadata: JSON of what the weights were trained with
VIDEO, IMAGE, EDIT = variant("nano_video"), variant("nano_image"), variant("nano_edit")

STRAY = 0.15  # share of text-to-video clips that begin with a stray frame


class GateError(KandinskyError):
    """A stage has not reached what the next ones or the users need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One part of the recipe."""

    work: Callable[[Run, Recipe, Files], None]
    needs: tuple[str, ...] = ()
    gate: Callable[[Run, Recipe, Files], list[str]] = lambda *_: []


def facts(run: Run, **numbers: object) -> dict[str, str]:
    """Return the recipe entry of a weights file's metadata."""
    return {RECIPE_KEY: json.dumps({"seed": run.seed, **numbers})}


def vae_stage(run: Run, recipe: Recipe, out: Files) -> None:
    """Train the video autoencoder."""
    save_vae(out["vae"], train_video_vae(run, VIDEO.vae, recipe.vae), facts(run, **recipe_facts(recipe.vae)))


def image_vae_stage(run: Run, recipe: Recipe, out: Files) -> None:
    """Train the image autoencoder."""
    vae = train_image_vae(run, IMAGE.vae, recipe.image_vae)
    save_vae(out["image_vae"], vae, facts(run, **recipe_facts(recipe.image_vae)))


def text_stage(run: Run, recipe: Recipe, out: Files) -> None:
    """Train tokenizers and text encoders."""
    right = train_text(run, (out["text_encoder"], out["clip"]), steps=recipe.text_steps)
    write_json(run.folder / "text.json", right)


def text_encoder(run: Run, out: Files) -> TextEncoder:
    """Load the text encoders of the text stage."""
    return load_text_encoder(out["text_encoder"], out["clip"], dtype=torch.float32, device=run.device)


def data_file(run: Run, name: str) -> Path:
    """Return where the training data of a transformer lies."""
    return run.folder / f"latents_{name}.pt"


def latents_stage(run: Run, recipe: Recipe, out: Files) -> None:
    """Draw the transformers' data and encode it with the closed-form bases, which need no trained autoencoder."""
    for at, (name, course) in enumerate(courses(recipe).items()):
        path = data_file(run, name)
        identity = data_identity(run, course, out)
        if run.resume and path.exists():
            run.check(path, torch.load(path, mmap=True, weights_only=True).get("identity", {}), identity)
            continue
        encoder = text_encoder(run, out)
        basis = member_basis(run, name)
        made = [
            make_bucket(run, basis, encoder, part, 1000 * run.seed + 100 * at + index)
            for index, part in enumerate(course.slices)
        ]
        torch.save({"identity": identity, "buckets": [asdict(bucket) for bucket in made]}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
        run.log("latents", made=name, size_bytes=path.stat().st_size)


def data_identity(run: Run, course: Course, out: Files) -> dict[str, object]:
    """Return what the training data of a course is made from: its slices and the text encoders' weights."""
    encoders = hashed(out[kind] for kind in TEXT)
    return run.identity(slices=[asdict(part) for part in course.slices], text_encoders=encoders, basis=basis_facts())


def member_basis(run: Run, member: str) -> LatentBasis:
    """Fit the basis that a member's latents are in."""
    row = variant(f"nano_{member}")
    return (video_basis if row.vae.kind == "hunyuan" else image_basis)(run, row.vae).to(run.device)


def courses(recipe: Recipe) -> dict[str, Course]:
    """Return the course of each transformer."""
    return {"video": recipe.video, "image": recipe.image, "edit": recipe.edit}


def read_data(run: Run, course: Course, name: str, out: Files) -> list[Bucket]:
    """Read what the latents stage wrote; raises `MissingError` without it and `ResumeError` for another recipe's."""
    path = data_file(run, name)
    if not path.exists():
        raise MissingError(f"{path} is missing. Run --stage latents with this --out first.")
    found = torch.load(path, map_location=run.device, weights_only=True)
    run.check(path, found.get("identity", {}), data_identity(run, course, out))
    return [Bucket(**{**fields, "prompts": Prompts(**fields["prompts"])}) for fields in found["buckets"]]


def train_member(run: Run, stage: str, row: Variant, recipe: Recipe, out: Files, member: str, path: Path) -> None:
    """Train one transformer and save it in float16, as it ships."""
    course = courses(recipe)[member]
    data = read_data(run, course, member, out)
    lessons = []
    for share in course.shares:
        part = course.slices[share.slice]
        lessons.append(
            Lesson(
                bucket=data[share.slice], batch=part.batch, weight=share.weight, begin=share.begin,
                known_frames=int(part.kind == "continuation"), stray=STRAY if part.kind == "clip" else 0.0,
            )
        )  # fmt: skip
    model = train_transformer(
        run, stage, row, lessons, steps=course.steps, lr=course.lr, shift=course.shift,
        recipe={"course": asdict(course), "stray": STRAY, "data": data_identity(run, course, out)},
    )  # fmt: skip
    halves = {name: value.detach().cpu().half() for name, value in model.state_dict().items()}
    save_checkpoint(path, halves, {**spec_metadata(row), **facts(run, **asdict(course))})


def dit_stage(run: Run, recipe: Recipe, out: Files) -> None:
    """Train the video transformer."""
    train_member(run, "dit", VIDEO, recipe, out, "video", out["model"])


def image_stage(run: Run, recipe: Recipe, out: Files) -> None:
    """Train the text-to-image transformer."""
    train_member(run, "image", IMAGE, recipe, out, "image", out["image_model"])


def edit_stage(run: Run, recipe: Recipe, out: Files) -> None:
    """Train the editing transformer."""
    train_member(run, "edit", EDIT, recipe, out, "edit", out["edit_model"])


def measured_vae(run: Run, recipe: Recipe, out: Files, *, member: str) -> list[str]:
    """Hold an autoencoder against its limits."""
    row, kind = (VIDEO, "vae") if member == "video" else (IMAGE, "image_vae")
    vae = load_vae(out[kind], dtype=torch.float32, device=run.device).vae.eval()
    found = measure_vae(
        ScaledVAE(vae), recipe.gate_count, size_px=row.sizes[0][0], frames=row.frames[0], device=run.device
    )
    run.log(kind, measured=found)
    return gate({member: {"vae": found}}, f"{member}/vae")


def measured_member(run: Run, recipe: Recipe, out: Files, *, member: str) -> list[str]:
    """Hold a transformer against its limits; the basis stands in for an autoencoder that may still be training."""
    family = load_family(out, run.device, member, codec=member_basis(run, member))
    row = family.variant
    limited = {tuple(path.split("/")[:2]) for path in LIMITS}
    tasks = [task for task in (*row.tasks, "continuation") if (member, task) in limited]
    found = evaluate(
        family, recipe.grade_count, seen_count=0, frames=row.frames[0], size_px=row.sizes[0][0], tasks=tasks,
        note=lambda what: run.log(member, now=what),
    )  # fmt: skip
    run.log(member, measured=found)
    return [failure for task in tasks for failure in gate({member: found}, f"{member}/{task}")]


def graded(run: Run, recipe: Recipe, out: Files) -> list[str]:  # noqa: ARG001
    """Hold the finished report against its limits."""
    return gate(read_json(run.folder / "grade.json"))


def controlled(run: Run, recipe: Recipe, out: Files) -> list[str]:  # noqa: ARG001
    """Hold what the breaks cost against its limits, and shuffled prompts against chance."""
    report = read_json(run.folder / "controls.json")
    return gate(report, limits=CONTROLS) + above_chance(report)


def understood(run: Run, recipe: Recipe, out: Files) -> list[str]:  # noqa: ARG001
    """Hold what the text encoders read in held-out prompts against its limit."""
    right = read_json(run.folder / "text.json")
    return [
        f"{name} is read right in {share} of the prompts; at least {LEAST_READING} is needed"
        for name, share in right.items() if not share >= LEAST_READING
    ]  # fmt: skip


ALL_TRAINED = ("vae", "image_vae", "dit", "image", "edit")
# In the order of their start: the longest chain first, the rest beside it.
STAGES = {
    "text": Stage(work=text_stage, gate=understood),
    "latents": Stage(work=latents_stage, needs=("text",)),
    "dit": Stage(work=dit_stage, needs=("latents",), gate=partial(measured_member, member="video")),
    "vae": Stage(work=vae_stage, gate=partial(measured_vae, member="video")),
    "image_vae": Stage(work=image_vae_stage, gate=partial(measured_vae, member="image")),
    "image": Stage(work=image_stage, needs=("latents",), gate=partial(measured_member, member="image")),
    "edit": Stage(work=edit_stage, needs=("latents",), gate=partial(measured_member, member="edit")),
    "grade": Stage(work=grade_stage, needs=ALL_TRAINED, gate=graded),
    "controls": Stage(work=controls_stage, needs=ALL_TRAINED, gate=controlled),
}
