"""Pixel, latent and token arithmetic."""

from __future__ import annotations

import pytest
from comfyui_kandinsky5.kandinsky_core import shapes
from comfyui_kandinsky5.kandinsky_core.errors import ShapeError
from comfyui_kandinsky5.kandinsky_core.shapes import VideoShape
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("width", "height", "frames", "latent", "tokens"),
    [
        (768, 512, 121, (31, 64, 96), 47_616),
        (768, 512, 241, (61, 64, 96), 93_696),
        (512, 512, 241, (61, 64, 64), 62_464),
        (1280, 768, 121, (31, 96, 160), 119_040),
        (1024, 1024, 1, (1, 128, 128), 4_096),
        (1408, 640, 121, (31, 80, 176), 109_120),
    ],
)
def test_published_sizes(width, height, frames, latent, tokens):
    shape = VideoShape(width_px=width, height_px=height, frames=frames)
    assert shape.latent_thw == latent and shape.tokens == tokens


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(-3, 500))
def test_nearest_is_legal_and_idempotent(width, height, frames):
    shape = VideoShape.nearest(width, height, frames)
    assert VideoShape.nearest(shape.width_px, shape.height_px, shape.frames) == shape
    assert abs(shape.width_px - max(width, 16)) <= 8 and abs(shape.frames - max(frames, 1)) <= 2


@given(st.integers(1, 300))
def test_frames_and_latents_are_inverse(latents):
    assert shapes.latent_frames(shapes.pixel_frames(latents)) == latents


@pytest.mark.parametrize("bad", [(770, 512, 121), (768, 0, 121), (768, 512, 0), (768, 512, 120), (-16, 512, 1)])
def test_illegal_sizes_name_the_nearest_legal_one(bad):
    width, height, frames = bad
    with pytest.raises(ShapeError, match="Use "):
        VideoShape(width_px=width, height_px=height, frames=frames)
