"""Counted bytes are those of the real graph, whole runs on the meta device, where nothing is computed."""

from __future__ import annotations

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.memory.tracker import Tracker
from comfyui_kandinsky5.kandinsky_core.vae import stream
from comfyui_kandinsky5.kandinsky_core.vae.decoding import Decoding, exact_statistics
from comfyui_kandinsky5.kandinsky_core.vae.encoding import encode_with, exact_encode_statistics
from comfyui_kandinsky5.kandinsky_core.vae.flux import FluxVAE
from comfyui_kandinsky5.kandinsky_core.vae.hunyuan import HunyuanVideoVAE
from comfyui_kandinsky5.kandinsky_core.vae.plan import (
    LATE_TILE,
    REFERENCE,
    SINGLE_PASS,
    STREAM,
    decode_plans,
    encode_plans,
    plan_decode,
    plan_encode,
)
from comfyui_kandinsky5.kandinsky_core.variants import FLUX_VAE, HUNYUAN_VAE, VARIANTS

META = torch.device("meta")
SPECS = {"published": HUNYUAN_VAE, "nano": VARIANTS["nano_video"].vae}
THW = (6, 24, 40)
WITHIN = 0.05


@pytest.fixture(scope="module")
def case(request):
    """An autoencoder without values, a latent and its statistics."""
    vae = HunyuanVideoVAE(SPECS[request.param], device=META, dtype=torch.float16)
    z = torch.empty(1, 16, *THW, device=META, dtype=torch.float16)
    return vae, z, exact_statistics(vae, z)


def measured(vae, z, plan, statistics):
    with Tracker("meta") as tracker:
        Decoding(vae, z, plan, on_piece=lambda piece: None, statistics=statistics).run()
    return tracker.peak_bytes


@pytest.mark.parametrize(
    ("case", "mode", "asked"),
    [
        ("published", STREAM, {"chunk": 2}),
        ("published", LATE_TILE, {"chunk": 2, "tiles": (1, 2)}),
        ("nano", STREAM, {"chunk": 1}),
        ("nano", STREAM, {"chunk": 2, "caches_on_host": True}),
        ("nano", LATE_TILE, {"chunk": 1, "tiles": (2, 2)}),
        ("nano", REFERENCE, {"tiles": (1, 1)}),
        ("nano", REFERENCE, {"tiles": (1, 2)}),
        ("nano", SINGLE_PASS, {"chunk": 2}),
    ],
    indirect=["case"],
)
def test_decoding_takes_the_bytes_its_plan_says(case, mode, asked, monkeypatch):
    vae, z, statistics = case
    # Nothing can be copied from the meta device; where it lies is all that counts.
    monkeypatch.setattr(stream, "parked", lambda caches, _: tuple(torch.empty(x.shape, dtype=x.dtype) for x in caches))
    plan = next(
        plan
        for plan in decode_plans(vae.spec, THW, 2, mode, asked.get("tiles"))
        if all(getattr(plan, name) == value for name, value in asked.items())
    )
    assert plan.peak_bytes == pytest.approx(measured(vae, z, plan, statistics), rel=WITHIN)


@pytest.mark.parametrize(("case", "latents"), [("published", 1), ("published", 5), ("nano", 5)], indirect=["case"])
def test_a_short_clip_is_one_pass_that_remembers_nothing(case, latents):
    vae, _, _ = case
    z = torch.empty(1, 16, latents, 64, 96, device=META, dtype=torch.float16)
    plan = plan_decode(vae.spec, tuple(z.shape[2:]), free_bytes=None, itemsize=2)
    assert (plan.mode, plan.tiles) == (REFERENCE, (1, 1))
    assert plan.peak_bytes == pytest.approx(measured(vae, z, plan, None), rel=WITHIN)


@pytest.mark.parametrize(
    ("case", "latents", "mode", "chunk"),
    [
        ("published", 6, STREAM, 2),
        ("published", 6, REFERENCE, 5),
        ("nano", 6, STREAM, 1),
        ("nano", 5, STREAM, 5),
        ("nano", 6, REFERENCE, 5),
    ],
    indirect=["case"],
)
def test_encoding_takes_the_bytes_its_plan_says(case, latents, mode, chunk):
    vae, z, _ = case
    x = torch.empty(1, 3, 4 * latents - 3, 8 * THW[1], 8 * THW[2], device=META, dtype=torch.float16)
    latent_thw = (latents, *THW[1:])
    plan = next(plan for plan in encode_plans(vae.spec, latent_thw, 2, mode) if plan.chunk == chunk)
    statistics = exact_encode_statistics(vae, x) if plan.chunk < latents else None
    with Tracker("meta") as tracker:
        encode_with(vae, x, plan, statistics=statistics)
    assert plan.peak_bytes == pytest.approx(tracker.peak_bytes, rel=WITHIN)


def test_the_image_autoencoder_takes_the_bytes_its_plans_say():
    vae = FluxVAE(FLUX_VAE, device=META, dtype=torch.bfloat16)
    z = torch.empty(1, 16, 40, 56, device=META, dtype=torch.bfloat16)
    x = torch.empty(1, 3, 320, 448, device=META, dtype=torch.bfloat16)
    for run, make in ((lambda: vae.decode(z), plan_decode), (lambda: vae.encode(x), plan_encode)):
        with Tracker("meta") as tracker, torch.no_grad():
            run()
        plan = make(FLUX_VAE, (1, 40, 56), free_bytes=None, itemsize=2)
        assert plan.peak_bytes == pytest.approx(tracker.peak_bytes, rel=WITHIN)
