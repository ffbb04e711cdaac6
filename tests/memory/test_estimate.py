"""The estimate against what the tracker counts, stage by stage, and the laws it keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core import nano
from comfyui_kandinsky5.kandinsky_core.memory.activation import Forward
from comfyui_kandinsky5.kandinsky_core.memory.estimate import (
    DECODE,
    ENCODE,
    PRECISIONS,
    SAMPLE,
    TEXT,
    Job,
    decode_plan,
    decode_stage,
    encode_stage,
    estimate,
    sample_stage,
    text_stage,
)
from comfyui_kandinsky5.kandinsky_core.memory.plan import Plan
from comfyui_kandinsky5.kandinsky_core.memory.sparsity import sparse_bytes
from comfyui_kandinsky5.kandinsky_core.memory.text_tower import encode_bytes
from comfyui_kandinsky5.kandinsky_core.memory.tracker import Tracker
from comfyui_kandinsky5.kandinsky_core.model import CrossDiT, Regime, dense
from comfyui_kandinsky5.kandinsky_core.sampling import TextCondition, guide, sample, timesteps, velocity_of
from comfyui_kandinsky5.kandinsky_core.shapes import VideoShape
from comfyui_kandinsky5.kandinsky_core.sparse.nabla import Nabla, NablaSettings, options
from comfyui_kandinsky5.kandinsky_core.text import load_text_encoder
from comfyui_kandinsky5.kandinsky_core.text.templates import get_template
from comfyui_kandinsky5.kandinsky_core.vae.decoding import Decoding
from comfyui_kandinsky5.kandinsky_core.vae.flux import FluxVAE
from comfyui_kandinsky5.kandinsky_core.vae.hunyuan import HunyuanVideoVAE
from comfyui_kandinsky5.kandinsky_core.vae.plan import AUTO, STREAM, plan_decode
from comfyui_kandinsky5.kandinsky_core.variants import VARIANTS, Variant
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

ROOMY = Plan(budget_bytes=10**13)
WITHIN = 0.1


def shape(width: int, height: int, frames: int = 1) -> VideoShape:
    return VideoShape(width_px=width, height_px=height, frames=frames)


def one_block(name: str, blocks: int = 1) -> Variant:
    row = VARIANTS[name]
    return replace(row, spec=replace(row.spec, num_visual_blocks=blocks))


def sampled_bytes(job: Job, device: str, dtype: torch.dtype) -> int:
    """Peak of two steps of the sampler, as the host without ComfyUI runs it."""
    row, spec = job.row, job.row.spec
    model = CrossDiT(spec, device=device, dtype=dtype).eval()
    prompts = [
        TextCondition(
            torch.zeros(1, job.tokens, spec.in_text_dim, device=device),
            torch.zeros(1, spec.in_text_dim2, device=device),
        )
        for _ in range(job.passes)
    ]
    velocities = [velocity_of(model, prompt, dtype=dtype, rope_scale=row.rope_scale) for prompt in prompts]
    latent = (job.batch, spec.out_visual_dim, *job.shape.latent_thw)

    def run() -> None:
        start = torch.zeros(latent, device=device)
        velocity = guide(velocities[0], velocities[1] if job.passes > 1 else None, row.guidance)
        sample(velocity, torch.zeros(latent, device=device), timesteps(3, row.shift), start_BCTHW=start)

    with torch.no_grad(), Tracker() as tracker:
        run()
    return tracker.peak_bytes


FULL_SIZE = [
    *(("lite_t2v_5s_sft", size) for size in ((768, 512, 121), (512, 512, 61), (768, 512, 241))),
    *(("lite_t2i", size) for size in ((1024, 1024, 1), (1408, 640, 1), (512, 512, 1))),
    *(("pro_t2v_5s_sd", size) for size in ((768, 512, 121), (512, 512, 17), (1280, 768, 121))),
]


@pytest.mark.parametrize(("name", "size"), FULL_SIZE)
def test_full_size_blocks_sample_in_the_estimated_memory(name, size):
    """On the meta device, so with a device's pieces; every tensor that would be alive is counted."""
    job = Job(row=one_block(name), shape=shape(*size))
    wanted = sampled_bytes(job, "meta", torch.bfloat16)
    assert sample_stage(job, ROOMY).work_bytes == pytest.approx(wanted, rel=WITHIN)


@pytest.mark.parametrize("changes", [{"batch": 2}, {"guidance": 1.0}, {"precision": "fp32"}])
def test_batch_guidance_and_precision_count_as_they_do(changes):
    job = Job(row=one_block("lite_t2v_5s_sft", blocks=2), shape=shape(512, 512, 49), **changes)
    dtype = torch.float32 if changes.get("precision") == "fp32" else torch.bfloat16
    wanted = sampled_bytes(job, "meta", dtype)
    assert sample_stage(job, ROOMY).work_bytes == pytest.approx(wanted, rel=WITHIN)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("size", [(64, 64, 17), (128, 128, 17), (256, 256, 17)])
def test_nano_samples_in_the_estimated_memory(size, precision):
    job = Job(row=VARIANTS["nano_video"], shape=shape(*size), precision=precision, text_tok=40, is_cpu=True)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    assert sample_stage(job, ROOMY).work_bytes == pytest.approx(sampled_bytes(job, "cpu", dtype), rel=WITHIN)


@pytest.mark.parametrize("prompt", ["A red circle.", "A red circle moves right. " * 12])
def test_nano_encodes_a_prompt_in_the_estimated_memory(prompt):
    """Both towers as they run, template and all."""
    found = nano.files()
    encoder = load_text_encoder(found["text_encoder"], found["clip"], dtype=torch.float32, device="cpu")
    positions = len(encoder.qwen_tokenizer.tokenize(prompt, get_template("video"), 256, []).ids)
    with Tracker() as tracker:
        encoder.encode(prompt, "video")
    wanted = encode_bytes(VARIANTS["nano_video"].text, positions, itemsize=4)
    assert wanted == pytest.approx(tracker.peak_bytes, rel=WITHIN)


@pytest.mark.parametrize("tokens", [40, 256, 895])
def test_a_prompt_is_encoded_in_the_estimated_memory(tokens):
    """Two full-size layers of Qwen2.5-VL's text tower."""
    from transformers import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    row = VARIANTS["lite_t2v_5s_sft"]
    qwen = row.text.qwen
    with torch.device("meta"):
        tower = Qwen2_5_VLTextModel(
            Qwen2_5_VLTextConfig(
                vocab_size=qwen.vocabulary, hidden_size=qwen.width, intermediate_size=qwen.ff_dim, num_hidden_layers=2,
                num_attention_heads=qwen.heads, num_key_value_heads=qwen.kv_heads,
                rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
            )
        ).bfloat16()  # fmt: skip
        tower.rotary_emb = type(tower.rotary_emb)(config=tower.config)
    stage = text_stage(Job(row=row, shape=shape(768, 512, 121), text_tok=tokens), ROOMY)
    with torch.no_grad(), Tracker() as tracker:
        embeds = torch.zeros(1, tokens + 129, qwen.width, dtype=torch.bfloat16, device="meta")
        tower(inputs_embeds=embeds, use_cache=False)
    assert stage.work_bytes == pytest.approx(tracker.peak_bytes, rel=WITHIN)


@pytest.mark.parametrize(
    ("dtype", "regime"),
    [
        (torch.bfloat16, Regime(hidden_pieces=8)),
        (torch.bfloat16, Regime(hidden_pieces=16, head_groups=4)),
        (torch.bfloat16, Regime(hidden_pieces=8, head_groups=8)),
        (torch.float16, Regime(dtype=torch.float16)),
        (torch.float16, Regime(dtype=torch.float16, hidden_pieces=8, head_groups=4)),
    ],
    ids=str,
)
def test_pieces_groups_and_a_wide_stream_count_as_they_do(dtype, regime):
    spec = one_block("lite_t2v_5s_sft", blocks=2).spec
    model = CrossDiT(spec, device="meta", dtype=dtype).eval()
    model.set_regime(regime)
    x = torch.zeros(1, 31, 64, 96, spec.visual_embed_dim, device="meta", dtype=dtype)
    text = torch.zeros(1, 256, spec.in_text_dim, device="meta", dtype=dtype)
    pooled = torch.zeros(1, spec.in_text_dim2, device="meta", dtype=dtype)
    with torch.no_grad(), Tracker() as tracker:
        model(x, text, pooled, torch.zeros(1, device="meta"))
    found = Forward(
        spec=spec, batch=1, visual_tok=31 * 32 * 48, text_tok=256, itemsize=2, is_cpu=False,
        hidden_pieces=regime.hidden_pieces, head_groups=regime.head_groups,
        stream_itemsize=4 if regime.dtype else None,
    )  # fmt: skip
    assert found.peak_bytes() == pytest.approx(tracker.peak_bytes, rel=WITHIN)


SPARSE = [(5, 16, 16), (13, 16, 16), (13, 12, 20), (9, 20, 28)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("token_thw", SPARSE)
def test_block_sparse_attention_counts_as_it_does(token_thw, precision):
    """Also on grids whose tiles are not whole."""
    spec, dtype = VARIANTS["nano_video"].spec, torch.float32 if precision == "fp32" else torch.bfloat16
    t, h, w = token_thw
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, t, 2 * h, 2 * w, spec.visual_embed_dim, generator=generator).to(dtype)
    text = torch.randn(1, 64, spec.in_text_dim, generator=generator).to(dtype)
    pooled = torch.zeros(1, spec.in_text_dim2, dtype=dtype)
    model = CrossDiT(spec, dtype=dtype).eval()
    run = Nabla(NablaSettings(mode="on", mass=0.5, window_thw=(3, 3, 3), min_tok=0), None)

    def forward() -> None:
        run.begin([1.0, 0.0])
        found = run.forward(token_thw, spec.num_visual_blocks, 1.0, torch.device("cpu"))
        model(x, text, pooled, torch.zeros(1), **options(found, spec.num_visual_blocks, dense))

    with torch.no_grad():
        forward()  # kernels are tried on a small problem once
        with Tracker() as tracker:
            forward()
    made = {"batch": 1, "itemsize": dtype.itemsize, "is_cpu": True}
    sparse = sparse_bytes(spec, token_thw, kept=run.record.mean_kept, **made)
    found = Forward(spec=spec, visual_tok=t * h * w, text_tok=64, sparse=sparse, **made).peak_bytes()
    assert found == pytest.approx(tracker.peak_bytes, rel=WITHIN)


AUTOENCODED = [
    *(("nano_video", size, "cpu") for size in ((64, 64, 17), (128, 96, 17), (32, 32, 49))),
    *(("nano_image", size, "cpu") for size in ((64, 64, 1), (128, 128, 1), (256, 128, 1))),
    *(("lite_t2i", size, "meta") for size in ((1024, 1024, 1), (1408, 640, 1), (512, 512, 1))),
    *(("lite_t2v_5s_sft", size, "meta") for size in ((768, 512, 17), (512, 512, 17), (256, 256, 17))),
]


def autoencoder(job: Job, device: str) -> torch.nn.Module:
    spec = job.row.vae
    dtype = torch.float32 if job.vae_itemsize == 4 else torch.bfloat16
    return (HunyuanVideoVAE if spec.kind == "hunyuan" else FluxVAE)(spec, device=device, dtype=dtype).eval()


@pytest.mark.parametrize(("name", "size", "device"), AUTOENCODED)
def test_a_latent_is_decoded_in_the_estimated_memory(name, size, device):
    """By the plan that a roomy device gets: one pass, or causal chunks."""
    job = Job(row=VARIANTS[name], shape=shape(*size), vae_itemsize=4 if device == "cpu" else 2)
    vae, stage = autoencoder(job, device), decode_stage(job, ROOMY)
    z_BCTHW = torch.zeros(1, 16, *job.shape.latent_thw, device=device, dtype=next(vae.parameters()).dtype)
    with torch.no_grad(), Tracker() as tracker:
        if job.row.vae.kind == "flux":
            vae.decode(z_BCTHW[:, :, 0])
        else:
            Decoding(vae, z_BCTHW, decode_plan(job, ROOMY), on_piece=lambda *_: None).run()
    assert stage.weight_bytes == sum(parameter.nbytes for parameter in vae.parameters())  # loaded as a whole
    assert stage.work_bytes == pytest.approx(tracker.peak_bytes, rel=WITHIN)


@pytest.mark.parametrize(("name", "size", "device"), AUTOENCODED)
def test_a_picture_is_encoded_in_the_estimated_memory(name, size, device):
    job = Job(row=VARIANTS[name], shape=shape(*size), vae_itemsize=4 if device == "cpu" else 2, has_start=True)
    vae, stage = autoencoder(job, device), encode_stage(job, ROOMY)
    is_video = job.row.vae.kind == "hunyuan"
    with torch.no_grad(), Tracker() as tracker:
        pixels = torch.zeros(1, 3, job.shape.height_px, job.shape.width_px, device=device)
        pixels = pixels.to(next(vae.parameters()).dtype)
        vae.encode(pixels.unsqueeze(2) if is_video else pixels)
    assert stage.work_bytes == pytest.approx(tracker.peak_bytes, rel=WITHIN)


sides = st.integers(2, 14).map(lambda cells: 64 * cells)
lengths = st.integers(0, 60).map(lambda latents: 4 * latents + 1)


@settings(max_examples=40, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(
    name=st.sampled_from(["lite_t2v_5s_sft", "pro_t2v_10s_hd", "lite_t2i", "nano_video"]),
    width=sides, height=sides, frames=lengths, batch=st.integers(1, 3),
    grown=st.sampled_from(["width", "height", "frames", "batch"]), by=st.integers(1, 4),
    precision=st.sampled_from(sorted(PRECISIONS)), place=st.sampled_from(["processor", "device", "device, sparse"]),
)  # fmt: skip
def test_more_of_anything_needs_no_less(name, width, height, frames, batch, grown, by, precision, place):
    """Block-sparse attention on a processor is left out: it takes less on whole tiles, and with fewer heads at once."""
    row = VARIANTS[name]
    is_cpu, kept = place == "processor", 0.25 if place == "device, sparse" else 1.0
    small = {"width": width, "height": height, "frames": 1 if row.frames == (1,) else frames, "batch": batch}
    if grown == "frames" and row.frames == (1,):
        grown = "batch"
    step = {"width": 16, "height": 16, "frames": 4, "batch": 1}[grown]
    large = small | {grown: small[grown] + step * by}

    def needs(sizes):
        job = Job(
            row=row, shape=shape(sizes["width"], sizes["height"], sizes["frames"]), batch=sizes["batch"],
            precision=precision, is_cpu=is_cpu, kept=kept, has_start=True,
        )  # fmt: skip
        mode, chunk = (STREAM, 1) if row.vae.kind == "hunyuan" else (AUTO, None)  # a plan of its own might need less
        decode = plan_decode(row.vae, job.shape.latent_thw, free_bytes=None, itemsize=2, mode=mode, chunk=chunk)
        return estimate(job, replace(ROOMY, decode=decode))

    for less, more in zip(needs(small).stages, needs(large).stages, strict=True):
        assert less.device_bytes <= more.device_bytes, less.name
        assert less.host_bytes <= more.host_bytes, less.name
        assert less.flops.total <= more.flops.total, less.name


def test_stages_come_in_the_order_of_a_run():
    job = Job(row=VARIANTS["lite_i2v_5s"], shape=shape(768, 512, 121), has_start=True)
    assert [stage.name for stage in estimate(job, ROOMY).stages] == [TEXT, ENCODE, SAMPLE, DECODE]
