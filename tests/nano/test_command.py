"""The recipe's command: stages as processes in lanes, in the order of their needs, with errors that are one line."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from comfyui_kandinsky5.kandinsky_core.nano import files, run, stages, train
from comfyui_kandinsky5.kandinsky_core.nano.recipe import RECIPE, shortened
from comfyui_kandinsky5.kandinsky_core.nano.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")


def test_lanes_keep_the_order_and_run_side_by_side():
    events, lock = [], threading.Lock()
    meeting = threading.Barrier(2)

    def launch(name):
        with lock:
            events.append(("begin", name))
        if name in ("text", "vae"):  # passes when both are there, and breaks otherwise
            meeting.wait(timeout=60)
        with lock:
            events.append(("end", name))

    train.run_lanes(2, tuple(stages.STAGES), launch)
    assert sorted(name for event, name in events if event == "begin") == sorted(stages.STAGES)
    for name, stage in stages.STAGES.items():
        assert all(events.index(("end", need)) < events.index(("begin", name)) for need in stage.needs), (name, events)
    running = [0]
    for event, _ in events:
        running.append(running[-1] + (1 if event == "begin" else -1))
    assert max(running) == 2


def test_all_stages_are_processes_with_the_given_options(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, *, check: commands.append((command, check)))
    given = ["--stage", "all", "--out", str(tmp_path), "--seed", "5", "--lanes", "1"]
    assert train.main(given) == 0
    chosen = []
    for command, check in commands:
        assert command[:3] == [sys.executable, "-m", train.__name__] and check
        options = train.parser().parse_args(command[3:])
        assert (options.out, options.seed) == (tmp_path, 5)
        chosen.append(options.stage)
    assert sorted(chosen) == sorted(stages.STAGES)


def test_a_process_that_fails_is_named(tmp_path, monkeypatch, caplog):
    def fail(command, *, check):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", fail)
    assert train.main(["--out", str(tmp_path), "--lanes", "1"]) == 1
    assert [one.getMessage().split(";")[0] for one in caplog.records if one.levelname == "ERROR"] == [
        "Stage text stopped"
    ]


def test_an_error_on_the_command_line_is_one_clear_line(tmp_path, caplog):
    assert train.main(["--stage", "image", "--out", str(tmp_path)]) == 1
    said = [one for one in caplog.records if one.levelname == "ERROR"]
    assert [one.getMessage() for one in said] == [
        f"{tmp_path / 'latents_image.pt'} is missing. Run --stage latents with this --out first."
    ]
    assert said[0].exc_info is None


def test_a_failing_stage_stops_those_that_need_it():
    began = []

    def launch(name):
        began.append(name)
        if name == "text":
            raise RuntimeError("text")

    with pytest.raises(RuntimeError, match="text"):
        train.run_lanes(2, tuple(stages.STAGES), launch)
    assert "latents" not in began and "grade" not in began


def test_a_rehearsal_is_short_everywhere():
    short = shortened(RECIPE, 3)
    assert all(one.steps <= 3 for one in (short.video, short.image, short.edit))
    assert all(
        phase.steps <= 3 for plan in (short.vae, short.image_vae)
        for part in (plan.encoder, plan.decoder, plan.finish) for phase in part
    )  # fmt: skip
    assert short.text_steps == 3 and replace(short.video, slices=()) == replace(RECIPE.video, slices=(), steps=3)


def test_weights_that_are_not_there_are_named(tmp_path):
    with pytest.raises(run.MissingError, match=r"k5_nano_video\.safetensors is missing"):
        stages.STAGES["grade"].work(Run(tmp_path), RECIPE, files(tmp_path / "weights"))
