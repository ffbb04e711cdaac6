"""The memory nodes without ComfyUI, on the nano model and on variants whose weights are not there."""

from __future__ import annotations

import re

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core import nano
from comfyui_kandinsky5.kandinsky_core.errors import BudgetError, KandinskyError
from comfyui_kandinsky5.kandinsky_core.io.convert import convert
from comfyui_kandinsky5.kandinsky_core.memory.budget import GB, PROFILES
from comfyui_kandinsky5.kandinsky_core.memory.estimate import precision_of
from comfyui_kandinsky5.kandinsky_core.memory.plan import Plan
from comfyui_kandinsky5.nodes import files
from comfyui_kandinsky5.nodes import host as door
from comfyui_kandinsky5.nodes.attention import K5Nabla
from comfyui_kandinsky5.nodes.host import Measured
from comfyui_kandinsky5.nodes.host_standalone import StandaloneHost
from comfyui_kandinsky5.nodes.loaders import K5LoadModel
from comfyui_kandinsky5.nodes.memory import K5MemoryEstimate, K5MemoryPlan, budget_bytes
from comfyui_kandinsky5.nodes.sampling import K5Sample

SIZES = {"width": 128, "height": 96, "length": 17, "batch_size": 1}
ATTENTION = {"attention": "auto", "kept": 0.25, "cfg": -1.0, "steps": 0}
ESTIMATE = SIZES | ATTENTION | {
    "variant": "lite_t2v_5s_sft", "precision": "bf16", "start_image": False, "budget": "12 GB", "custom_gb": 12.0,
}  # fmt: skip
PLAN = SIZES | ATTENTION | {
    "budget": "12 GB", "custom_gb": 12.0, "resident_blocks": -1, "prefetch": -1, "hidden_pieces": 0, "head_groups": 0,
    "stream_text": "auto", "decode_mode": "auto", "measure": False,
}  # fmt: skip


@pytest.fixture
def host(monkeypatch):
    monkeypatch.setattr(door, "_current", [])
    door.install(StandaloneHost(device="cpu"))
    return door.host()


@pytest.fixture
def model(host):
    return K5LoadModel.execute(files.built_in("model"), "auto", "auto")[0]


def estimate(**changes) -> str:
    return K5MemoryEstimate.execute(**(ESTIMATE | changes))[0]


def plan(model, **changes):
    return K5MemoryPlan.execute(model, **(PLAN | changes))


def sampled(model, seed: int = 0, rows_columns=(12, 16)):
    generator = torch.Generator().manual_seed(seed)
    prompts = [
        [[torch.randn(1, tokens, 96, generator=generator), {"pooled_output": torch.randn(1, 64, generator=generator)}]]
        for tokens in (9, 2)
    ]
    return K5Sample.execute(
        model, *prompts, {"samples": torch.zeros(1, 16, 5, *rows_columns)}, seed=3, steps=2, cfg=3.0, shift=5.0,
        sampler_name="euler", first_frame="auto", denoise=1.0,
    )  # fmt: skip


def test_an_estimate_needs_no_weights(host):
    report = estimate(width=768, height=512, length=121)
    assert "Video Lite 2B" in report and "With 11.0 GB" in report
    assert all(f"\n{name}: fits" in report for name in PROFILES)


def test_a_connected_model_brings_variant_precision_and_attention(model):
    report = estimate(model=model)
    assert "Nano" in report and "fp32 weights, dense attention" in report
    sparse = K5Nabla.execute(
        model, attention="on", P=0.6, wT=3, wH=1, wW=1, kernel="auto", dense_first_steps=0, dense_last_steps=0,
        dense_first_blocks=0, dense_last_blocks=0, min_tokens=0,
    )[0]  # fmt: skip
    assert "block-sparse attention keeping 25%" in estimate(model=sparse)


def test_auto_attention_is_what_was_trained(host):
    assert "keeping 40%" in estimate(variant="lite_t2v_10s_sft", kept=0.4)
    assert "dense attention" in estimate(variant="lite_t2v_10s_sft", attention="dense")


def test_budgets(host, monkeypatch):
    assert budget_bytes("8 GB", 99) == PROFILES["8 GB"]
    assert budget_bytes("custom", 5.5) == 5.5 * GB
    monkeypatch.setattr(host, "free_bytes", lambda: 3 * GB)
    assert budget_bytes("auto", 99) == 3 * GB
    monkeypatch.setattr(host, "free_bytes", lambda: 0)
    with pytest.raises(KandinskyError, match="Choose a budget"):
        budget_bytes("auto", 99)


def test_a_plan_travels_with_the_model(host, model):
    planned, value, report, _ = plan(model, resident_blocks=1, hidden_pieces=3).args
    assert isinstance(value, Plan) and host.plan_of(planned) == value and host.plan_of(model) is None
    assert (value.resident_blocks, value.hidden_pieces) == (1, 3)
    assert "1 of 4 blocks stay on the device" in report and "at least 3 piece(s)" in report


def test_the_text_encoder_gets_the_plan_too(host, model):
    towers = ((files.TEXT_ENCODER, "text_encoder"), (files.CLIP_ENCODER, "clip"))
    paths = [files.locate(kind, files.built_in(name)) for kind, name in towers]
    clip = host.load_clip(*paths, tokenizer=None, dtype="auto")
    assert plan(model, clip=clip, stream_text="on")[3].plan.streams_text
    assert plan(model)[3] is None and clip.plan is None


def test_sizes_come_from_a_connected_latent(model):
    latent = {"samples": torch.zeros(2, 16, 3, 12, 20)}
    assert plan(model, latent=latent)[1].decode.latent_thw == (3, 12, 20)
    assert plan(model)[1].decode.latent_thw == (5, 12, 16)


def test_a_budget_that_nothing_fits_is_refused_with_the_least_need(model):
    with pytest.raises(BudgetError, match="needs at least"):
        plan(model, budget="custom", custom_gb=0.001)


def test_a_planned_run_gives_what_the_whole_one_gives(model):
    whole = sampled(model)[0]["samples"]
    streamed = sampled(plan(model, resident_blocks=1)[0])[0]["samples"]
    assert torch.equal(streamed, whole)
    in_pieces = sampled(plan(model, hidden_pieces=3, head_groups=2)[0])[0]["samples"]
    torch.testing.assert_close(in_pieces, whole, atol=1e-4, rtol=1e-4)


def test_the_sampler_shows_what_was_measured_beside_the_estimate(model):
    report = sampled(plan(model, measure=True)[0])[1]
    line = re.search(r"memory: ([\d.]+) MB of live tensors at the peak; estimated ([\d.]+) MB", report)
    measured, estimated = map(float, line.groups())
    assert measured > 0 and estimated == pytest.approx(measured, rel=0.1)


def test_a_size_that_no_estimate_takes_does_not_cost_the_sample(host, model, monkeypatch):
    # ComfyUI pads such a latent and reports a peak; this host refuses it before it samples.
    monkeypatch.setattr(host, "measured", lambda: Measured(5 * GB, with_weights=True))
    monkeypatch.setattr(host, "sample", lambda model, request: request.latent["samples"] + 1)
    samples, report = sampled(model, rows_columns=(7, 9)).args
    assert samples["samples"].shape[-2:] == (7, 9)
    assert "memory: 5.00 GB at the peak" in report and "estimated" not in report


def test_packed_weights_are_estimated_as_packed(host, tmp_path):
    for to, precision in (("fp8", "fp8"), ("gguf-Q8_0", "q8_0")):
        target = tmp_path / f"nano_{to}.{'gguf' if to.startswith('gguf') else 'safetensors'}"
        convert(nano.files()["model"], target, to)
        assert host.weights_of(host.load_model(target, variant=None, dtype="bf16").model) == precision
    assert precision_of(["Q4_K", "Q6_K"]) == precision_of(["NF4"]) == "q4_k"
    assert precision_of(["Q6_K"]) == precision_of(["Q8_0", "Q4_K"]) == "q8_0"


def test_on_a_processor_nothing_is_measured_unless_asked(model):
    assert "memory:" not in sampled(plan(model)[0])[1]
