"""Packed weights in the real ComfyUI: converted files load, give nearly the same clip, and take LoRAs."""

from __future__ import annotations

import json

import gguf
import pytest
import tiny
import torch
from comfyui_kandinsky5.kandinsky_core import nano
from comfyui_kandinsky5.kandinsky_core.io import save_checkpoint
from comfyui_kandinsky5.kandinsky_core.io.convert import convert
from comfyui_kandinsky5.nodes.files import built_in
from safetensors.torch import load_file
from tiny_graphs import loaders, node, sampler, save, text_to_video

LAYER = "visual_transformer_blocks.0.self_attention.to_query"


@pytest.fixture(scope="module")
def packed(server):
    """Name of the tiny video model, converted: `packed("gguf-Q8_0")`."""
    folder = server.base / "models" / "diffusion_models"

    def name(to):
        target = folder / f"k5_tiny_{to}.{'gguf' if to.startswith('gguf') else 'safetensors'}"
        if not target.exists():
            convert(folder / tiny.VIDEO, target, to)
        return target.name

    return name


def graph(model, **options):
    """One step at guidance 1."""
    made = text_to_video(steps=1, cfg=1.0, **options) | {"save": save(latent=["sample", 0])}
    made["model"]["inputs"]["model_name"] = model
    return made


def error(one, other):
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize(("to", "limit"), [("fp8", 0.1), ("gguf-Q8_0", 0.02), ("gguf-Q5_0", 0.1)])
def test_converted_files_give_nearly_the_same(saved, packed, to, limit):
    exact = saved(graph(tiny.VIDEO))["latent"]
    assert 1e-5 < error(saved(graph(packed(to)))["latent"], exact) < limit


@pytest.fixture(scope="module")
def nano_clip(server):
    """Decoded frames of the nano video model in bf16, or of a conversion of it: `nano_clip("gguf-Q8_0")`."""
    folder = server.base / "models" / "diffusion_models"

    def make(to=None):
        name = built_in("model")
        if to is not None:
            name = f"nano_{to}.{'gguf' if to.startswith('gguf') else 'safetensors'}"
            convert(nano.files()["model"], folder / name, to)
        made = {
            "model": node("K5LoadModel", model_name=name, variant="auto", dtype="auto" if to == "fp8" else "bf16"),
            "clip": node(
                "K5LoadTextEncoder", qwen_name=built_in("text_encoder"), clip_name=built_in("clip"), dtype="auto"
            ),
            "vae": node("K5LoadVAE", vae_name=built_in("vae"), dtype="auto"),
            "text": node(
                "K5EncodeText", clip=["clip", 0], prompt="A red circle moves right on a black background.",
                negative_prompt="", template="auto", max_tokens=0, model=["model", 0],
            ),
            "empty": node("K5EmptyLatent", width=64, height=64, length=17, batch_size=1),
            "sample": sampler(steps=8),
            "decode": node("K5VAEDecode", vae=["vae", 0], latent=["sample", 0]),
            "save": save(image=["decode", 0]),
        }  # fmt: skip
        return load_file(server.run(made)["save"]["path"][0])["image"]

    return make


@pytest.fixture(scope="module")
def nano_exact(nano_clip):
    return nano_clip()


@pytest.mark.parametrize("to", ["fp8", "gguf-Q8_0", "gguf-Q5_0"])
def test_the_nano_models_clip_stays_within_35_decibel(nano_clip, nano_exact, to):
    made = nano_clip(to)
    assert made.shape == nano_exact.shape == (17, 64, 64, 3) and nano_exact.std() > 0.05
    assert 35 <= -10 * (made - nano_exact).square().mean().log10().item() < 90


def test_text_encoders_compute_packed(server, saved):
    """Qwen as fp8 file, as GGUF and packed into NF4 while it is read: the conditioning stays near."""
    folder = server.base / "models" / "text_encoders"
    tensors = load_file(folder / tiny.QWEN / "model.safetensors")
    config = json.loads((folder / tiny.QWEN / "config.json").read_text())
    (folder / "qwen_fp8").mkdir()
    (folder / "qwen_gguf").mkdir()
    for name in ("qwen_fp8", "qwen_gguf"):
        (folder / name / "config.json").write_text(json.dumps(config))
        (folder / name / "tokenizer.json").write_bytes((folder / tiny.QWEN / "tokenizer.json").read_bytes())
    packed = {}
    writer = gguf.GGUFWriter(folder / "qwen_gguf" / "model.gguf", "qwen2vl")
    for name, value in tensors.items():
        is_layer = "language_model" in name and value.ndim == 2
        if name.startswith("language_model"):
            kind = gguf.GGMLQuantizationType.Q8_0 if is_layer else gguf.GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quants.quantize(value.float().numpy(), kind), raw_dtype=kind)
        scale = value.float().abs().max() / 448
        packed[name] = (value.float() / scale).to(torch.float8_e4m3fn) if is_layer else value
        if is_layer:
            packed[name.removesuffix("weight") + "scale_weight"] = scale
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_checkpoint(folder / "qwen_fp8" / "model.safetensors", packed)

    def features(qwen, dtype):
        made = loaders() | {"save": save(conditioning=["text", 0])}
        made["clip"]["inputs"] |= {"qwen_name": qwen, "dtype": dtype}
        return saved(made)["features0"]

    exact = features(tiny.QWEN, "fp32")
    for qwen, dtype, limit in (("qwen_fp8", "fp32", 0.1), ("qwen_gguf", "fp32", 0.05), ("qwen_gguf", "auto", 0.1),
                               (tiny.QWEN, "nf4", 0.3)):  # fmt: skip
        assert 1e-5 < error(features(qwen, dtype), exact) < limit, (qwen, dtype)


def test_gguf_is_listed_where_it_can_be_loaded(server, packed):
    name = packed("gguf-Q8_0")
    (server.base / "models" / "vae" / "autoencoder.gguf").write_bytes(b"GGUF")
    for loader, widget, is_there in (("K5LoadModel", "model_name", True), ("K5LoadVAE", "vae_name", False)):
        options = server.get(f"/object_info/{loader}")[loader]["input"]["required"][widget][1]["options"]
        assert any(option.endswith(".gguf") for option in options) is is_there
    report = server.run(loaders(name) | {"show": node("PreviewAny", source=["model", 1])})["show"]["text"][0]
    assert "Weights Q8_0 and torch." in report
    made = loaders(name) | {
        "estimate": node(
            "K5MemoryEstimate", variant="lite_t2v_5s_sft", width=768, height=512, length=121, batch_size=1,
            precision="bf16", attention="auto", kept=0.25, cfg=-1.0, steps=0, start_image=False, budget="12 GB",
            custom_gb=12.0, model=["model", 0],
        ),
        "show": node("PreviewAny", source=["estimate", 0]),
    }  # fmt: skip
    assert "q8_0 weights" in server.run(made)["show"]["text"][0]


def test_loras_apply_to_packed_weights(server, saved, packed):
    """The same change by a LoRA on GGUF and on plain weights, and none once the LoRA is gone."""
    torch.manual_seed(1)
    tensors = {f"diffusion_model.{LAYER}.lora_A.weight": torch.randn(4, 128) * 0.5,
               f"diffusion_model.{LAYER}.lora_B.weight": torch.randn(128, 4) * 0.5}  # fmt: skip
    save_checkpoint(server.base / "models" / "loras" / "k5_tiny_lora.safetensors", tensors)

    def with_lora(model):
        made = graph(model)
        made["lora"] = node(
            "LoraLoaderModelOnly", model=["model", 0], lora_name="k5_tiny_lora.safetensors", strength_model=1.0
        )
        made["sample"]["inputs"]["model"] = ["lora", 0]
        return made

    name = packed("gguf-Q8_0")
    plain, changed = (saved(each)["latent"] for each in (graph(tiny.VIDEO), with_lora(tiny.VIDEO)))
    before, after = saved(graph(name))["latent"], saved(with_lora(name))["latent"]
    assert error(changed, plain) > 0.05
    assert error(after, changed) < 0.3 * error(changed, plain)
    again = graph(name)
    again["sample"]["inputs"]["seed"] = 8  # runs without the LoRA, then once more the first graph
    saved(again)
    assert torch.equal(saved(graph(name))["latent"], before)


def test_patches_of_packed_layers_stay_single_however_core_moves_them(server):
    seen = json.loads(server.run({"loads": node("K5TestPackedLoads")})["loads"]["seen"][0])
    assert seen["loaded"]["part"] == seen["loaded"]["same"] == [False, True]
    assert seen["loaded"]["all"] == [True, True] and seen["loaded"]["none"] == [False, False]
    for step in ("part", "same", "all", "none", "again"):
        assert (seen["counts"][step], seen["outputs"][step]) == ([1, 1], [64, 64]), step
    assert (seen["counts"]["plain"], seen["outputs"]["plain"]) == ([0, 0], [0, 0])


def test_what_packed_weights_cannot_do_is_said(server, packed):
    made = graph(packed("gguf-Q8_0"))
    made["other"] = node("K5LoadModel", model_name=tiny.VIDEO, variant="auto", dtype="auto")
    made["merge"] = node("ModelMergeSimple", model1=["other", 0], model2=["model", 0], ratio=0.5)
    made["sample"]["inputs"]["model"] = ["merge", 0]
    entry = server.finish(server.start(made))
    assert "can neither be merged" in server.error(entry)
    made = graph(packed("gguf-Q8_0"))
    made["model"]["inputs"]["dtype"] = "fp8_e4m3fn"
    assert "Set dtype to 'auto'" in server.error(server.finish(server.start(made)))
