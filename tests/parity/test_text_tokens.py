"""Token ids, crops, masks and picture patches against the released text embedder with the real vocabularies."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.text import TEMPLATES
from comfyui_kandinsky5.kandinsky_core.text.images import CELL_PX, MERGE, patches, vision_size
from comfyui_kandinsky5.kandinsky_core.text.tokens import (
    CLIP_TOKENS,
    load_clip_tokenizer,
    load_qwen_tokenizer,
)

ROOT = Path(__file__).parents[2]
META = json.loads((ROOT / "tests/golden/index.json").read_text())["text_tokens.safetensors"]["meta"]
PROMPTS = range(len(META["prompts"]))
HOMES = {
    "KANDINSKY5_TOKENIZERS": "a folder with the public tokenizers (subfolders qwen2_5_vl, clip_l)",
    "COMFYUI_DIR": "a ComfyUI checkout",
}


def source(name, variable, folder):
    """The tokenizer `folder` of what `variable` names: skipped where it is not set, an error where it is wrong."""
    home = os.environ.get(variable)
    missing = f"{name} is NOT tested: set {variable} to {HOMES[variable]}"
    return pytest.param(Path(home or "") / folder, id=name, marks=pytest.mark.skipif(not home, reason=missing))


QWEN = [
    source("the public Qwen2.5-VL tokenizer", "KANDINSKY5_TOKENIZERS", "qwen2_5_vl"),
    source("ComfyUI's Qwen2.5 tokenizer", "COMFYUI_DIR", "comfy/text_encoders/qwen25_tokenizer"),
]
CLIP = [
    source("the public CLIP tokenizer", "KANDINSKY5_TOKENIZERS", "clip_l"),
    source("ComfyUI's CLIP tokenizer", "COMFYUI_DIR", "comfy/sd1_tokenizer"),
]


@pytest.fixture(scope="module", params=QWEN)
def qwen(request):
    return load_qwen_tokenizer(request.param)


@pytest.fixture(scope="module", params=CLIP)
def clip(request):
    return load_clip_tokenizer(request.param)


@pytest.mark.parametrize("index", PROMPTS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_crop_and_mask(golden, qwen, name, index):
    facts, row = META["templates"][name], META["templates"][name]["rows"][index]
    assert qwen.pad_id == META["pad_token_id"]
    tokens = qwen.tokenize(META["prompts"][index], TEMPLATES[name], facts["max_length"])
    assert tokens.crop == facts["crop_start"] == TEMPLATES[name].crop_start
    assert facts["max_length"] == TEMPLATES[name].max_tokens
    assert tokens.kept == row["real_after_crop"]
    # The released code pads every template to its limit, image_edit not at all.
    ids_L, mask_L = tokens.padded(row["kept"], qwen.pad_id) if name != "image_edit" else unpadded(tokens)
    reference = golden("text_tokens")
    assert torch.equal(ids_L.int(), reference[f"{name}.{index}.ids"])
    assert torch.equal(mask_L, reference[f"{name}.{index}.mask"])


def unpadded(tokens):
    return torch.tensor(tokens.ids), torch.ones(tokens.kept, dtype=torch.bool)


def test_prefix_lengths(qwen):
    for name, template in TEMPLATES.items():
        assert len(qwen(template.prefix)) == template.prefix_tokens == META["templates"][name]["prefix_token_count"]


def test_what_is_dropped_is_counted(qwen):
    template = TEMPLATES["video"]
    long = META["prompts"][5]
    whole = qwen(template.text(long))
    tokens = qwen.tokenize(long, template, 256)
    assert tokens.dropped == len(whole) - 385 > 0
    assert whole[-1] not in tokens.ids[tokens.crop :]  # the closing marker goes first


def test_image_edit_drops_three_prompt_tokens(qwen):
    tokens = qwen.tokenize("make it night", TEMPLATES["image_edit"], 512, [6])
    assert len(qwen("make it night")) == 3
    assert tokens.ids[tokens.crop] == qwen.vision_ids[0]


def test_ids_with_an_image(golden, qwen):
    tokens = qwen.tokenize("make it night", TEMPLATES["image_edit"], 1024, [patches(torch.zeros(3, 64, 96)).tokens])
    reference = golden("text_tokens")
    assert torch.equal(torch.tensor(tokens.ids).int(), reference["image_edit_img64x96.ids"])
    assert tokens.kept == int(reference["image_edit_img64x96.mask"].sum())


def test_image_geometry(golden, qwen):
    for height, width, frames, rows, columns, pads, total, kept, real in golden("text_tokens")["image_edit.geometry"]:
        size = vision_size(int(height) // 2, int(width) // 2)
        assert (1, *(side // CELL_PX * MERGE for side in size)) == (frames, rows, columns)
        picture = patches(torch.zeros(3, int(height), int(width)))
        assert (picture.rows, picture.columns, picture.tokens) == (rows, columns, pads)
        tokens = qwen.tokenize("make it night", TEMPLATES["image_edit"], 1024, [picture.tokens])
        assert (len(tokens.ids), tokens.kept, tokens.kept) == (total, kept, real)


def test_pixel_values(golden):
    reference = golden("text_tokens")
    picture = patches(reference["pixels.image"][0].float() / 127.5 - 1)
    assert [1, picture.rows, picture.columns] == reference["pixels.grid_thw"][0].tolist()
    torch.testing.assert_close(picture.values_NP, reference["pixels.pixel_values"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("index", PROMPTS)
def test_clip_ids_and_mask(golden, clip, index):
    ids_L, mask_L = clip.tokenize(META["prompts"][index]).padded(CLIP_TOKENS, clip.end_id)
    reference = golden("text_tokens")
    assert torch.equal(ids_L.int(), reference[f"clip.{index}.ids"])
    assert torch.equal(mask_L, reference[f"clip.{index}.mask"])


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [("video", "promt", "prompt"), ("video", "scren", "screen"), ("image_edit", "<|im_end|>\n", "<|im_end|>")],
)
def test_a_corrected_template_is_noticed(golden, qwen, name, right, wrong):
    from dataclasses import replace

    template = TEMPLATES[name]
    corrected = replace(template, prefix=template.prefix.replace(right, wrong))
    tokens = qwen.tokenize(META["prompts"][2], corrected, template.max_tokens)
    assert list(tokens.ids) != golden("text_tokens")[f"{name}.2.ids"].tolist()[: len(tokens.ids)]
