"""Clips are a function of seed and index, scale with the picture, and keep held-out combinations apart."""

from __future__ import annotations

import random

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.nano import caption as words
from comfyui_kandinsky5.kandinsky_core.nano import draw
from hypothesis import given, settings
from hypothesis import strategies as st


def test_the_same_seed_draws_the_same_clip():
    first, again = (draw.draw(draw.scene(3, 14)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, draw.draw(draw.scene(3, 15)))
    assert not torch.equal(first, draw.draw(draw.scene(4, 14)))


def test_a_clip_does_not_depend_on_the_order_of_drawing():
    later = [draw.scene(5, index) for index in reversed(range(6))]
    assert later[::-1] == list(draw.scenes(5, 6))


@settings(max_examples=25, deadline=None)
@given(index=st.integers(0, 10_000), size_px=st.sampled_from([32, 64, 128]), frames=st.sampled_from([1, 5, 17]))
def test_clips_are_whole_and_in_range(index, size_px, frames):
    clip = draw.draw(draw.scene(1, index), size_px=size_px, frames=frames)
    assert clip.shape == (frames, size_px, size_px, 3)
    assert clip.dtype == torch.float32
    assert clip.min() >= 0 and clip.max() <= 1
    # The object never touches the border, where the background is measured.
    assert clip[:, 0].std(dim=1).max() < 0.02


def test_a_larger_picture_is_the_same_picture():
    item = draw.scene(1, 3)
    small, large = draw.draw(item, size_px=64), draw.draw(item, size_px=128)
    pooled = torch.nn.functional.avg_pool2d(large.movedim(-1, 1), 2).movedim(1, -1)
    assert (pooled - small).abs().mean() < 0.002 and (pooled - small).abs().max() < 0.1


def test_motion_moves_and_a_part_of_the_time_is_a_part_of_the_clip():
    item = draw.Scene(shape="square", color="red", motion="right", background="black")
    whole = draw.draw(item)
    assert torch.equal(draw.draw(item, frames=9, start=0.5, stop=1.0)[-1], whole[-1])
    columns = whole[..., 0].mean(1) @ torch.arange(64.0) / whole[..., 0].mean(1).sum(1)
    assert (columns.diff() > 0).all()


def test_held_out_combinations_never_reach_training():
    training = list(draw.scenes(1, 400, unseen=False))
    assert not any(map(draw.held_out, training))
    assert all(map(draw.held_out, draw.scenes(1, 50, unseen=True)))
    for pair in draw.HELD_OUT_PAIRS:
        assert not any(all(item.names[key] == value for key, value in pair.items()) for item in training)
    share = sum(map(draw.held_out, draw.scenes(2, 2000))) / 2000
    assert 0.1 < share < 0.3


@pytest.mark.parametrize("motion", draw.MOTIONS)
def test_captions_name_what_is_there(motion):
    rng = random.Random(0)
    for shape, background in zip(draw.SHAPES, draw.BACKGROUNDS, strict=False):
        item = draw.Scene(shape=shape, color="orange", motion=motion, background=background)
        text = words.caption(item, rng)
        assert shape in text and "orange" in text.lower()
        assert words.BACKGROUND_PHRASES[background] in text
        assert any(phrase in text for phrase in words.MOTION_PHRASES[motion])
        still = words.caption(item, rng, moving=False)
        assert not any(phrase in still for phrase in words.MOTION_PHRASES[motion])


def test_captions_vary():
    rng = random.Random(1)
    item = draw.scene(1, 0)
    assert len({words.caption(item, rng) for _ in range(60)}) > 25
