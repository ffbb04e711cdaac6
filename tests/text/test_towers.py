"""The text and vision towers against transformers' own models on the same weights."""

from __future__ import annotations

import inspect

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import TextError
from comfyui_kandinsky5.kandinsky_core.text import TEMPLATES, load_text_encoder
from comfyui_kandinsky5.kandinsky_core.text.images import patches
from comfyui_kandinsky5.kandinsky_core.text.tokens import CLIP_TOKENS
from torch.testing import assert_close

PROMPT = "A dog in a red hat, Кошка 🐶"
CLOSE = {"atol": 2e-5, "rtol": 0}


def ids_of(encoder, prompt=PROMPT, template="video", limit=256, image_tokens=()):
    return encoder.qwen_tokenizer.tokenize(prompt, TEMPLATES[template], limit, image_tokens)


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "image_edit"])
@torch.no_grad()
def test_features_are_the_final_normed_states_after_the_crop(encoder, qwen, template):
    features = encoder.encode(PROMPT, template).features_LD
    tokens = ids_of(encoder, template=template)
    before_norm = []
    hook = qwen.language_model.norm.register_forward_pre_hook(lambda _, given: before_norm.append(given[0]))
    reference = qwen.language_model(input_ids=torch.tensor(tokens.ids)[None]).last_hidden_state[0]
    hook.remove()
    assert_close(features, reference[tokens.crop :], **CLOSE)
    # ComfyUI's own encoder gives these states; they must be told apart.
    assert (features - before_norm[0][0, tokens.crop :]).abs().max() > 0.1


@torch.no_grad()
def test_padding_with_a_mask_changes_nothing(encoder, qwen):
    tokens = ids_of(encoder)
    ids_L, mask_L = tokens.padded(256, encoder.qwen_tokenizer.pad_id)
    assert ids_L.shape == (tokens.crop + 256,) and mask_L.sum() == tokens.kept
    padded = qwen.language_model(input_ids=ids_L[None]).last_hidden_state[0, tokens.crop :]
    assert_close(padded[mask_L], encoder.encode(PROMPT, "video").features_LD, **CLOSE)


@pytest.mark.parametrize("prompt", ["", PROMPT, "a red <|extra|> cube", "a long one " * 40])
@torch.no_grad()
def test_pooled_is_clips_pooler_output_of_the_raw_prompt(encoder, clip, prompt):
    result = encoder.encode(prompt, "video")
    ids_L, mask_L = encoder.clip_tokenizer.tokenize(prompt).padded(CLIP_TOKENS, encoder.clip_tokenizer.end_id)
    reference = clip(input_ids=ids_L[None], attention_mask=mask_L[None].long()).pooler_output[0]
    assert_close(result.pooled_P, reference, **CLOSE)


@torch.no_grad()
def test_pooled_ignores_the_config_of_the_published_clip(encoder, folders, tmp_path):
    # Published CLIP configs say eos_token_id 2, for which transformers pools at the largest id instead.
    import json
    import shutil

    copy = tmp_path / "clip"
    shutil.copytree(folders[1], copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"eos_token_id": 2}))
    prompt = "a red <|extra|> cube"
    legacy = load_text_encoder(folders[0], copy)
    assert_close(legacy.encode(prompt, "video").pooled_P, encoder.encode(prompt, "video").pooled_P, **CLOSE)


@pytest.mark.parametrize("prompt", ["make it night", ""])
@torch.no_grad()
def test_image_prompt_equals_the_whole_model(encoder, qwen, prompt):
    generator = torch.Generator().manual_seed(2)
    images = [torch.rand(3, *size, generator=generator) * 2 - 1 for size in ((128, 192), (224, 112))]
    pictures = [patches(image) for image in images]
    tokens = ids_of(encoder, prompt, "image_edit", 1024, [picture.tokens for picture in pictures])
    ids = torch.tensor(tokens.ids)[None]
    types = (ids == encoder.qwen_tokenizer.vision_ids[1]).int()
    inputs = {"mm_token_type_ids": types} if "mm_token_type_ids" in inspect.signature(qwen.forward).parameters else {}
    reference = qwen(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.cat([picture.values_NP for picture in pictures]),
        image_grid_thw=torch.tensor([[1, picture.rows, picture.columns] for picture in pictures]),
        **inputs,
    ).last_hidden_state[0]
    result = encoder.encode(prompt, "image_edit", images=images)
    assert_close(result.features_LD, reference[tokens.crop :], atol=1e-4, rtol=0)
    assert result.tokens == len(tokens.ids) - tokens.crop


def test_image_changes_the_features_and_its_place_matters(encoder):
    images = [torch.zeros(3, 128, 128), torch.ones(3, 128, 128)]
    one, other = (encoder.encode("swap", "image_edit", images=order).features_LD for order in (images, images[::-1]))
    assert (one - other).abs().max() > 1e-2


def test_spelled_out_image_token_is_text(encoder):
    result = encoder.encode("say <|image_pad|>", "image_edit", images=[torch.zeros(3, 128, 128)])
    assert torch.isfinite(result.features_LD).all()


def test_layers_are_reported_and_can_cancel(encoder):
    seen = []
    encoder.encode(PROMPT, "image", on_layer=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 5) for done in range(1, 6)]

    class Cancelled(Exception):
        pass

    def cancel(done, _total):
        if done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        encoder.encode(PROMPT, "image", on_layer=cancel)
    seen.clear()
    encoder.encode(PROMPT, "image")
    assert not seen


def test_what_a_report_returns_changes_nothing(encoder):
    reported = encoder.encode(PROMPT, "image", on_layer=lambda done, total: torch.zeros(done, total))
    silent = encoder.encode(PROMPT, "image")
    assert torch.equal(reported.features_LD, silent.features_LD)
    assert torch.equal(reported.pooled_P, silent.pooled_P)


def test_features_do_not_keep_the_template_alive(encoder):
    features = encoder.encode("x", "video").features_LD
    assert features.untyped_storage().nbytes() == features.nbytes
    assert not features.requires_grad


def test_moving_and_freeing(folders):
    encoder = load_text_encoder(*folders, dtype=torch.bfloat16, device="cpu")
    result = encoder.encode(PROMPT, "video")
    assert result.features_LD.dtype == torch.bfloat16 and result.pooled_P.dtype == torch.float32
    encoder.free()
    assert all(value.is_meta for value in encoder.state_dict().values())
    with pytest.raises(TextError, match="freed"):
        encoder.encode(PROMPT, "video")
