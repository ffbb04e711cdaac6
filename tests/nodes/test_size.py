"""Size & Length, Empty Latent: what comes out can always be generated."""

from __future__ import annotations

import pytest
from comfyui_kandinsky5.kandinsky_core.errors import ShapeError
from comfyui_kandinsky5.kandinsky_core.shapes import VideoShape
from comfyui_kandinsky5.nodes.size import CUSTOM, SIZES, K5EmptyLatent, K5Size, size_message
from hypothesis import given
from hypothesis import strategies as st


def size(size=CUSTOM, width=768, height=512, length=121, seconds=0.0, fps=24.0, multiple="16"):
    return K5Size.execute(size, width, height, length, seconds, fps, multiple).args


@given(
    width=st.integers(1, 4000),
    height=st.integers(1, 4000),
    length=st.integers(1, 500),
    seconds=st.floats(0, 60),
    multiple=st.sampled_from(["16", "128"]),
)
def test_any_wish_becomes_a_legal_shape_close_to_it(width, height, length, seconds, multiple):
    w, h, frames, fps, _ = size(width=width, height=height, length=length, seconds=seconds, multiple=multiple)
    VideoShape(width_px=w, height_px=h, frames=frames)
    step = int(multiple)
    assert w % step == h % step == 0
    assert abs(w - max(width, step)) <= step // 2 and abs(h - max(height, step)) <= step // 2
    wanted = round(seconds * fps) + 1 if seconds else length
    assert abs(frames - wanted) <= 2


def test_report_names_exactly_what_changed():
    assert size(width=770, length=121)[4].splitlines()[1:] == ["width: 770 → 768"]
    assert len(size()[4].splitlines()) == 1
    assert size(seconds=5.0)[2] == 121 and size(seconds=10.0)[2] == 241


@pytest.mark.parametrize("name", [name for name in SIZES if name != CUSTOM])
def test_published_sizes_are_taken_as_they_are(name):
    width, height, _, _, report = size(name, width=16, height=16)
    assert SIZES[name] == (width, height) and len(report.splitlines()) == 1
    assert f"{width}x{height} (" in name


def test_unknown_size_is_named():
    with pytest.raises(ShapeError, match="Choose one of: custom"):
        size("768 by 512")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((770, 512, 5), "Use 768"),
        ((768, 8, 5), "Use 16"),
        ((768, 512, 0), "Use 1"),
        ((768, 512, 6), "Use 5"),
        ((8208, 512, 5), "8192 or less"),
        ((768, 512, 5001), "4097 or less"),
    ],
)
def test_illegal_size_is_refused_with_a_legal_one(given, words):
    assert words in size_message(*given)


def test_linked_values_pass_until_they_are_known():
    assert size_message(None, None, None) is True
    assert size_message(None, 8, None) is not True


@pytest.mark.parametrize(("length", "shape"), [(1, (2, 16, 6, 8)), (9, (2, 16, 3, 6, 8))])
def test_empty_latent_is_a_clip_or_a_picture(length, shape):
    latent = K5EmptyLatent.execute(64, 48, length, 2).args[0]
    assert tuple(latent["samples"].shape) == shape and not latent["samples"].any()
