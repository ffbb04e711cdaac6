"""The family notices what is broken: each break costs the shipped weights at least 20 points where it must show.

As the recipe's last gate measures it, on fewer held-out prompts: 48 clips of 64 px, 24 edits of 128 px.
"""

from __future__ import annotations

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.model.crossdit import CrossDiT
from comfyui_kandinsky5.kandinsky_core.nano import controls, draw, files
from comfyui_kandinsky5.kandinsky_core.nano.edit import edits
from comfyui_kandinsky5.kandinsky_core.nano.family import Family, load_family
from comfyui_kandinsky5.kandinsky_core.nano.gate import CONTROLS, above_chance, gate
from comfyui_kandinsky5.kandinsky_core.nano.score import wilson
from comfyui_kandinsky5.kandinsky_core.variants import variant
from torch.testing import assert_close

COUNTS = {"video": 48, "edit": 24}
CHANCE_TAIL = 0.02  # with so few prompts; a model that follows them is at the expected number when they are shuffled


@pytest.fixture(scope="module")
def report():
    """Sound and broken runs of what must show each break."""
    found = {}
    for member, task in sorted({tuple(path.split("/")[:2]) for path in CONTROLS}):
        family = load_family(files(), torch.device("cpu"), member)
        breaks = {path.split("/")[2] for path in CONTROLS if path.startswith(f"{member}/{task}/")}
        breaks |= {"guidance_1"} if task == "t2v" else set()
        found.setdefault(member, {}).update(
            controls.controls(
                family, COUNTS[member], tasks=(task,), breaks=sorted(breaks), size_px=family.variant.sizes[0][0]
            )
        )
    return found


@pytest.mark.parametrize("path", CONTROLS)
def test_a_break_costs_twenty_points(report, path):
    assert gate(report, path, limits=CONTROLS) == []


@pytest.mark.parametrize(
    ("member", "task", "measure"),
    [*(("video", "t2v", name) for name in ("color", "shape", "motion", "background", "all")),
     ("video", "continuation", "motion"), ("edit", "i2i", "asked")],
)  # fmt: skip
def test_shuffled_prompts_fall_to_chance(report, member, task, measure):
    found = report[member][task]["prompts_shuffled"]
    right, chance = found["shares"][measure]["right"], found["chance"][measure]
    assert controls.binomial_tail(right, COUNTS[member], chance) > CHANCE_TAIL, (right, chance)


def test_with_a_picture_shuffled_prompts_leave_the_object_alone(report):
    found = report["video"]["continuation"]["prompts_shuffled"]
    assert found["drop"]["identity"] < found["drop"]["motion"] / 2, found["drop"]


def test_guidance_helps(report):
    assert report["video"]["t2v"]["guidance_1"]["drop"]["all"] > 0, report["video"]["t2v"]


def test_chance_is_exact():
    one, other = (draw.Scene(shape=shape, color="red", motion="up", background="navy") for shape in ("square", "cross"))
    expected = controls.chance([one, one, one, other], "t2v")
    assert expected == {"color": 1, "shape": 0.625, "motion": 1, "background": 1, "all": 0.625}
    assert controls.chance([one, other], "continuation") == {"motion": 1}
    asked = list(edits(1, 30))
    assert 1 / 30 < controls.chance(asked, "i2i")["asked"] < 0.2
    order = controls.permutation(48)
    assert sorted(order) == list(range(48)) and sum(a == b for a, b in enumerate(order)) < 6


def test_a_report_above_chance_is_named():
    found = {"prompts_shuffled": {"above_chance": ["shape"]}, "sound": {}}
    report = {"video": {"variant": "nano_video", "t2v": found, "t2i": {"prompts_shuffled": {"above_chance": []}}}}
    assert above_chance(report) == ["video/t2v/prompts_shuffled: shape is above chance"]


def test_the_binomial_tail_is_known():
    assert controls.binomial_tail(0, 5, 0.3) == pytest.approx(1)
    assert controls.binomial_tail(5, 5, 0.5) == pytest.approx(1 / 32)
    assert controls.binomial_tail(3, 4, 0.5) == pytest.approx(5 / 16)
    low, _ = wilson(20, 48)
    assert controls.binomial_tail(20, 48, 0.125) < controls.LEAST_TAIL and low > 0.125


def test_the_breaks_break_one_thing_each():
    torch.manual_seed(0)
    row = variant("nano_video")
    model = CrossDiT(row.spec).eval()
    for weight in model.parameters():  # a fresh model gives zeros
        weight.data += 0.05 * torch.randn_like(weight)
    family, spec = Family(model, None, None, row), row.spec
    x = torch.randn(1, 2, 4, 6, spec.visual_embed_dim)
    given = torch.randn(1, 3, spec.in_text_dim), torch.randn(1, spec.in_text_dim2)
    time = torch.tensor([600.0])
    with torch.no_grad():
        sound = model(x, *given, time)
        unmasked = controls.Unmasked(family)(x, *given, time)
        assert not torch.allclose(unmasked, sound, atol=1e-3)
        assert_close(unmasked, model(torch.cat([x[..., :-1], torch.zeros(1, 2, 4, 6, 1)], -1), *given, time))
        swapped = controls.SwappedAxes.of(family)
        assert not torch.allclose(swapped(x, *given, time), sound, atol=1e-3)
        # On a single column of single rows there is nothing to swap.
        point = x[:, :, :2, :2]
        assert_close(swapped(point, *given, time), model(point, *given, time))
