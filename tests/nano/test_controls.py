"""The family notices what is broken: each break costs the shipped weights at least 20 points where it must show.

48 held-out prompts at 64 px. A drop of 20 points there is more than three standard errors from none.
"""

from __future__ import annotations

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.nano import controls, draw, files
from comfyui_kandinsky5.kandinsky_core.nano.edit import edits
from comfyui_kandinsky5.kandinsky_core.nano.family import load_family
from comfyui_kandinsky5.kandinsky_core.nano.score import wilson
from torch.testing import assert_close

COUNT = 48
LEAST_DROP = 20  # points
# Break -> task and measure that must fall.
COSTLY = {
    "shift_inverse": ("t2v", "all"),
    "axes_swapped": ("t2v", "all"),
    "mask_dropped": ("continuation", "identity"),
}


@pytest.fixture(scope="module")
def family():
    """The shipped video models."""
    return load_family(files(), torch.device("cpu"))


@pytest.fixture(scope="module")
def report(family):
    """Sound and broken runs."""
    names = ("prompts_shuffled", "shift_inverse", "axes_swapped")
    return {
        **controls.controls(family, COUNT, tasks=("t2v",), breaks=names),
        "continuation": controls.controls(
            family, COUNT, tasks=("continuation",), breaks=("prompts_shuffled", "mask_dropped")
        )["continuation"],
    }


@pytest.mark.parametrize("name", COSTLY)
def test_a_break_costs_twenty_points(report, name):
    task, measure = COSTLY[name]
    found = report[task][name]
    assert found["drop"][measure] >= LEAST_DROP, (found["drop"], report[task]["sound"])


@pytest.mark.parametrize("measure", ["color", "shape", "motion", "background", "all"])
def test_shuffled_prompts_fall_to_chance(report, measure):
    found = report["t2v"]["prompts_shuffled"]
    assert found["drop"][measure] >= LEAST_DROP, found
    # At most as many hits as chance gives in 999 of 1,000 shuffles (binomial).
    assert measure not in found["above_chance"], found


def test_with_a_picture_shuffled_prompts_change_the_motion_only(report):
    found = report["continuation"]["prompts_shuffled"]
    assert found["drop"]["motion"] >= LEAST_DROP and not found["above_chance"], found
    assert found["drop"]["identity"] < LEAST_DROP, found


def test_chance_is_exact():
    one, other = (draw.Scene(shape=shape, color="red", motion="up", background="navy") for shape in ("square", "cross"))
    expected = controls.chance([one, one, one, other], "t2v")
    assert expected == {"color": 1, "shape": 0.625, "motion": 1, "background": 1, "all": 0.625}
    assert controls.chance([one, other], "continuation") == {"motion": 1}
    asked = list(edits(1, 30))
    assert 1 / 30 < controls.chance(asked, "i2i")["asked"] < 0.2
    order = controls.permutation(48)
    assert sorted(order) == list(range(48)) and sum(a == b for a, b in enumerate(order)) < 6


def test_the_binomial_tail_is_known():
    assert controls.binomial_tail(0, 5, 0.3) == pytest.approx(1)
    assert controls.binomial_tail(5, 5, 0.5) == pytest.approx(1 / 32)
    assert controls.binomial_tail(3, 4, 0.5) == pytest.approx(5 / 16)
    low, _ = wilson(20, 48)
    assert controls.binomial_tail(20, 48, 0.125) < controls.LEAST_TAIL and low > 0.125


def test_the_breaks_break_one_thing_each(family):
    generator = torch.Generator().manual_seed(0)
    spec = family.transformer.spec
    x = torch.randn(1, 2, 4, 6, spec.visual_embed_dim, generator=generator)
    given = (torch.randn(1, 3, spec.in_text_dim, generator=generator), torch.randn(1, spec.in_text_dim2))
    time = torch.tensor([600.0])
    with torch.no_grad():
        unmasked = controls.Unmasked(family)(x, *given, time)
        x_0 = torch.cat([x[..., :-1], torch.zeros(1, 2, 4, 6, 1)], -1)
        assert_close(unmasked, family.transformer(x_0, *given, time))
        swapped = controls.SwappedAxes.of(family)
        sound = family.transformer(x, *given, time)
        assert not torch.allclose(swapped(x, *given, time), sound, atol=1e-3)
        # On a single column of single rows there is nothing to swap.
        point = x[:, :, :2, :2]
        assert_close(swapped(point, *given, time), family.transformer(point, *given, time))
