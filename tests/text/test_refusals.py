"""Every file that is no text encoder, or not a whole one, is named with what is wrong."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import CheckpointError, TextError
from comfyui_kandinsky5.kandinsky_core.text import load_text_encoder

from .conftest import IMAGE, PROMPT

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
