"""The variant table against the published facts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from comfyui_kandinsky5.kandinsky_core.errors import VariantError
from comfyui_kandinsky5.kandinsky_core.shapes import NABLA_MULTIPLE_PX, VideoShape
from comfyui_kandinsky5.kandinsky_core.variants import VARIANTS, VIDEO_LITE, family, variant

# name: (steps, guidance, attention, P, spatial RoPE scale) as in the published configuration files
PUBLISHED = {
    "lite_t2v_5s_pretrain": (50, 5.0, "full", 0, 2),
    "lite_t2v_5s_sft": (50, 5.0, "full", 0, 2),
    "lite_t2v_5s_nocfg": (50, 1.0, "full", 0, 2),
    "lite_t2v_5s_distilled16": (16, 1.0, "full", 0, 2),
    "lite_t2v_10s_pretrain": (50, 5.0, "nabla", 0.9, 2),
    "lite_t2v_10s_sft": (50, 5.0, "nabla", 0.9, 2),
    "lite_t2v_10s_nocfg": (50, 1.0, "nabla", 0.9, 2),
    "lite_t2v_10s_distilled16": (16, 1.0, "nabla", 0.9, 2),
    "lite_i2v_5s": (50, 5.0, "full", 0, 2),
    "lite_t2i": (50, 3.5, "full", 0, 1),
    "lite_i2i": (50, 3.5, "full", 0, 1),
    "pro_t2v_5s_sd": (50, 5.0, "full", 0, 2),
    "pro_t2v_5s_hd": (50, 5.0, "nabla", 0.8, 3.16),
    "pro_t2v_10s_sd": (50, 5.0, "nabla", 0.9, 2),
    "pro_t2v_10s_hd": (50, 5.0, "nabla", 0.7, 3.16),
    "pro_i2v_5s_sd": (50, 5.0, "full", 0, 2),
    "pro_i2v_5s_hd": (50, 5.0, "nabla", 0.8, 3.16),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    row = variant(name)
    got = (row.steps, row.guidance, row.attention.kind, row.attention.P, row.rope_scale[1])
    assert got == PUBLISHED[name] and row.rope_scale[0] == 1
    if row.attention.kind == "nabla":
        assert (row.attention.wT, row.attention.wH, row.attention.wW) == (11, 3, 3)


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
    with pytest.raises(VariantError, match="head width"):
        replace(VIDEO_LITE, axes_dims=(16, 24, 26))
    with pytest.raises(VariantError, match="Known: lite_t2v_5s_sft"):
        variant("kandinsky6")
