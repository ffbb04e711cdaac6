"""The shipped weights: what they are, how large, and that they still do what docs/nano.md says."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.io.checkpoint import open_checkpoint
from comfyui_kandinsky5.kandinsky_core.io.identity import identify
from comfyui_kandinsky5.kandinsky_core.nano import WEIGHTS, files
from comfyui_kandinsky5.kandinsky_core.nano.autoencoder import recipe_facts
from comfyui_kandinsky5.kandinsky_core.nano.codec import pixels, reconstruct
from comfyui_kandinsky5.kandinsky_core.nano.draw import draw, scenes
from comfyui_kandinsky5.kandinsky_core.nano.evaluate import measure_vae
from comfyui_kandinsky5.kandinsky_core.nano.family import MEMBERS, load_family
from comfyui_kandinsky5.kandinsky_core.nano.recipe import RECIPE
from comfyui_kandinsky5.kandinsky_core.nano.score import decibels
from comfyui_kandinsky5.kandinsky_core.nano.trial import shares, trial
from comfyui_kandinsky5.kandinsky_core.variants import VAESpec, variant

COUNT = 32
# Task and (side in px, frames, how many) -> least shares. docs/nano.md has the measured ones; with so few prompts these
# are about three standard errors below what the recipe asks for.
LEAST = {
    ("video", "t2v", (64, 17, COUNT)): {"color": 0.85, "background": 0.85, "shape": 0.75, "motion": 0.75, "all": 0.6},
    ("video", "t2v", (128, 17, 16)): {"color": 0.8, "background": 0.8, "motion": 0.5},
    ("video", "t2v", (256, 17, 2)): {"color": 0.5, "background": 0.5},
    ("video", "t2v", (64, 49, 8)): {"color": 0.7, "background": 0.7, "motion": 0.5},
    ("video", "i2v", (64, 17, COUNT)): {"motion": 0.75, "identity": 0.85},
    ("video", "t2i", (64, 1, COUNT)): {"color": 0.75, "shape": 0.75},
    ("image", "t2i", (128, 1, COUNT)): {"color": 0.75, "shape": 0.75},
    ("edit", "i2i", (128, 1, COUNT)): {"asked": 0.6, "kept": 0.6},
}


@pytest.fixture(scope="module")
def families():
    """The shipped models, each loaded once."""
    return {member: load_family(files(), torch.device("cpu"), member) for member in MEMBERS}


def test_all_files_are_there_and_small():
    assert all(path.exists() for path in files().values())
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 40_000_000


@pytest.mark.parametrize("member", MEMBERS)
def test_the_files_say_what_they_are(member):
    row = variant(f"nano_{member}")
    model, vae = (open_checkpoint(files()[kind]) for kind in MEMBERS[member])
    found = identify(model)
    assert found.variant.name == row.name and found.certain and found.spec == row.spec
    assert all(info.dtype == "F16" for info in model.tensors.values())
    course = {"video": RECIPE.video, "image": RECIPE.image, "edit": RECIPE.edit}[member]
    schedule = RECIPE.vae if row.vae.kind == "hunyuan" else RECIPE.image_vae
    assert VAESpec(**as_tuples(json.loads(vae.metadata["kandinsky5.vae"]))) == row.vae
    for checkpoint, recipe in ((model, asdict(course)), (vae, recipe_facts(schedule))):
        made_by = json.loads(checkpoint.metadata["kandinsky5.recipe"])
        assert made_by.pop("seed") == 1
        assert made_by == json.loads(json.dumps(recipe))


def as_tuples(fields):
    """Lists of JSON as the tuples they were."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


@pytest.mark.parametrize(("member", "frames"), [("video", 17), ("image", 1)])
def test_the_autoencoder_reconstructs_unseen_pictures(families, member, frames):
    measured = measure_vae(families[member].vae, COUNT, frames=frames, size_px=families[member].variant.sizes[0][0])
    assert measured["psnr_mean_db"] >= 27.5
    assert measured["grades"]["all"]["share"] >= 0.85, measured["grades"]


@pytest.mark.parametrize("member", ["video", "image"])
def test_latents_have_about_unit_scale(families, member):
    frames = families[member].variant.frames[0]
    real = torch.stack([draw(item, frames=frames, size_px=128) for item in scenes(77_001, 8)])
    with torch.no_grad():
        z = families[member].vae.encode(pixels(real))
    assert z.square().mean().sqrt().item() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(("member", "task", "size"), LEAST)
def test_every_task_does_what_is_asked(families, member, task, size):
    family = families[member]
    size_px, frames, count = size
    found = trial(family, task, count, size_px=size_px, frames=frames)
    measured = shares(found)
    missed = {
        name: measured[name] for name, least in LEAST[member, task, size].items() if measured[name]["share"] < least
    }
    assert not missed
    if task == "i2v":
        own = reconstruct(family.vae, found.real_BTHWC[:, :1])
        assert decibels(found.made_BTHWC[:, :1], own)["psnr_mean_db"] >= 30
