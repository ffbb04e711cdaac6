"""What is kept of a prompt, what is dropped, and what is refused."""

from __future__ import annotations

import logging

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import TextError
from comfyui_kandinsky5.kandinsky_core.text import TEMPLATES, load_text_encoder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("template", ["video", "image", "image2video"])
def test_empty_prompt_is_one_token(encoder, template):
    result = encoder.encode("", template)
    assert result.features_LD.shape == (1, encoder.width)
    assert (result.tokens, result.dropped, result.clip_tokens, result.clip_dropped) == (1, 0, 2, 0)


def test_ten_thousand_words_are_cut_counted_and_logged(encoder, caplog):
    prompt = " ".join(["word"] * 10_000)
    with caplog.at_level(logging.WARNING, "kandinsky5"):
        result = encoder.encode(prompt, "video")
    everything = len(prompt) + 1  # this tokenizer: one token a byte, and the closing marker
    assert result.features_LD.shape[0] == result.tokens == TEMPLATES["video"].max_tokens
    assert result.tokens + result.dropped == everything
    assert result.clip_tokens == 77 and result.clip_dropped == len(prompt) - 75
    assert f"drops {result.dropped}" in caplog.text


def test_the_limit_is_reached_before_anything_is_dropped(encoder):
    exact = encoder.encode("x" * 255, "video")
    assert (exact.tokens, exact.dropped) == (256, 0)
    over = encoder.encode("x" * 256, "video")
    assert (over.tokens, over.dropped) == (256, 1)
    # Causal: the cut prompt is a prefix, only the closing marker is gone.
    torch.testing.assert_close(over.features_LD[:255], exact.features_LD[:255], atol=2e-5, rtol=0)


def test_max_tokens_is_the_callers(encoder):
    assert encoder.encode("x" * 300, "image", max_tokens=40).tokens == 40
    for wrong in (0, -3, 5000):
        with pytest.raises(TextError, match="max_tokens"):
            encoder.encode("x", "image", max_tokens=wrong)


def test_images_are_never_cut(encoder):
    image = torch.zeros(3, 112, 112)  # 56 px after halving: 4 tokens, and 3 markers
    result = encoder.encode("word " * 1000, "image_edit", images=[image])
    assert result.tokens == 1024 and result.dropped == 5000 - (1024 - 7)
    with pytest.raises(TextError, match="image"):
        encoder.encode("x", "image_edit", images=[image], max_tokens=5)


@pytest.mark.parametrize("prompt", [None, 7, b"bytes", ["a"]])
def test_only_text_is_a_prompt(encoder, prompt):
    with pytest.raises(TextError, match="must be text"):
        encoder.encode(prompt, "video")


def test_half_a_character_is_named(encoder):
    with pytest.raises(TextError, match="UTF-16"):
        encoder.encode("cat \ud83d", "video")


def test_unusable_requests_are_named(encoder):
    with pytest.raises(TextError, match="video, image, image_edit"):
        encoder.encode("x", "poem")
    with pytest.raises(TextError, match="image_edit"):
        encoder.encode("x", "video", images=[torch.zeros(3, 64, 64)])
    with pytest.raises(TextError, match=r"\[3, height, width\]"):
        encoder.encode("x", "image_edit", images=[torch.zeros(64, 64, 3)])
    with pytest.raises(TextError, match="Nothing is left"):
        encoder.encode("", "image_edit")


def test_nan_weights_are_named(folders):
    encoder = load_text_encoder(*folders, dtype=torch.bfloat16)
    encoder.qwen.norm.weight[0] = float("nan")
    with pytest.raises(TextError, match=r"Qwen2\.5-VL gave NaN"):
        encoder.encode("x", "video")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.text(max_size=120), limit=st.integers(1, 200), template=st.sampled_from(["video", "image"]))
def test_kept_and_dropped_add_up(encoder, prompt, limit, template):
    chosen = TEMPLATES[template]
    whole = encoder.qwen_tokenizer.tokenize(prompt, chosen, 10_000)
    cut = encoder.qwen_tokenizer.tokenize(prompt, chosen, limit)
    assert whole.dropped == 0
    assert cut.kept + cut.dropped == whole.kept and cut.kept <= limit
    assert cut.ids == whole.ids[: len(cut.ids)]
    ids_L, mask_L = cut.padded(limit, encoder.qwen_tokenizer.pad_id)
    assert len(ids_L) == cut.crop + limit and mask_L.sum() == cut.kept
