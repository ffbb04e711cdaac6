"""Packed weights in the real ComfyUI: converted files load, give nearly the same clip, and take LoRAs."""

from __future__ import annotations

import pytest
import tiny
import torch
from comfyui_kandinsky5.kandinsky_core.io import save_checkpoint
from comfyui_kandinsky5.kandinsky_core.io.convert import convert
from tiny_graphs import loaders, node, save, text_to_video

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


def test_gguf_is_listed_where_it_can_be_loaded(server, packed):
    name = packed("gguf-Q8_0")
    (server.base / "models" / "vae" / "autoencoder.gguf").write_bytes(b"GGUF")
    for loader, widget, is_there in (("K5LoadModel", "model_name", True), ("K5LoadVAE", "vae_name", False)):
        options = server.get(f"/object_info/{loader}")[loader]["input"]["required"][widget][1]["options"]
        assert any(option.endswith(".gguf") for option in options) is is_there
    report = server.run(loaders(name) | {"show": node("PreviewAny", source=["model", 1])})["show"]["text"][0]
    assert "Weights Q8_0 and torch." in report


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
