"""`kandinsky5 estimate`: what it reads, what it says, what it refuses."""

from __future__ import annotations

import json

import pytest
from comfyui_kandinsky5.headless.cli import main
from comfyui_kandinsky5.kandinsky_core.io.media import read_image
from comfyui_kandinsky5.kandinsky_core.memory.budget import PROFILES
from comfyui_kandinsky5.nodes import host as door


@pytest.fixture
def estimate(monkeypatch, capsys, tmp_path):
    """Run the command without a models folder; gives exit code, standard output and standard error."""
    monkeypatch.setattr(door, "_current", [])
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        capsys.readouterr()
        code = main(["estimate", "--device", "cpu", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def values(estimate, *arguments):
    code, out, _ = estimate("--json", *arguments)
    assert code == 0
    return json.loads(out)


def test_a_variant_is_estimated_at_its_released_size(estimate):
    found = values(estimate, "--variant", "lite_t2v_5s_sft", "--budget", "12")
    assert (found["width"], found["height"], found["frames"]) == (768, 512, 121)
    assert [stage["name"] for stage in found["stages"]] == ["text encode", "sample", "decode"]
    assert all(stage["needed_bytes"] <= PROFILES["12 GB"] for stage in found["stages"])
    assert found["cards"].keys() == PROFILES.keys()
    assert all(card["fits"] for card in found["cards"].values())


def test_what_does_not_fit_comes_with_a_change_that_does(estimate):
    found = values(estimate, "--variant", "pro_t2v_10s_hd", "--budget", "8")
    assert found["stages"] is None and "needs at least" in found["problem"]
    change = found["cards"]["8 GB"]["change"]
    assert change["change"].endswith("frames instead of 241")
    frames = change["change"].split()[0]
    assert values(estimate, "--variant", "pro_t2v_10s_hd", "--budget", "8", "--frames", frames)["stages"]


def test_the_report_names_stages_cards_and_times(estimate):
    code, out, _ = estimate("--variant", "lite_t2i", "--budget", "24")
    assert code == 0
    assert all(word in out for word in ("text encode", "sample", "decode", "8 GB:", "24 GB:", "RTX 4090", "minutes"))


def test_a_workflow_brings_model_size_and_start_image(estimate):
    found = values(estimate, "--workflow", "i2v_lite_5s", "--budget", "12")
    assert (found["variant"], found["frames"]) == ("lite_i2v_5s", 121)
    assert "encode" in [stage["name"] for stage in found["stages"]]
    assert values(estimate, "--workflow", "i2v_lite_5s", "--budget", "12", "--frames", "61")["frames"] == 61


def test_of_several_samplers_the_one_with_most_to_do_counts(estimate):
    assert values(estimate, "--workflow", "i2v_nano", "--budget", "12")["frames"] == 17


def test_auto_is_what_is_free_here(estimate):
    found = values(estimate, "--variant", "nano_video")
    assert found["budget_bytes"] > 0 and found["stages"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "12"), "--variant"),
        (("--variant", "nano_video", "--budget", "much"), "number of GB"),
        (("--variant", "nano_video", "--budget", "0"), "above 0"),
        (("--variant", "nano_video", "--width", "100"), "multiple of 16"),
        (("--variant", "nano_video", "--kept", "0"), "share"),
        (("--variant", "nano_video", "--precision", "int3"), "int3"),
        (("--variant", "gone"), "gone"),
        (("--workflow", "edit_nano"), "--width"),
    ],
)
def test_what_cannot_be_estimated_is_refused(estimate, arguments, message):
    code, _, err = estimate(*arguments)
    assert code == 2 and message in err


def test_generate_runs_in_a_budget_and_gives_the_same_clip(monkeypatch, capsys, tmp_path):
    """A budget that all of nano fits changes nothing; one that no device has is refused before anything runs."""
    monkeypatch.setattr(door, "_current", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    made = ["generate", "--device", "cpu", "--quiet", "--prompt", "A red circle.", "--frames", "1", "--steps", "1"]
    made += ["--width", "64", "--height", "64", "--model", "nano-image"]
    assert main([*made, "--budget", "12"]) == 0
    planned = read_image(tmp_path / capsys.readouterr().out.strip()).pixels_1HW3
    assert main(made) == 0
    assert (read_image(tmp_path / capsys.readouterr().out.strip()).pixels_1HW3 == planned).all()
    assert main([*made, "--budget", "0.0001"]) == 2 and "custom_gb" in capsys.readouterr().err
