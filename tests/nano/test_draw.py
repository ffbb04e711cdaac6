"""Clips are a function of seed and index, begin alike, scale with the picture, and keep held-out combinations apart."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

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


@pytest.mark.parametrize("shape", draw.SHAPES)
def test_nothing_but_the_softness_of_a_corner_touches_the_border(shape):
    far = 0.5 + draw.OFFSET
    edge = torch.ones(64, 64, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    for motion, x, y in itertools.product(draw.MOTIONS, (far, 1 - far), (far, 1 - far)):
        item = draw.Scene(
            shape=shape, color="white", motion=motion, background="black", center=(x, y), radius=draw.RADIUS[1],
            travel=draw.TRAVEL[1], growth=draw.GROWTH[1], turn=draw.TURN[1],
        )  # fmt: skip
        paper, ink = draw.BACKGROUNDS["black"][0], draw.COLORS["white"][0]
        opacity = (draw.draw(item, size_px=64, frames=3)[-1, ..., 0][edge] - paper) / (ink - paper)
        assert opacity.max() < 0.3 and (opacity > 0.01).sum() <= 3


@settings(max_examples=25, deadline=None)
@given(index=st.integers(0, 10_000), motion=st.sampled_from(draw.MOTIONS))
def test_the_first_frame_does_not_tell_the_motion(index, motion):
    item = draw.scene(2, index)
    other = replace(item, motion=motion)
    assert torch.equal(draw.draw(other)[0], draw.draw(item)[0])
    assert torch.equal(draw.draw(other, frames=1)[0], draw.draw(item, frames=17)[0])


def test_what_the_names_leave_open_does_not_depend_on_the_motion():
    """Place and size are drawn alike for every motion, so no statistic of the first frame tells it either."""
    ranges = {"radius": draw.RADIUS, "travel": draw.TRAVEL, "growth": draw.GROWTH, "turn": draw.TURN}
    starts = {motion: [] for motion in draw.MOTIONS}
    for item in draw.scenes(3, 1600):
        starts[item.motion].append((*item.center, item.radius))
        assert all(low <= getattr(item, name) <= high for name, (low, high) in ranges.items())
        assert max(abs(place - 0.5) for place in item.center) <= draw.OFFSET
    means = torch.stack([torch.tensor(values).mean(0) for values in starts.values()])
    spread = torch.tensor([draw.OFFSET, draw.OFFSET, (draw.RADIUS[1] - draw.RADIUS[0]) / 2])
    assert ((means - means.mean(0)).abs() < 0.25 * spread).all()


@pytest.mark.parametrize("size_px", [128, 256])
def test_a_larger_picture_is_the_same_picture_with_sharper_edges(size_px):
    item = draw.scene(1, 3)
    small, large = draw.draw(item, size_px=64), draw.draw(item, size_px=size_px)
    pooled = torch.nn.functional.avg_pool2d(large.movedim(-1, 1), size_px // 64).movedim(1, -1)
    contrast = (small.amax((0, 1, 2)) - small.amin((0, 1, 2))).max()
    near = (pooled - small).abs().amax(-1) / contrast
    assert near.mean() < 0.02 and near.max() < 0.35
    # The soft edge is as many pixels wide at every size.
    soft = [
        (((clip - clip[0, 0, 0]).abs().amax(-1) / contrast - 0.5).abs() < 0.45).sum().item() / side
        for clip, side in ((small, 64), (large, size_px))
    ]
    assert soft[1] == pytest.approx(soft[0], rel=0.1)


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


def test_a_held_out_picture_is_one_whatever_moves():
    for item in draw.scenes(2, 400):
        motions = [replace(item, motion=motion) for motion in draw.MOTIONS]
        assert {draw.held_out_picture(other) for other in motions} == {draw.held_out_picture(item)}
        assert not draw.held_out_picture(item) or all(map(draw.held_out, motions))
    assert 0.05 < sum(map(draw.held_out_picture, draw.scenes(2, 400))) / 400 < 0.2


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
