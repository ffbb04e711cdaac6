"""Text encoders in fewer bits: scaled and plain fp8, GGUF, NF4, and formats nobody can compute with."""

from __future__ import annotations

import json
import re

import gguf
import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import CheckpointError
from comfyui_kandinsky5.kandinsky_core.packed.layers import unpack
from comfyui_kandinsky5.kandinsky_core.text import load_text_encoder
from safetensors.torch import save_file

from .conftest import IMAGE, PROMPT, same

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def fp8(tensors, style, dtype=E4M3):
    """Quantise the linear weights as ComfyUI's scaled files do; returns the file's tensors and their true values."""
    stored, values = dict(tensors), dict(tensors)
    for name, value in tensors.items():
        if "_proj.weight" not in name:
            continue
        stem = name.removesuffix("weight")
        rows = value.abs().amax(dim=1) if style == "rows" else value.abs().max()
        scale = rows / 100
        per_row = scale[:, None] if style == "rows" else scale
        stored[name] = (value / per_row).to(dtype)
        values[name] = stored[name].float() * per_row
        if style == "old":
            stored |= {stem + "scale_weight": scale, stem + "scale_input": torch.ones(())}
        else:
            layer = json.dumps({"format": str(dtype).removeprefix("torch.")}).encode()
            stored |= {stem + "weight_scale": scale, stem + "comfy_quant": torch.tensor(list(layer), dtype=torch.uint8)}
    if style == "old":
        stored["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    return stored, values


@pytest.mark.parametrize(
    ("style", "dtype"),
    [("old", E4M3), ("new", E4M3), ("rows", E4M3), ("new", E5M2)],
)
def test_scaled_fp8_is_multiplied_by_its_scale(load_single, comfy_qwen, comfy_clip, style, dtype):
    stored, values = fp8(comfy_qwen, style, dtype)
    quantised = load_single(stored, comfy_clip, dtype=torch.float32)
    same(quantised, load_single(values, comfy_clip, dtype=torch.float32))
    layer = quantised.qwen.layers[1].mlp.up_proj
    assert layer.weight.dtype == dtype  # what is held is what is stored
    held = unpack(layer.weight, layer.weight_scale, layer.packing, torch.float32)
    assert torch.equal(held, values["model.layers.1.mlp.up_proj.weight"])


def test_plain_fp8_stays_and_computes_in_bfloat16_unless_told(load_single, comfy_qwen, comfy_clip):
    stored = {name: value.bfloat16() for name, value in comfy_qwen.items()}
    stored |= {name: value.to(E4M3) for name, value in comfy_qwen.items() if "_proj.weight" in name}
    encoder = load_single(stored, comfy_clip)
    assert {name: value.dtype for name, value in encoder.qwen.state_dict().items()} == {
        name.removeprefix("model."): value.dtype for name, value in stored.items() if name.startswith("model.")
    }
    assert encoder.encode(PROMPT, "video").features_LD.dtype == torch.bfloat16
    same(encoder, load_single({name: value.bfloat16() for name, value in stored.items()}, comfy_clip))


def test_half_precision_clip_computes_in_float32(load_single, comfy_qwen, comfy_clip):
    encoder = load_single(comfy_qwen, {name: value.half() for name, value in comfy_clip.items()})
    assert {value.dtype for value in encoder.clip.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8", "packed"])
def test_other_quantisations_are_named(load_single, comfy_qwen, comfy_clip, kind):
    tensors = dict(comfy_qwen)
    if kind == "packed":
        tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
    else:
        layer = json.dumps({"format": kind}).encode()
        tensors["model.layers.0.mlp.up_proj.comfy_quant"] = torch.tensor(list(layer), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="I8" if kind == "packed" else kind):
        load_single(tensors, comfy_clip)


def test_a_missing_scale_is_named(load_single, comfy_qwen, comfy_clip):
    stored, _ = fp8(comfy_qwen, "old")
    del stored["model.layers.1.mlp.up_proj.scale_weight"]
    with pytest.raises(CheckpointError, match=r"qwen_2.*no scale: model\.layers\.1\.mlp\.up_proj\.weight\."):
        load_single(stored, comfy_clip)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b'{"format": "floa', "not JSON"), (b"\xff{", "not JSON"), (b"[1, 2]", r"is \[1, 2\], not"), (b"", "not JSON")],
)
def test_damaged_layer_formats_are_named(load_single, comfy_qwen, comfy_clip, content, complaint):
    name = "model.layers.0.mlp.up_proj.comfy_quant"
    damaged = comfy_qwen | {name: torch.tensor(list(content), dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match=rf"qwen_2.*{name}.* {complaint}"):
        load_single(damaged, comfy_clip)


def test_layer_formats_of_another_type_are_named(load_single, comfy_qwen, comfy_clip):
    damaged = comfy_qwen | {"model.layers.0.mlp.up_proj.comfy_quant": torch.tensor(-1.5)}
    with pytest.raises(CheckpointError, match="comfy_quant is not JSON"):
        load_single(damaged, comfy_clip)


@pytest.mark.parametrize("content", ['{"layers"', "[]", '{"layers": []}', '{"layers": {"model.norm": "fp8"}}'])
def test_damaged_quantisation_metadata_is_named(folders, tmp_path, comfy_qwen, content):
    file = tmp_path / "qwen.safetensors"
    save_file({name: value.clone() for name, value in comfy_qwen.items()}, file, {"_quantization_metadata": content})
    with pytest.raises(CheckpointError, match=r"qwen\.safetensors: _quantization_metadata is"):
        load_text_encoder(file, folders[1], tokenizer_path=folders[0])


def test_quantisation_metadata_names_the_format(folders, tmp_path, comfy_qwen):
    file = tmp_path / "qwen.safetensors"
    content = json.dumps({"layers": {"model.layers.0.mlp.up_proj": {"format": "nvfp4"}}})
    save_file({name: value.clone() for name, value in comfy_qwen.items()}, file, {"_quantization_metadata": content})
    with pytest.raises(CheckpointError, match="nvfp4"):
        load_text_encoder(file, folders[1], tokenizer_path=folders[0])


LLAMA_CPP = {  # what llama.cpp's converter calls the pieces
    "embed_tokens": "token_embd", "norm": "output_norm", "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(path, tensors, kind):
    """A Qwen text tower as llama.cpp's tools write it; returns the numbers that are in it, by the usual names."""
    writer = gguf.GGUFWriter(path, "qwen2vl")
    writer.add_string("general.name", "Qwen2.5 VL 7B")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    values = {}
    for name, tensor in tensors.items():
        if "visual" in name:
            continue
        owner, _, leaf = name.removeprefix("model.").rpartition(".")
        layer = re.match(r"layers\.(\d+)\.(.+)", owner)
        there = f"blk.{layer[1]}.{LLAMA_CPP[layer[2]]}" if layer else LLAMA_CPP.get(owner, "output")
        wanted = kind if tensor.ndim == 2 and there != "output" else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(tensor.numpy(), wanted)
        writer.add_tensor(f"{there}.{leaf}", data, raw_dtype=wanted)
        values[name] = torch.from_numpy(gguf.quants.dequantize(data, wanted)).view(tensor.shape).clone()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_text_tower_of_llama_cpp_computes_with_what_it_holds(
    folders, tmp_path, load_single, comfy_qwen, comfy_clip, kind
):
    file = tmp_path / "qwen.gguf"
    values = write_gguf(file, comfy_qwen, gguf.GGMLQuantizationType[kind])
    encoder = load_text_encoder(file, folders[1], tokenizer_path=folders[0], dtype=torch.float32)
    assert encoder.qwen.embed_tokens.packing.format == encoder.qwen.layers[0].mlp.up_proj.packing.format == kind
    plain = load_single(comfy_qwen | values, comfy_clip, dtype=torch.float32)
    left, right = (each.encode(PROMPT, "video").features_LD for each in (encoder, plain))
    torch.testing.assert_close(left, right, atol=1e-5, rtol=0)
    assert load_text_encoder(file, folders[1], tokenizer_path=folders[0]).encode(
        PROMPT, "video"
    ).features_LD.dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match=r"qwen\.gguf has no vision tower"):
        encoder.encode(PROMPT, "image_edit", images=[IMAGE])


@pytest.mark.parametrize("stored", ["plain", "fp8"])
def test_nf4_packs_the_layers_and_stays_near(load_single, comfy_qwen, comfy_clip, stored):
    tensors, numbers = (comfy_qwen, comfy_qwen) if stored == "plain" else fp8(comfy_qwen, "new")
    exact = load_single(comfy_qwen, comfy_clip, dtype=torch.float32)
    encoder = load_single(tensors, comfy_clip, dtype=torch.float32, nf4=True)
    kinds = {name: layer.packing.format for name, layer in encoder.qwen.named_modules() if hasattr(layer, "packing")}
    assert len(kinds) == 7 * len(encoder.qwen.layers) and set(kinds.values()) == {"NF4"}
    weight = encoder.qwen.layers[0].mlp.up_proj.weight
    assert weight.nbytes == exact.qwen.layers[0].mlp.up_proj.weight.numel() * 34 / 64
    values = {
        f"model.{name}.weight": unpack(layer.weight, None, layer.packing, torch.float32)
        for name, layer in encoder.qwen.named_modules() if name in kinds
    }  # fmt: skip
    for name, value in values.items():
        assert 0.05 < (value - comfy_qwen[name]).norm() / comfy_qwen[name].norm() < 0.15
    same(encoder, load_single(numbers | values, comfy_clip, dtype=torch.float32))


@pytest.mark.parametrize("kind", ["fp8", "nf4", "gguf"])
def test_packed_layers_may_travel(folders, tmp_path, load_single, comfy_qwen, comfy_clip, kind):
    options = {"dtype": torch.float32, "nf4": kind == "nf4"}
    if kind == "gguf":
        file = tmp_path / "qwen.gguf"
        write_gguf(file, comfy_qwen, gguf.GGMLQuantizationType.Q8_0)

        def load(**more):
            return load_text_encoder(file, folders[1], tokenizer_path=folders[0], **options, **more)
    else:
        stored = fp8(comfy_qwen, "new")[0] if kind == "fp8" else comfy_qwen

        def load(**more):
            return load_single(stored, comfy_clip, **options, **more)

    left, right = (load(**more).encode(PROMPT, "video") for more in ({}, {"streamed": True}))
    assert torch.equal(left.features_LD, right.features_LD) and torch.equal(left.pooled_P, right.pooled_P)
