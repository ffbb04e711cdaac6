"""Frames from pieces: whatever order they come in, whole frames leave in time order, each once."""

from __future__ import annotations

import numpy as np
import pytest
from comfyui_kandinsky5.kandinsky_core.io.assembly import FrameAssembly
from hypothesis import given, settings
from hypothesis import strategies as st

SHAPE = (7, 6, 10)
CLIP = np.random.default_rng(0).integers(0, 256, (*SHAPE, 3), dtype=np.uint8)


def pieces(frame_cuts, row_cuts, column_cuts):
    """Cut the clip at these places along each axis."""
    sides = [
        [slice(a, b) for a, b in zip((0, *cuts), (*cuts, side), strict=True)]
        for cuts, side in zip((frame_cuts, row_cuts, column_cuts), SHAPE, strict=True)
    ]
    return [(t, y, x) for y in sides[1] for x in sides[2] for t in sides[0]]


def assemble(places, folder):
    out = []
    with FrameAssembly(SHAPE, lambda frame: out.append(frame.copy()), folder) as assembly:
        for place in places:
            assembly.put(place, CLIP[place])
    return out


def test_whole_frames_pass_straight_through(tmp_path, monkeypatch):
    monkeypatch.setattr(FrameAssembly, "_keep", None)
    assert np.array_equal(assemble(pieces((1, 3, 5), (), ()), tmp_path), CLIP)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_order_of_any_cut_gives_the_clip(tmp_path_factory, data):
    cuts = [sorted(data.draw(st.sets(st.integers(1, side - 1), max_size=2))) for side in SHAPE]
    order = data.draw(st.permutations(pieces(*cuts)))
    assert np.array_equal(assemble(order, tmp_path_factory.getbasetemp()), CLIP)


def test_a_clip_may_begin_in_whole_frames_and_go_on_in_tiles(tmp_path):
    tiles = [place for place in pieces((2, 5), (3,), (4,)) if place[0].start >= 2]
    assert np.array_equal(assemble([(slice(0, 2), slice(0, 6), slice(0, 10)), *tiles], tmp_path), CLIP)


def test_frames_leave_as_soon_as_they_are_complete(tmp_path):
    seen = []
    with FrameAssembly(SHAPE, lambda frame: seen.append(len(seen)), tmp_path) as assembly:
        left, right = slice(0, 4), slice(4, 10)
        assembly.put((slice(0, 7), slice(0, 6), left), CLIP[:, :, left])
        assert not seen
        assembly.put((slice(0, 3), slice(0, 6), right), CLIP[:3, :, right])
        assert len(seen) == 3


def test_nothing_is_left_on_disk(tmp_path):
    places = pieces((), (3,), ())
    assemble(places, tmp_path)
    with pytest.raises(ZeroDivisionError), FrameAssembly(SHAPE, lambda _: 1 / 0, tmp_path) as assembly:
        for place in places:
            assembly.put(place, CLIP[place])
    assert not list(tmp_path.iterdir())
