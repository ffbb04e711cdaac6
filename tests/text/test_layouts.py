"""Every layout text encoders come in, read without a copy and without a network."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import CheckpointError
from comfyui_kandinsky5.kandinsky_core.io.checkpoint import open_checkpoint
from comfyui_kandinsky5.kandinsky_core.io.quant import read
from comfyui_kandinsky5.kandinsky_core.text import load_text_encoder
from safetensors.torch import load_file, save_file

from .conftest import IMAGE, PROMPT, same


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
