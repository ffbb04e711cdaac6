"""The nano tokenizers know every word, batches equal single prompts, and the folders are real Qwen2.5-VL and CLIP."""

from __future__ import annotations

import json
import random
import re
from itertools import islice

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import TextError
from comfyui_kandinsky5.kandinsky_core.nano import draw, text
from comfyui_kandinsky5.kandinsky_core.nano.caption import language
from comfyui_kandinsky5.kandinsky_core.nano.edit import Edit, edits, instruction, instructions_language
from comfyui_kandinsky5.kandinsky_core.nano.run import Run
from comfyui_kandinsky5.kandinsky_core.text import load_text_encoder
from comfyui_kandinsky5.kandinsky_core.text.images import patches
from comfyui_kandinsky5.kandinsky_core.text.vision import image_states
from safetensors.torch import load_file
from torch.testing import assert_close

CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(Qwen folder, CLIP folder) after three steps of training, which is every part of it."""
    home = tmp_path_factory.mktemp("text")
    made = home / "qwen", home / "clip"
    text.train_text(Run(home), made, steps=3, batch=4, checked=50)
    return made


@pytest.fixture(scope="module")
def encoder(folders):
    """The encoder as inference loads it."""
    return load_text_encoder(*folders, dtype=torch.float32)


def pictures(side_px, count):
    """Drawn pictures, `[3,H,W]` in -1…1."""
    drawn = [draw.draw(item, size_px=side_px, frames=1)[0] for item in draw.scenes(3, count)]
    return [picture.movedim(-1, 0) * 2 - 1 for picture in drawn]


@pytest.mark.parametrize(("at", "special", "lower"), [(0, text.QWEN_SPECIAL, False), (1, text.CLIP_SPECIAL, True)])
def test_a_tokenizer_is_the_same_every_time(folders, tmp_path, at, special, lower):
    assert text.save_tokenizer(tmp_path, special, lower=lower) <= text.VOCABULARY
    assert (tmp_path / "tokenizer.json").read_bytes() == (folders[at] / "tokenizer.json").read_bytes()


def test_every_word_is_one_token(encoder):
    lines = {*language(), *instructions_language()}
    assert len(lines) > 3000
    for line in lines:
        words = re.findall(r"\w+|[.,]", line)
        assert len(encoder.qwen_tokenizer(line)) == len(words), line
        assert len(encoder.clip_tokenizer.tokenize(line).ids) == len(words) + 2, line


def test_instructions_are_short_in_tokens(encoder):
    rng = random.Random(0)
    lengths = [len(encoder.clip_tokenizer.tokenize(instruction(item, rng)).ids) for item in edits(1, 200)]
    assert max(lengths) <= 16


@pytest.mark.parametrize("template", ["video", "image"])
def test_batched_prompts_equal_single_ones(encoder, template):
    prompts = ["A red circle moves left.", "", "something the language has no word for: zebra"]
    with torch.no_grad():
        features, mask, pooled = text.encode_batch(encoder, prompts, template)
    for row, prompt in enumerate(prompts):
        single = encoder.encode(prompt, template)
        assert int(mask[row].sum()) == single.tokens
        assert_close(features[row, : single.tokens], single.features_LD, **CLOSE)
        assert_close(pooled[row], single.pooled_P, **CLOSE)


@pytest.mark.parametrize("side_px", [128, 256])
def test_batched_instructions_with_pictures_equal_single_ones(encoder, side_px):
    prompts = ["Make it red.", "", "turn the square into a circle", "say <|image_pad|>"]
    images = pictures(side_px, len(prompts))
    with torch.no_grad():
        features, mask, pooled = text.encode_batch(encoder, prompts, "image_edit", images)
    for row, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        single = encoder.encode(prompt, "image_edit", images=[image])
        assert int(mask[row].sum()) == single.tokens
        assert_close(features[row, : single.tokens], single.features_LD, **CLOSE)
        assert_close(pooled[row], single.pooled_P, **CLOSE)


def test_pictures_of_several_sizes_may_share_a_batch(encoder):
    images = [*pictures(128, 1), *pictures(256, 1)]
    with torch.no_grad():
        features, mask, _ = text.encode_batch(encoder, ["make it red", "make it red"], "image_edit", images)
    for row, image in enumerate(images):
        single = encoder.encode("make it red", "image_edit", images=[image]).features_LD
        assert_close(features[row, mask[row]], single, **CLOSE)


def test_the_picture_reaches_the_prompts_states(encoder):
    one, other = (encoder.encode("make it red", "image_edit", images=[image]) for image in pictures(128, 2))
    assert (one.features_LD - other.features_LD).abs().max() > 1e-2
    assert torch.equal(one.pooled_P, other.pooled_P)


def test_a_picture_for_each_prompt_or_none(encoder):
    with pytest.raises(ValueError):
        text.encode_batch(encoder, ["a", "b"], "image_edit", pictures(128, 1))
    with pytest.raises(TextError):
        text.encode_batch(encoder, ["a"], "no such template")


def test_the_qwen_folder_is_a_whole_qwen(folders, encoder):
    config = json.loads((folders[0] / "config.json").read_text())
    assert config["model_type"] == "qwen2_5_vl"
    assert config["vision_config"]["out_hidden_size"] == text.QWEN_WIDTH
    assert config["image_token_id"] == encoder.qwen_tokenizer.vision_ids[1]
    stored = load_file(folders[0] / "model.safetensors")
    assert any(name.startswith("visual.") for name in stored)
    assert {value.dtype for value in stored.values()} == {torch.float16}
    picture = patches(pictures(128, 1)[0])
    states = image_states(encoder.load_vision(), [picture])
    assert states.shape == (picture.tokens, text.QWEN_WIDTH) == (4, text.QWEN_WIDTH)


def test_the_folders_are_small(folders):
    assert sum(path.stat().st_size for folder in folders for path in folder.iterdir()) < 1_000_000


def test_held_out_combinations_never_reach_training(monkeypatch):
    seen = []
    for name in ("scene", "edit"):
        kept = getattr(text, name)

        def noted(*arguments, kept=kept, **options):
            seen.append(kept(*arguments, **options))
            return seen[-1]

        monkeypatch.setattr(text, name, noted)
    for kind in text.TEMPLATE_OF:
        text.examples(random.Random(0), kind, 60, unseen=False)
    scenes = [
        scene for item in seen for scene in ((item.before, item.after) if isinstance(item, Edit) else (item,))
    ]
    assert len(seen) == 60 * len(text.TEMPLATE_OF) and not any(map(draw.held_out, scenes))


def test_labels_say_what_an_instruction_changes():
    for wanted in islice(edits(7, 40), 40):
        labels = text.edit_labels(wanted)
        assert labels["kind"] == wanted.kind
        assert {name for name, value in labels.items() if value == text.UNCHANGED} == {
            f"new_{kind}" for kind in ("color", "shape", "background") if kind != wanted.kind
        }
        assert labels[f"new_{wanted.kind}"] == wanted.after.names[wanted.kind]


def test_the_questions_are_answered_by_the_last_token_and_the_pooled_state(folders):
    """A head sees the state of its own prompt: shuffled prompts shuffle the answers."""
    tokenizers = text.load_qwen_tokenizer(folders[0]), text.load_clip_tokenizer(folders[1])
    torch.manual_seed(0)
    reader = text.Reader(text.new_qwen(tokenizers[0], 900), text.new_clip(tokenizers[1], 900), tokenizers)
    prompts = ["a red circle", "on a navy background a blue square rises", "cross"]
    with torch.no_grad():
        straight = list(reader.answers(prompts, "video", [], ["color", "motion"]))
        turned = list(reader.answers(prompts[::-1], "video", [], ["color", "motion"]))
    assert [(tower, name) for tower, name, _ in straight] == [
        ("qwen", "color"), ("qwen", "motion"), ("clip", "color"), ("clip", "motion")
    ]  # fmt: skip
    for (_, _, logits), (_, _, other) in zip(straight, turned, strict=True):
        assert_close(logits, other.flip(0), **CLOSE)
        assert (logits[0] - logits[1]).abs().max() > 1e-3
