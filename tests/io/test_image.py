"""Sizes and resizing equal the released preprocessing."""

from __future__ import annotations

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.io.image import area_size, cover, nearest_size, resize, to_uint8
from comfyui_kandinsky5.kandinsky_core.variants import SIZES_1024
from hypothesis import given, settings
from hypothesis import strategies as st


def test_resizing_equals_the_released_one_to_the_bit(golden):
    misc = golden("misc")
    image = misc["i2v.resize_in"]
    assert torch.equal(resize(image, 32, 48), misc["i2v.resize_out"])
    assert torch.equal(cover(image, 32, 40), misc["i2i.resize_video_out"])


def test_sizes_equal_the_released_ones(golden):
    misc = golden("misc")
    for height, width, area, multiple, *size, _ in misc["i2v.resize_image_sizes"].tolist():
        assert area_size(int(height), int(width), int(area), int(multiple)) == tuple(size)
    for height, width, *size in misc["i2i.find_nearest"].tolist():
        assert nearest_size(height, width, SIZES_1024) == tuple(size)


@given(st.integers(1, 9000), st.integers(1, 9000), st.sampled_from([16, 128]))
def test_an_area_size_is_always_legal(height, width, multiple):
    size = area_size(height, width, 512 * 768, multiple)
    assert all(side >= multiple and side % multiple == 0 for side in size)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 50), st.integers(1, 50))
def test_covering_fills_the_target_from_any_size(height, width, target_h, target_w):
    covered = cover(torch.full((1, 3, height, width), 200, dtype=torch.uint8), target_h, target_w)
    assert covered.shape == (1, 3, target_h, target_w)
    assert covered.unique().tolist() == [200]  # no padding


@pytest.mark.parametrize(
    ("value", "level"), [(-1, 0), (0, 0), (0.499 / 255, 0), (0.501 / 255, 1), (254.6 / 255, 255), (2, 255)]
)
def test_levels_round_and_clamp(value, level):
    assert to_uint8(torch.tensor([value])).item() == level


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_level_survives_a_round_trip(dtype):
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8((levels.float() / 255).to(dtype)), levels)
