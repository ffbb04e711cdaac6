"""The report counts what it says it counts, any codec can stand in, and limits that are missed are named."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.nano import draw, gate
from comfyui_kandinsky5.kandinsky_core.nano import trial as trials
from comfyui_kandinsky5.kandinsky_core.nano.caption import MOTION_PHRASES
from comfyui_kandinsky5.kandinsky_core.nano.codec import ScaledVAE, clips, pixels, reconstruct
from comfyui_kandinsky5.kandinsky_core.nano.evaluate import evaluate, measure_vae
from comfyui_kandinsky5.kandinsky_core.nano.family import Family
from comfyui_kandinsky5.kandinsky_core.nano.latent_basis import fit
from comfyui_kandinsky5.kandinsky_core.nano.score import decibels, flicker, flickering, summary, wilson
from comfyui_kandinsky5.kandinsky_core.nano.sheet import Entry, contact_sheet, verdict, wrapped
from comfyui_kandinsky5.kandinsky_core.vae.flux import FluxVAE
from comfyui_kandinsky5.kandinsky_core.vae.hunyuan import HunyuanVideoVAE
from comfyui_kandinsky5.kandinsky_core.variants import variant
from PIL import Image
from torch.testing import assert_close

SMALL = {"frames": 5, "size_px": 64}


@pytest.fixture
def perfect(monkeypatch):
    """A family whose generator draws what it is asked for, and a basis in place of the autoencoder."""
    items = list(draw.scenes(7, 40))
    sample = [pixels(torch.stack([draw.draw(item, size_px=64, frames=5) for item in items]))]

    def made(family, prompts, *, images_BHWC=None, edit_BHWC=None, frames=17, size_px=64, seed=0, **_):
        start = trials.NOISE_SEED
        task = next(name for name, first in start.items() if first == seed)
        wanted = trials.asked_for(task, len(prompts), unseen=family.text)
        scenes = [item.after for item in wanted] if task == "i2i" else wanted
        return torch.stack([draw.draw(item, size_px=size_px, frames=frames) for item in scenes])

    monkeypatch.setattr(trials, "generate", made)
    monkeypatch.setattr(Family, "device", property(lambda _: torch.device("cpu")))
    # `text` says which split the stand-in draws: the real one reads prompts.
    return Family(None, fit(sample, 64), True, variant("nano_video"))


def test_a_perfect_generator_gets_full_marks(perfect, tmp_path):
    report = evaluate(perfect, 6, seen_count=0, sheet=tmp_path / "sheet.png", **SMALL)
    assert {"t2v", "i2v", "t2i"} <= set(report)
    for task in ("t2v", "i2v", "continuation", "t2i"):
        found = report[task]["held_out"]
        assert set(report[task]) == {"held_out"}
        names = {"color", "shape", "background", "all"} | ({"motion"} if task != "t2i" else set())
        for name in names | ({"identity"} if task in trials.FROM_PICTURE else set()):
            assert found[name]["right"] == found[name]["count"] == 6, (task, name)
    for task in trials.FROM_PICTURE:
        found = report[task]["held_out"]
        first = found["first_frame"]
        assert 20 < first["against_codec"]["psnr_mean_db"] < 60 < first["against_given"]["psnr_least_db"]
        assert found["seam"]["made"] == found["seam"]["true"] > 0
    assert report["t2v"]["held_out"]["flicker"]["made"] == report["t2v"]["held_out"]["flicker"]["true"]
    assert json.loads(json.dumps(report)) == report
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width >= 1200 and len(sheet.getcolors(2**24)) > 50


def test_edits_are_judged(perfect, tmp_path):
    family = replace(perfect, variant=variant("nano_edit"))
    found = evaluate(family, 8, seen_count=0, sheet=tmp_path / "sheet.png", frames=1, size_px=64)["i2i"]["held_out"]
    assert all(found[name]["right"] == 8 for name in ("asked", "kept", "all"))
    assert sum(kind["asked"]["count"] for kind in found["kinds"].values()) == 8
    assert set(found["true_edits_reconstructed"]) == {"asked", "kept", "all"}


def test_both_splits_ask_for_what_they_say(perfect):
    for unseen in (True, False):
        found = trials.trial(replace(perfect, text=unseen), "t2v", 8, unseen=unseen, **SMALL)
        assert {draw.held_out(item) for item in found.asked} == {unseen}
        assert len({item.names["color"] for item in found.asked}) > 1


@pytest.mark.parametrize("task", ["t2i", "i2i"])
def test_no_training_scene_shows_a_held_out_picture(task):
    """Whatever moves: a picture of a training clip would give the combination away."""
    targets = [item.after if task == "i2i" else item for item in trials.asked_for(task, 40, unseen=True)]
    assert len(targets) == 40 and all(map(draw.held_out_picture, targets))
    for stream in range(2):
        assert not any(map(draw.held_out_picture, draw.scenes(stream, 2000, unseen=False)))


def test_prompts_of_a_given_picture_do_not_describe_it(perfect):
    found = trials.trial(perfect, "continuation", 12, **SMALL)
    for item, prompt in zip(found.asked, found.prompts, strict=True):
        words = set(re.findall(r"\w+", prompt.lower()))
        assert not {*draw.COLORS, *draw.SHAPES, *draw.BACKGROUNDS} & words
        assert any(set(phrase.split()) <= words for phrase in MOTION_PHRASES[item.motion])
    assert torch.equal(found.given_BHWC, found.real_BTHWC[:, 0])


def test_all_means_all_at_once():
    item = draw.Scene(shape="square", color="red", motion="up", background="black")
    grades = [
        trials.Grade("red", "square", "up", "black"),
        trials.Grade("red", "circle", "up", "black"),
        trials.Grade("blue", "square", "up", "black"),
        trials.Grade("red", "square", "down", "gray"),
    ]
    found = summary([(item, result) for result in grades])
    assert {name: row["right"] for name, row in found.items()} == {
        "color": 3, "shape": 3, "motion": 3, "background": 3, "all": 1,
    }  # fmt: skip
    assert summary([(item, grades[3])], ("color", "shape"))["all"]["right"] == 1


def test_intervals_are_wilsons():
    low, high = wilson(90, 100)
    assert low == pytest.approx(0.8256, abs=1e-3) and high == pytest.approx(0.9448, abs=1e-3)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(20, 20)[0] < 0.9


def test_decibels_are_known_for_a_known_error():
    true = torch.zeros(2, 1, 4, 4, 3)
    made = true + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1, 1)
    # 20 and 40 dB: the mean's standard error is 10, the interval 1.96 of it on both sides.
    assert decibels(made, true) == {
        "psnr_mean_db": 30.0, "psnr_interval_db": pytest.approx([10.4, 49.6], abs=1e-2), "psnr_least_db": 20.0,
    }  # fmt: skip
    assert decibels(made[:1], true[:1])["psnr_interval_db"] is None


def test_flicker_is_the_second_difference_in_grey_levels():
    item = draw.Scene(shape="square", color="red", motion="still", background="gray")
    clip = draw.draw(item, frames=9)
    assert flicker(clip) == pytest.approx((0, 0), abs=1e-3)
    fading = clip * torch.linspace(1, 0.9, 9).view(-1, 1, 1, 1)
    assert flicker(fading) == pytest.approx((0, 0), abs=0.05)
    blinking = clip + 0.01 * torch.tensor([1.0, -1.0] * 4 + [1.0]).view(-1, 1, 1, 1)
    assert flicker(blinking) == pytest.approx((0.04 * 255, 0.04 * 255), rel=0.05)
    # Only the object blinks: the background stays at rest, and the other way round.
    inside = ((clip - clip[0, 0, 0]).abs().sum(-1, keepdim=True) > 0.01).float()
    only = flicker(clip + (blinking - clip) * inside)
    assert only[0] == pytest.approx(0, abs=1e-3) and only[1] > 9
    only = flicker(clip + (blinking - clip) * (1 - inside))
    assert only[0] > 9 and only[1] == pytest.approx(0, abs=1e-3)


def test_the_interval_of_the_flicker_is_that_of_its_mean():
    item = draw.Scene(shape="square", color="red", motion="still", background="gray")
    still = draw.draw(item, frames=9)
    clips_BTHWC = torch.stack([
        still + grey / 255 / 4 * torch.tensor([1.0, -1.0] * 4 + [1.0]).view(-1, 1, 1, 1) for grey in (1, 2, 3)
    ])
    found = flickering(clips_BTHWC)
    for name in ("background", "object"):
        assert found[name] == pytest.approx(2, rel=0.01) and found[f"{name}_worst"] == pytest.approx(3, rel=0.01)
        half = 1.96 / 3**0.5
        assert found[f"{name}_interval"] == pytest.approx([2 - half, 2 + half], rel=0.02)
    assert flickering(clips_BTHWC[:1])["background_interval"] is None


def test_true_motion_is_hardly_flicker():
    worst = flickering(torch.stack([draw.draw(item) for item in draw.scenes(5, 16)]))
    assert worst["background"] == 0 and worst["object"] < 1.5 and worst["without_object"] == 0
    assert flickering(torch.full((1, 5, 64, 64, 3), 0.5))["without_object"] == 1


@pytest.mark.parametrize(("name", "kind"), [("nano_video", HunyuanVideoVAE), ("nano_image", FluxVAE)])
def test_an_autoencoder_is_a_codec_in_model_units(name, kind):
    torch.manual_seed(0)
    vae = kind(variant(name).vae).eval()
    codec = ScaledVAE(vae)
    clip = torch.rand(2, 1, 16, 16, 3)
    x = pixels(clip)
    with torch.no_grad():
        raw = vae.encode(x[:, :, 0] if kind is FluxVAE else x).mean
        assert_close(codec.encode(x), (raw.unsqueeze(2) if kind is FluxVAE else raw) * codec.spec.scaling_factor)
        whole = vae.decode(raw)
    made = reconstruct(codec, clip)
    assert_close(made, clips(whole.unsqueeze(2) if kind is FluxVAE else whole), atol=1e-5, rtol=1e-4)
    measured = measure_vae(codec, 3, size_px=32, frames=1)
    assert measured["psnr_mean_db"] < 28 and "motion" not in measured["grades"]


def test_the_gate_names_what_is_missing_too_low_or_no_number():
    report: dict = {}
    for path, least in gate.LIMITS.items():
        place = report
        *folders, last = path.split("/")
        for key in folders:
            place = place.setdefault(key, {})
        place[last] = least
    assert gate.gate(report) == []
    report["video"]["t2v"]["held_out"]["motion"]["share"] -= 0.001
    del report["edit"]
    report["video"]["i2v"]["held_out"]["motion"]["share"] = float("nan")
    failures = gate.gate(report)
    assert len(failures) == 4
    assert failures[0].startswith("video/t2v/held_out/motion/share is 0.899") and "edit/i2i" in failures[-1]
    assert gate.gate(report, "video/t2i") == [] and len(gate.gate(report, "video/t2v")) == 1
    assert gate.gate(report, "video/i2v") == ["video/i2v/held_out/motion/share is nan; at least 0.9 is needed"]
    with pytest.raises(KeyError, match="No limit"):
        gate.gate(report, "video/typo")


def test_the_sheet_marks_wrong_answers_and_breaks_long_prompts(tmp_path):
    answers = verdict({"shape": "circle", "color": "red"}, {"shape": "square", "color": "red"})
    assert answers == [("WRONG square (circle)", False), ("red", True)]
    picture = torch.zeros(64, 64, 3)
    short, long = (Entry(prompt, [picture] * 2, answers) for prompt in ("a circle", "many words " * 20))
    for name, entry in (("short", short), ("long", long)):
        contact_sheet({"title": [entry]}, tmp_path / f"{name}.png")
    with Image.open(tmp_path / "short.png") as one, Image.open(tmp_path / "long.png") as two:
        assert two.height > one.height + 60 and one.width == two.width
        assert {(192, 24, 24), (42, 111, 60)} <= {color for _, color in one.getcolors(2**24)}


def test_lines_are_not_wider_than_allowed():
    class Fixed:
        def getlength(self, text):
            return 10 * len(text)

    lines = wrapped([(word, None) for word in ("aa", "bb", "cc", "a-very-long-word")], Fixed(), 50)
    assert [[word for _, word, _ in line] for line in lines] == [["aa", "bb"], ["cc"], ["a-very-long-word"]]
    assert [left for left, _, _ in lines[0]] == [0, 30]
