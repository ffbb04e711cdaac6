"""Every layout text encoders come in, and every file that is not one."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import CheckpointError, TextError
from comfyui_kandinsky5.kandinsky_core.io.checkpoint import open_checkpoint
from comfyui_kandinsky5.kandinsky_core.io.quant import read
from comfyui_kandinsky5.kandinsky_core.packed.layers import unpack
from comfyui_kandinsky5.kandinsky_core.text import load_text_encoder
from safetensors.torch import load_file, save_file

PROMPT = "a blue cube"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
IMAGE = torch.zeros(3, 112, 112)


def same(one, other, atol=0.0):
    for template, images in (("video", None), ("image_edit", [IMAGE])):
        left, right = (each.encode(PROMPT, template, images=images) for each in (one, other))
        torch.testing.assert_close(left.features_LD, right.features_LD, atol=atol, rtol=0)
        torch.testing.assert_close(left.pooled_P, right.pooled_P, atol=atol, rtol=0)


def test_comfy_single_files(encoder, load_single, comfy_qwen, comfy_clip):
    # Sizes come from shapes alone: heads, norms and rotary settings must be the published ones.
    same(load_single(comfy_qwen, comfy_clip), encoder)


@pytest.mark.parametrize("prefix", ["", "transformer.", "cond_stage_model.transformer.", "clip_l.transformer."])
def test_clip_prefixes(encoder, load_single, comfy_qwen, comfy_clip, prefix):
    extra = {"logit_scale": torch.ones(()), "text_projection.weight": torch.zeros(8, 8)}
    clip = {prefix + name: value for name, value in (comfy_clip | extra).items()}
    clip[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    same(load_single(comfy_qwen, clip), encoder)


def test_clip_without_any_prefix(encoder, load_single, comfy_qwen, comfy_clip):
    same(load_single(comfy_qwen, {n.removeprefix("text_model."): v for n, v in comfy_clip.items()}), encoder)


def test_whole_clip_with_its_vision_part(encoder, folders, tmp_path, clip, comfy_clip):
    from transformers import CLIPConfig

    folder = tmp_path / "clip"
    shutil.copytree(folders[1], folder)
    CLIPConfig(text_config=clip.config.to_dict()).save_pretrained(folder)
    vision = ("vision_model.embeddings.class_embedding", "visual_projection.weight", "text_projection.weight")
    save_file(comfy_clip | {name: torch.zeros(4) for name in vision}, folder / "model.safetensors")
    same(load_text_encoder(folders[0], folder), encoder)


@pytest.mark.parametrize(
    "rename",
    [
        pytest.param(lambda n: n.replace("language_model.", "model.", 1), id="published"),
        pytest.param(lambda n: f"model.{n}", id="transformers 4.52"),
        pytest.param(lambda n: n.replace("language_model.", "language_model.model.", 1), id="language_model.model"),
    ],
)
def test_sharded_folders_of_every_transformers(encoder, folders, tmp_path, qwen, rename):
    folder = tmp_path / "text_encoder"
    shutil.copytree(folders[0], folder)
    (folder / "model.safetensors").unlink()
    tensors = {rename(name): value.clone() for name, value in qwen.state_dict().items()}
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / shard)
    index = {"weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    same(load_text_encoder(folder, folders[1]), encoder)
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors"):
        load_text_encoder(folder, folders[1])


def test_text_tower_alone(encoder, folders, tmp_path, qwen):
    qwen.language_model.save_pretrained(tmp_path)
    small = load_text_encoder(tmp_path, folders[1], tokenizer_path=folders[0])
    torch.testing.assert_close(
        small.encode(PROMPT, "video").features_LD, encoder.encode(PROMPT, "video").features_LD, atol=0, rtol=0
    )
    with pytest.raises(CheckpointError, match="vision tower"):
        small.encode(PROMPT, "image_edit", images=[IMAGE])


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


WRONG = {
    "T5": {"encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8), "encoder.final_layer_norm.weight": (8,)},
    "Kandinsky 5 transformer": {"visual_transformer_blocks.0.cross_attention.to_query.weight": (8, 8)},
    "autoencoder": {"decoder.conv_in.weight": (8, 8), "decoder.mid.block_1.conv1.weight": (8, 8)},
    "LoRA": {"diffusion_model.blocks.0.attn.lora_A.weight": (8, 8)},
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("slot", ["qwen", "clip"])
def test_wrong_models_are_named(load_single, comfy_qwen, comfy_clip, kind, slot):
    wrong = {name: torch.zeros(shape) for name, shape in WRONG[kind].items()}
    with pytest.raises(CheckpointError, match=kind):
        load_single(*((wrong, comfy_clip) if slot == "qwen" else (comfy_qwen, wrong)))


def test_swapped_files_are_named(load_single, comfy_qwen, comfy_clip):
    with pytest.raises(CheckpointError, match=r"not Qwen2\.5-VL.*looks like CLIP"):
        load_single(comfy_clip, comfy_clip)
    with pytest.raises(CheckpointError, match=r"not CLIP.*looks like Qwen2\.5-VL"):
        load_single(comfy_qwen, comfy_qwen)


def test_other_language_models_are_refused_by_config(folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text()) | {"model_type": "qwen3_vl"}
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="qwen3_vl"):
        load_text_encoder(tmp_path / "q", folders[1])


@pytest.mark.parametrize(
    ("slot", "change"),
    [
        pytest.param(0, {"text_config": [1]}, id="not an object"),
        pytest.param(0, {"text_config": {"hidden_size": "wide"}}, id="text for a number"),
        pytest.param(0, {"text_config": {"hidden_size": 255}}, id="not divisible"),
        pytest.param(0, {"text_config": {"hidden_size": -4}}, id="negative"),
        pytest.param(0, {"text_config": {"hidden_act": "nope"}}, id="unknown activation"),
        pytest.param(0, {"text_config": {"num_attention_heads": 0}}, id="no heads"),
        pytest.param(0, {"dtype": "floaty"}, id="unknown dtype"),
        pytest.param(1, {"hidden_size": "wide"}, id="clip: text for a number"),
        pytest.param(1, {"hidden_act": "nope"}, id="clip: unknown activation"),
        pytest.param(1, {"num_attention_heads": 7}, id="clip: not divisible"),
    ],
)
def test_configurations_that_build_no_model_are_named(folders, tmp_path, slot, change):
    given = list(folders)
    given[slot] = tmp_path / "damaged"
    shutil.copytree(folders[slot], given[slot])
    file = given[slot] / "config.json"
    config = json.loads(file.read_text())
    for key, value in change.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"damaged: no model can be built from its config\.json \(\w+: .+\)"):
        load_text_encoder(*given)


def test_a_damaged_vision_configuration_is_named(folders, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(folders[0], damaged)
    config = json.loads((damaged / "config.json").read_text())
    config["vision_config"]["num_heads"] = 0
    (damaged / "config.json").write_text(json.dumps(config))
    encoder = load_text_encoder(damaged, folders[1])
    with pytest.raises(CheckpointError, match=r"damaged: no model can be built from its config\.json"):
        encoder.encode(PROMPT, "image_edit", images=[IMAGE])


def test_shapes_that_build_no_model_are_named(load_single, comfy_qwen, comfy_clip):
    flat = comfy_qwen | {"model.embed_tokens.weight": torch.zeros(5)}
    with pytest.raises(CheckpointError, match=r"qwen_2.* no model can be built from its tensor shapes"):
        load_single(flat, comfy_clip)


def test_one_report_for_everything_that_does_not_fit(load_single, comfy_qwen, comfy_clip):
    tensors = dict(comfy_qwen)
    del tensors["model.layers.1.self_attn.q_proj.bias"]
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, 5)
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.zeros(128)
    with pytest.raises(CheckpointError) as caught:
        load_single(tensors, comfy_clip)
    for part in ("1 missing", "q_proj.bias", "1 unexpected", "q_norm", "1 wrong shape", "[3, 5]"):
        assert part in str(caught.value)


def test_truncated_file(folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "q")
    weights = tmp_path / "q" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="incomplete"):
        load_text_encoder(tmp_path / "q", folders[1])


def test_pickles_are_never_opened(folders, tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    for name in ("pytorch_model.bin", "qwen.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(CheckpointError, match="can run code"):
            load_text_encoder(tmp_path / name, folders[1])
    with pytest.raises(CheckpointError, match="can run code|safetensors"):
        load_text_encoder(tmp_path, folders[1])
    assert not (tmp_path / "exploded").exists()


def test_missing_tokenizer_lists_where_it_looked(folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "text_encoder")
    (tmp_path / "text_encoder" / "tokenizer.json").unlink()
    with pytest.raises(TextError) as caught:
        load_text_encoder(tmp_path / "text_encoder", folders[1])
    assert str(tmp_path / "text_encoder") in str(caught.value) and str(tmp_path / "tokenizer") in str(caught.value)
    shutil.copytree(folders[0], tmp_path / "tokenizer")
    load_text_encoder(tmp_path / "text_encoder", folders[1])


def test_wrong_and_damaged_tokenizers(folders, tmp_path):
    with pytest.raises(TextError, match=r"not a Qwen2\.5 tokenizer"):
        load_text_encoder(*folders, tokenizer_path=folders[1])
    with pytest.raises(TextError, match="not a CLIP tokenizer"):
        load_text_encoder(*folders, clip_tokenizer_path=folders[0])
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {}')
    with pytest.raises(TextError, match="cannot be read"):
        load_text_encoder(*folders, tokenizer_path=tmp_path)


def test_a_vocabulary_larger_than_the_weights_is_named(folders, tmp_path):
    tokenizer = json.loads((folders[0] / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["x"] = 9000
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(TextError, match="token 9000, but the weights know 262"):
        load_text_encoder(*folders, tokenizer_path=tmp_path).encode("x", "video")


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux to count private memory")
def test_weights_are_mapped_not_copied(folders, tmp_path):
    # Own process: what other tests left in the allocator must not count. bf16 as stored, 96 MB.
    big = tmp_path / "q"
    shutil.copytree(folders[0], big)
    config = json.loads((big / "config.json").read_text())
    config["text_config"]["vocab_size"] = 200_000
    (big / "config.json").write_text(json.dumps(config))
    tensors = {name: value.bfloat16() for name, value in load_file(big / "model.safetensors").items()}
    embedding = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[embedding] = torch.zeros(200_000, 256, dtype=torch.bfloat16)
    save_file(tensors, big / "model.safetensors")
    program = f"""
import re
import comfyui_kandinsky5.kandinsky_core.text as text
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers import CLIPTextModel, Qwen2_5_VLConfig
def private():
    return 1024 * int(re.search(r"Anonymous: *(\\d+)", open("/proc/self/smaps_rollup").read())[1])
text.load_text_encoder({str(folders[0])!r}, {str(folders[1])!r}).encode("x", "video")
before = private()
encoder = text.load_text_encoder({str(big)!r}, {str(folders[1])!r})
assert encoder.qwen.embed_tokens.weight.nbytes == 200_000 * 256 * 2
print(private() - before)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 0.1 * (big / "model.safetensors").stat().st_size


def test_nothing_is_downloaded(folders, monkeypatch):
    import socket

    def refuse(*_):
        raise AssertionError("a network connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    load_text_encoder(*folders).encode(PROMPT, "video")


def test_read_keeps_the_stored_dtype(folders):
    checkpoint = open_checkpoint(folders[0])
    name = next(iter(checkpoint.tensors))
    assert read(checkpoint, name, None).dtype == checkpoint.dtype(name)
    assert read(checkpoint, name, torch.float16).dtype == torch.float16
