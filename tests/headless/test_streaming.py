"""The standalone host with a memory plan: weights that travel change no bit of a result."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from comfyui_kandinsky5.kandinsky_core.errors import BudgetError, KandinskyError
from comfyui_kandinsky5.kandinsky_core.io.convert import convert
from comfyui_kandinsky5.kandinsky_core.memory.budget import needed
from comfyui_kandinsky5.kandinsky_core.memory.estimate import sample_stage
from comfyui_kandinsky5.kandinsky_core.memory.plan import Plan
from comfyui_kandinsky5.kandinsky_core.memory.report import size
from comfyui_kandinsky5.kandinsky_core.sparse.nabla import Nabla, NablaSettings
from comfyui_kandinsky5.nodes import host_standalone, standalone_model, standalone_text
from comfyui_kandinsky5.nodes.host import Measured, SampleRequest
from comfyui_kandinsky5.nodes.memory import KEPT, job_of, memory_lines
from comfyui_kandinsky5.nodes.sampling import K5Sample

STREAMED = Plan(budget_bytes=1 << 30, resident_blocks=0, streams_text=True)
SIGMAS = torch.tensor([1.0, 0.8, 0.3, 0.0])


@pytest.fixture
def clip(host, models):
    folder = models / "text_encoders"
    return host.load_clip(folder / tiny.QWEN, folder / tiny.CLIP, tokenizer=None, dtype="auto")


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(0)
    return [
        [[torch.randn(1, 7, 3584, generator=generator), {"pooled_output": torch.randn(1, 768, generator=generator)}]]
        for _ in range(2)
    ]


def request(texts, batch=1):
    return SampleRequest(
        positive=texts[0], negative=texts[1], latent={"samples": torch.zeros(batch, 16, 2, 4, 4)}, seed=3,
        sigmas=SIGMAS, guidance=3.0,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("resident", [0, 1, 2])
def test_a_streamed_sample_is_the_resident_one(host, models, texts, dtype, resident):
    handle = host.load_model(models / "diffusion_models" / tiny.VIDEO, variant=None, dtype=dtype).model
    wanted = host.sample(handle, request(texts, batch=2))
    assert not host.streams
    got = host.sample(replace(handle, plan=replace(STREAMED, resident_blocks=resident)), request(texts, batch=2))
    assert torch.equal(got, wanted)
    assert bool(host.streams) == (resident < 2)


def test_modulation_weights_do_not_travel(host, models, texts):
    handle = host.load_model(models / "diffusion_models" / tiny.VIDEO, variant=None, dtype="fp32").model
    host.sample(replace(handle, plan=STREAMED), request(texts))
    (stream,) = host.streams
    spec = tiny.VIDEO_SPEC
    modulation = 4 * (spec.time_dim + 1) * spec.model_dim * (6 + 2 * 9)
    transformer = host._resident[1]
    blocks = (*transformer.text_transformer_blocks, *transformer.visual_transformer_blocks)
    everything = sum(parameter.nbytes for block in blocks for parameter in block.parameters())
    assert everything - modulation <= stream.pass_bytes < everything - modulation + 3 * 20 * 256
    # Three steps of two branches, and what was copied ahead for the evaluation that never came.
    assert 0 < stream.moved_bytes - 6 * stream.pass_bytes <= stream.pass_bytes


def test_a_streamed_prompt_is_the_resident_one(host, clip, monkeypatch):
    monkeypatch.setattr(host_standalone, "encode_cached", lambda cache, key, load, *given, **options: load().encode(
        *given, **options
    ))  # fmt: skip
    wanted = host.encode_text(clip, "a cat", template="video", max_tokens=32).conditioning
    got = host.encode_text(replace(clip, plan=STREAMED), "a cat", template="video", max_tokens=32).conditioning
    assert len(host.streams) == 2
    assert torch.equal(got[0][0], wanted[0][0])
    assert torch.equal(got[0][1]["pooled_output"], wanted[0][1]["pooled_output"])


def test_what_is_loaded_next_finds_no_stream_left(host, models, texts):
    handle = host.load_model(models / "diffusion_models" / tiny.VIDEO, variant=None, dtype="fp32").model
    wanted = host.sample(handle, request(texts))
    host.sample(replace(handle, plan=STREAMED), request(texts))
    (stream,), transformer = host.streams, host._resident[1]
    assert torch.equal(host.sample(handle, request(texts)), wanted)
    assert not host.streams and not stream.ring_bytes
    assert not any(block._forward_pre_hooks for block in transformer.visual_transformer_blocks)


def test_a_cancelled_sample_leaves_a_host_that_works(host, models, texts):
    handle = replace(
        host.load_model(models / "diffusion_models" / tiny.VIDEO, variant=None, dtype="fp32").model, plan=STREAMED
    )
    wanted = host.sample(handle, request(texts))

    def cancel(done, total):
        if done == 2:
            raise KeyboardInterrupt

    host.on_progress = cancel
    with pytest.raises(KeyboardInterrupt):
        host.sample(handle, request(texts))
    host.on_progress = None
    assert torch.equal(host.sample(handle, request(texts)), wanted)


def test_pieces_of_a_plan_reach_the_model_and_change_nothing_visible(host, models, texts):
    handle = host.load_model(models / "diffusion_models" / tiny.VIDEO, variant=None, dtype="fp32").model
    wanted = host.sample(handle, request(texts))
    plan = replace(STREAMED, hidden_pieces=3, head_groups=2)
    got = host.sample(replace(handle, plan=plan), request(texts))
    chosen = host._resident[1].visual_transformer_blocks[0].regime
    assert (chosen.hidden_pieces, chosen.head_groups) == (3, 2)
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("plan", [None, STREAMED])
def test_float16_has_a_float32_stream_and_modulation(host, models, texts, plan):
    loaded = host.load_model(models / "diffusion_models" / tiny.VIDEO, variant=None, dtype="fp16")
    assert "residual stream, modulation and norms are float32" in loaded.report
    exact = host.load_model(models / "diffusion_models" / tiny.VIDEO, variant=None, dtype="fp32").model
    wanted = host.sample(exact, request(texts))
    got = host.sample(replace(loaded.model, plan=plan), request(texts))
    assert 0 < (got - wanted).norm() <= 0.01 * wanted.norm()
    transformer = host._resident[1]
    assert transformer.visual_transformer_blocks[0].regime.dtype is torch.float16
    assert transformer.time_embeddings.in_layer.weight.dtype is torch.float32
    if plan is None:
        assert transformer.out_layer.out_layer.weight.dtype is torch.float16
        assert transformer.out_layer.modulation.out_layer.weight.dtype is torch.float32


def test_a_device_without_bf16_gets_float16_and_says_so(host, models, monkeypatch):
    monkeypatch.setattr(standalone_model, "has_bf16", lambda device: False)
    loaded = host.load_model(models / "diffusion_models" / tiny.VIDEO, variant=None, dtype="auto")
    assert loaded.model.dtype is torch.float16
    assert "does not compute in bfloat16" in loaded.report


def test_overflow_is_an_error_and_not_a_black_clip(host, models, texts):
    texts[0][0][0] *= 1e30
    handle = host.load_model(models / "diffusion_models" / tiny.VIDEO, variant=None, dtype="fp16").model
    with pytest.raises(KandinskyError, match=r"NaN or Inf in torch.float16. Load it with dtype bf16 or fp32"):
        host.sample(handle, request(texts))


@pytest.mark.parametrize("form", ["fp8", "gguf-Q8_0"])
def test_packed_weights_travel_packed(host, models, texts, tmp_path, form):
    packed = tmp_path / ("packed.gguf" if form.startswith("gguf") else "packed.safetensors")
    convert(models / "diffusion_models" / tiny.VIDEO, packed, form)
    handle = host.load_model(packed, variant=None, dtype="fp32").model
    wanted = host.sample(handle, request(texts))
    got = host.sample(replace(handle, plan=STREAMED), request(texts))
    assert torch.equal(got, wanted)
    (stream,) = host.streams
    packed_bytes = stream.pass_bytes
    plain = host.load_model(models / "diffusion_models" / tiny.VIDEO, variant=None, dtype="fp32").model
    host.sample(replace(plain, plan=STREAMED), request(texts))
    assert packed_bytes < host.streams[0].pass_bytes / 2


@pytest.mark.parametrize(("free", "streams"), [(0, 0), (1 << 20, 2), (1 << 40, 0)])
def test_a_text_encoder_that_does_not_fit_is_streamed(host, clip, monkeypatch, caplog, free, streams):
    monkeypatch.setattr(standalone_text, "free_bytes", lambda device: free)
    with caplog.at_level("INFO", logger="kandinsky5"):
        host.encode_text(clip, "a cat", template="video", max_tokens=32)
    assert len(host.streams) == streams
    assert ("its layers visit it one by one" in caplog.text) == bool(streams)


@pytest.fixture
def tight(host, models, texts, monkeypatch):
    """The model, and what it makes where all of it fits; afterwards its work fits and none of its blocks, and that
    only while nothing else is loaded."""
    handle = host.load_model(models / "diffusion_models" / tiny.VIDEO, variant=None, dtype="fp32").model
    wanted = host.sample(handle, request(texts))
    assert not host.streams and host.sampled_by(handle) is None
    job = job_of(host, handle, handle.variant, request(texts).latent, 3.0, 7)
    free = needed(sample_stage(job, Plan(budget_bytes=0, resident_blocks=0, hidden_pieces=16)))
    host.workplace(host.load_vae(models / "vae" / tiny.VIDEO_VAE, dtype="fp32"))
    monkeypatch.setattr(host_standalone, "free_bytes", lambda device: free if host._resident is None else 1)
    return handle, wanted, free


def test_a_model_that_does_not_fit_is_planned_for_and_says_so(host, texts, tight, caplog):
    handle, wanted, free = tight
    got = host.sample(handle, request(texts))
    assert len(host.streams) == 1
    assert "It runs by a memory plan, with the same result to rounding. Weights: fp32, 0 of 2 blocks" in caplog.text
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()  # pieces of the feed-forward sum in another order
    assert host.sampled_by(handle).resident_blocks == host.facts[""]["plan"]["resident_blocks"] == 0


def test_the_sampler_s_report_has_the_plan_that_was_made(host, texts, tight, monkeypatch):
    handle, _, free = tight
    latent = {"samples": torch.zeros(1, 16, 2, 4, 4)}
    report = K5Sample.execute(handle, *texts, latent, 3, 3, 3.0, 5.0, "euler", "auto", 1.0).result[1]
    assert "memory plan: Weights: fp32, 0 of 2 blocks stay on the device" in report
    monkeypatch.setattr(host, "_measured", Measured(1 << 20, with_weights=True))
    job = job_of(host, handle, handle.variant, latent, 3.0, 7)
    weights = size(sample_stage(job, host.sampled_by(handle)).weight_bytes)
    assert f"estimated {weights} of weights" in memory_lines(handle, handle.variant, latent, 3.0, 7)
    assert weights != size(sample_stage(job, Plan(budget_bytes=0)).weight_bytes)


def test_what_was_planned_stays_loaded_while_it_fits(host, texts, tight):
    handle, *_ = tight
    first = host.sample(handle, request(texts))
    loaded = host._resident[1]
    assert torch.equal(host.sample(handle, request(texts)), first)
    assert host._resident[1] is loaded
    with pytest.raises(BudgetError):
        host.sample(handle, request(texts, batch=64))


def test_where_what_is_loaded_counts_as_free_a_plan_follows_what_is_free_now(host, texts, tight, monkeypatch):
    """As on a GPU, whose cached memory a run can have again: whole, then planned, then whole."""
    handle, wanted, _ = tight
    monkeypatch.setattr(type(host), "is_processor", False)
    job = job_of(host, handle, handle.variant, request(texts).latent, 3.0, 7)
    free = needed(sample_stage(job, Plan(budget_bytes=0, resident_blocks=0, hidden_pieces=16)))
    found = []
    for room in (1 << 40, free, 1 << 40):
        monkeypatch.setattr(host_standalone, "free_bytes", lambda device, room=room: room)
        found.append((host.sample(handle, request(texts)), len(host.streams), host.sampled_by(handle) is None))
    assert [rest for _, *rest in found] == [[0, True], [1, False], [0, True]]
    assert torch.equal(found[0][0], wanted) and torch.equal(found[2][0], wanted)


def test_sparse_attention_is_planned_for_as_sparse(host, texts, tight, monkeypatch):
    handle, *_ = tight
    run = Nabla(NablaSettings(mode="on", min_tok=0), handle.variant)
    seen = []
    monkeypatch.setattr(host_standalone, "sample_stage", lambda job, plan: seen.append(job) or sample_stage(job, plan))
    monkeypatch.setattr(standalone_model, "load", None)
    latent = {"samples": torch.zeros(1, 16, 2, 32, 32)}
    for attention, kept in ((None, 1.0), (run, KEPT)):
        with pytest.raises((BudgetError, TypeError)):  # what does not fit, or would be loaded
            host.sample(replace(handle, attention=attention), replace(request(texts), latent=latent))
        assert seen[-1].kept == kept


def test_a_model_that_cannot_fit_is_refused_before_it_is_loaded(host, texts, tight, monkeypatch):
    handle, *_, free = tight
    monkeypatch.setattr(host_standalone, "free_bytes", lambda device: free // 2)
    monkeypatch.setattr(standalone_model, "load_crossdit", None)
    with pytest.raises(BudgetError, match=r"needs at least .* GB .*To try all the same, give a larger budget"):
        host.sample(handle, request(texts))
