"""The variant table against the published facts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from comfyui_kandinsky5.kandinsky_core.errors import VariantError
from comfyui_kandinsky5.kandinsky_core.shapes import NABLA_MULTIPLE_PX, VideoShape
from comfyui_kandinsky5.kandinsky_core.variants import VARIANTS, VIDEO_LITE, family, variant

NEGATIVE = (
    "Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, low quality, ugly, deformed, "
    "walking backwards"
)
SD, HD, IMAGE = (1.0, 2.0, 2.0), (1.0, 3.16, 3.16), (1.0, 1.0, 1.0)
CLASS_512 = {(512, 512), (512, 768), (768, 512)}
CLASS_1024 = {(1024, 1024), (640, 1408), (1408, 640), (768, 1280), (1280, 768), (896, 1152), (1152, 896)}

# As published: steps, guidance, NABLA mass (0: full attention), RoPE scale, schedule shift, frames, normalises, file.
PUBLISHED = {
    "lite_t2v_5s_pretrain": (50, 5.0, 0, SD, 5, 121, False, "kandinsky5lite_t2v_pretrain_5s"),
    "lite_t2v_5s_sft": (50, 5.0, 0, SD, 5, 121, False, "kandinsky5lite_t2v_sft_5s"),
    "lite_t2v_5s_nocfg": (50, 1.0, 0, SD, 5, 121, False, "kandinsky5lite_t2v_nocfg_5s"),
    "lite_t2v_5s_distilled16": (16, 1.0, 0, SD, 5, 121, False, "kandinsky5lite_t2v_distilled16steps_5s"),
    "lite_t2v_10s_pretrain": (50, 5.0, 0.9, SD, 10, 241, False, "kandinsky5lite_t2v_pretrain_10s"),
    "lite_t2v_10s_sft": (50, 5.0, 0.9, SD, 10, 241, False, "kandinsky5lite_t2v_sft_10s"),
    "lite_t2v_10s_nocfg": (50, 1.0, 0.9, SD, 10, 241, False, "kandinsky5lite_t2v_nocfg_10s"),
    "lite_t2v_10s_distilled16": (16, 1.0, 0.9, SD, 10, 241, False, "kandinsky5lite_t2v_distilled16steps_10s"),
    "lite_i2v_5s": (50, 5.0, 0, SD, 10, 121, True, "kandinsky5lite_i2v_5s"),
    "lite_t2i": (50, 3.5, 0, IMAGE, 3, 1, False, "kandinsky5lite_t2i"),
    "lite_i2i": (50, 3.5, 0, IMAGE, 3, 1, False, "kandinsky5lite_i2i"),
    "pro_t2v_5s_sd": (50, 5.0, 0, SD, 5, 121, False, "kandinsky5pro_t2v_sft_5s"),
    "pro_t2v_5s_hd": (50, 5.0, 0.8, HD, 5, 121, False, "kandinsky5pro_t2v_sft_5s"),
    "pro_t2v_10s_sd": (50, 5.0, 0.9, SD, 5, 241, False, "kandinsky5pro_t2v_sft_10s"),
    "pro_t2v_10s_hd": (50, 5.0, 0.7, HD, 5, 241, False, "kandinsky5pro_t2v_sft_10s"),
    "pro_i2v_5s_sd": (50, 5.0, 0, SD, 10, 121, True, "kandinsky5pro_i2v_sft_5s"),
    "pro_i2v_5s_hd": (50, 5.0, 0.8, HD, 5, 121, True, "kandinsky5pro_i2v_sft_5s"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    steps, guidance, mass, rope, shift, frames, normalises, file = PUBLISHED[name]
    row = variant(name)
    assert (row.steps, row.guidance, row.rope_scale, row.shift) == (steps, guidance, rope, shift)
    assert (row.frames, row.first_frame_norm, row.files) == ((frames,), normalises, (f"{file}.safetensors",))
    assert (row.attention.kind, row.attention.P) == ("nabla" if mass else "full", mass)
    if mass:
        assert (row.attention.wT, row.attention.wH, row.attention.wW) == (11, 3, 3)
    is_image = frames == 1
    assert (row.vae.kind, row.vae.scaling_factor) == (("flux", 0.3611) if is_image else ("hunyuan", 0.476986))
    assert (row.qwen_tokens, row.clip_tokens) == (512 if is_image else 256, 77)
    assert row.negative == ("" if is_image else NEGATIVE)
    assert set(row.sizes) == (CLASS_512 if rope == SD else CLASS_1024) and row.fps == 24


@pytest.mark.parametrize("row", VARIANTS.values(), ids=VARIANTS)
def test_rows_are_consistent(row):
    assert VARIANTS[row.name] is row and row in family(row.family)
    assert len({other.spec for other in family(row.family)}) == 1
    for height, width in row.sizes:
        for frames in row.frames:
            VideoShape(width_px=width, height_px=height, frames=frames)
        if row.attention.kind == "nabla":
            assert height % NABLA_MULTIPLE_PX == 0 and width % NABLA_MULTIPLE_PX == 0
    assert (row.guidance == 1.0) == bool({"nocfg", "distilled"} & set(row.tags))


def test_editing_weights_are_not_video_weights():
    edit = variant("lite_i2i").spec
    assert edit.visual_embed_dim == 33 and not edit.visual_cond
    assert variant("lite_t2i").spec.visual_embed_dim == 16


def test_bad_specs_and_names_are_refused():
    with pytest.raises(VariantError, match="at least 1"):
        replace(VIDEO_LITE, axes_dims=(0, 0, 0))
    with pytest.raises(VariantError, match="head width"):
        replace(VIDEO_LITE, axes_dims=(16, 24, 26))
    with pytest.raises(VariantError, match="Known: lite_t2v_5s_sft"):
        variant("kandinsky6")


def test_rotary_scale_holds_at_every_size_unless_it_follows_the_picture():
    lite, nano = variant("lite_t2v_5s_sft"), variant("nano_video")
    assert lite.rope_at(64, 96) == lite.rope_at(8, 8) == (1.0, 2.0, 2.0)
    assert nano.rope_at(8, 8) == (1.0, 1.0, 1.0) and nano.rope_at(32, 32) == (1.0, 4.0, 4.0)
    t, h, w = nano.rope_at(8, 32)
    assert (t, h) == (1.0, w) and h == pytest.approx(2.0)  # both axes alike: nothing is stretched
