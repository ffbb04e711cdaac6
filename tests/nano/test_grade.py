"""The grader is right about true clips, also damaged ones, and says no to wrong labels and to rubbish."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.nano import draw
from comfyui_kandinsky5.kandinsky_core.nano.grade import ATTRIBUTES, NOTHING, grade
from comfyui_kandinsky5.kandinsky_core.nano.score import summary

COUNT = 150


@pytest.fixture(scope="module")
def true_clips():
    """Scenes of a stream no training uses, with their pictures."""
    return [(item, draw.draw(item)) for item in draw.scenes(987_654, COUNT)]


def shares(pairs):
    """Share of right answers per attribute."""
    return {name: row["share"] for name, row in summary(pairs).items()}


def test_true_clips_are_recognised(true_clips):
    found = shares([(item, grade(clip)) for item, clip in true_clips])
    assert all(share >= 0.98 for share in found.values()), found


def test_blurred_and_noisy_clips_are_recognised(true_clips, damaged):
    found = shares([(item, grade(damaged(clip))) for item, clip in true_clips[:60]])
    assert all(share >= 0.95 for share in found.values()), found


@pytest.mark.parametrize("size_px", [32, 128, 256])
def test_other_sizes_are_recognised(size_px):
    pairs = [(item, grade(draw.draw(item, size_px=size_px))) for item in draw.scenes(4321, 24)]
    assert all(share >= 0.95 for share in shares(pairs).values()), shares(pairs)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_wrong_labels_are_noticed(true_clips, attribute):
    choices = {"color": tuple(draw.COLORS), "shape": draw.SHAPES, "motion": draw.MOTIONS,
               "background": tuple(draw.BACKGROUNDS)}[attribute]  # fmt: skip
    for item, clip in true_clips[:30]:
        true = item.names[attribute]
        wrong = choices[(choices.index(true) + 1) % len(choices)]
        matches = grade(clip).matches(replace(item, **{attribute: wrong}))
        assert not matches[attribute]
        assert all(right for name, right in matches.items() if name != attribute)


def test_a_reversed_clip_moves_the_other_way(true_clips):
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up", "grow": "shrink", "shrink": "grow",
                "rotate": "rotate", "still": "still"}  # fmt: skip
    for item, clip in true_clips[:40]:
        assert grade(clip.flip(0)).motion == opposite[item.motion]


def test_a_frozen_clip_is_still(true_clips):
    assert all(grade(clip[:1].expand(17, -1, -1, -1)).motion == "still" for _, clip in true_clips[:20])


def test_rubbish_has_no_name():
    plain = grade(torch.full((17, 64, 64, 3), 0.5))
    assert (plain.color, plain.shape, plain.motion) == (NOTHING,) * 3
    assert plain.background == "gray"
    noise = torch.rand(17, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    assert grade(noise).shape == NOTHING
    lime = torch.tensor([0.5, 1.0, 0.0]).expand(17, 64, 64, 3)
    assert grade(lime).background == NOTHING


def test_a_picture_has_no_motion(true_clips):
    item, clip = true_clips[0]
    result = grade(clip[:1])
    assert result.motion == NOTHING
    assert result.color == item.color and result.shape == item.shape


def test_a_shape_that_turns_into_another_is_neither():
    clips = [
        draw.draw(draw.Scene(shape=shape, color="red", motion="still", background="black")) for shape in draw.SHAPES
    ]
    for first, second in zip(clips, [*clips[1:], clips[0]], strict=True):
        changed = grade(torch.cat([first[:8], second[8:]]))
        assert (changed.color, changed.shape, changed.background) == ("red", NOTHING, "black")


def test_a_shape_that_dissolves_is_none():
    item = draw.Scene(shape="square", color="red", motion="still", background="black")
    clip = draw.draw(item)
    generator = torch.Generator().manual_seed(0)
    holes = (torch.rand(1, 8, 8, generator=generator) < 0.5).float().repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert grade(clip).shape == "square"
    assert grade(torch.lerp(clip, clip[:1, :1, :1], 0.9 * holes[..., None])).shape == NOTHING


def test_half_of_the_drawn_motion_is_motion_and_a_quarter_is_none():
    for motion in ("left", "down", "grow", "rotate"):
        item = draw.Scene(shape="triangle", color="cyan", motion=motion, background="navy")
        assert grade(draw.draw(item, stop=0.6)).motion == motion
        assert grade(draw.draw(item, stop=0.3)).motion == "still"
