"""The shipped weights: what they are, how large, and that they still do what docs/nano.md says."""

from __future__ import annotations

import json
import random

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.io.checkpoint import open_checkpoint
from comfyui_kandinsky5.kandinsky_core.io.identity import identify
from comfyui_kandinsky5.kandinsky_core.nano import WEIGHTS, files
from comfyui_kandinsky5.kandinsky_core.nano.autoencoder import psnr
from comfyui_kandinsky5.kandinsky_core.nano.caption import caption
from comfyui_kandinsky5.kandinsky_core.nano.draw import draw, scenes
from comfyui_kandinsky5.kandinsky_core.nano.evaluate import (
    generate,
    graded,
    load_family,
    measure_vae,
    pixels,
    reconstruct,
    summary,
)
from comfyui_kandinsky5.kandinsky_core.variants import NANO_VAE, NANO_VIDEO

HELD_OUT_SEED = 77_001
COUNT = 24


@pytest.fixture(scope="module")
def family():
    """The shipped models."""
    return load_family(files(), torch.device("cpu"))


@pytest.fixture(scope="module")
def asked():
    """Held-out scenes with their prompts."""
    rng = random.Random("gate")
    return [(item, caption(item, rng)) for item in scenes(HELD_OUT_SEED, COUNT, unseen=True)]


def test_all_files_together_are_small():
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 25_000_000


def test_the_files_say_what_they_are():
    paths = files()
    model = open_checkpoint(paths["model"])
    found = identify(model)
    assert found.variant.name == "nano_video" and found.certain and found.spec == NANO_VIDEO
    assert all(info.dtype == "F16" for info in model.tensors.values())
    vae = open_checkpoint(paths["vae"])
    assert json.loads(vae.metadata["kandinsky5.vae"])["scaling_factor"] == NANO_VAE.scaling_factor
    for checkpoint in (model, vae):
        assert json.loads(checkpoint.metadata["kandinsky5.recipe"])["seed"] == 1


def test_the_autoencoder_reconstructs_unseen_clips(family):
    measured = measure_vae(family.vae, 32)
    assert measured["psnr_mean_db"] >= 25
    assert all(row["share"] >= 0.9 for row in measured["grades"].values()), measured["grades"]


def test_latents_have_about_unit_scale(family):
    real = torch.stack([draw(item) for item in scenes(HELD_OUT_SEED, 8)])
    with torch.no_grad():
        z = family.vae.encode(pixels(real)).mean * family.scale
    assert z.square().mean().sqrt().item() == pytest.approx(1, abs=0.15)


def test_video_follows_color_and_background(family, asked):
    made = generate(family, [prompt for _, prompt in asked])
    found = summary(graded(made, [item for item, _ in asked]))
    assert found["color"]["share"] >= 0.9 and found["background"]["share"] >= 0.9, found


def test_image_to_video_keeps_the_first_frame(family, asked):
    first = torch.stack([draw(item)[0] for item, _ in asked[:8]])
    made = generate(family, [prompt for _, prompt in asked[:8]], images_BHWC=first)
    kept = psnr(pixels(made[:, :1]), pixels(reconstruct(family.vae, first[:, None])))
    assert kept.mean() >= 30
