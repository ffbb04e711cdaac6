"""Every stage of the recipe learns, resumes, repeats itself and writes files that the ordinary loaders read."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.nano import files, run, stages, train
from comfyui_kandinsky5.kandinsky_core.nano.autoencoder import Schedule
from comfyui_kandinsky5.kandinsky_core.nano.batch import Batch, Phase
from comfyui_kandinsky5.kandinsky_core.nano.corpus import Slice
from comfyui_kandinsky5.kandinsky_core.nano.family import load_family
from comfyui_kandinsky5.kandinsky_core.nano.generate import generate
from comfyui_kandinsky5.kandinsky_core.nano.plot import curves
from comfyui_kandinsky5.kandinsky_core.nano.recipe import RECIPE, Course, Recipe, Share, shortened
from comfyui_kandinsky5.kandinsky_core.nano.run import Run
from comfyui_kandinsky5.kandinsky_core.nano.transformer import put_strays
from safetensors.torch import load_file
from torch import nn

STEPS = 30


def schedule(frames, prefix):
    """A few steps at 32 px."""
    batches = tuple(Batch(clips=4, frames=count, size_px=32) for count in frames)
    return Schedule(**{
        part: (Phase(name=prefix + part, batches=batches, steps=STEPS, lr=3e-3),)
        for part in ("encoder", "decoder", "finish")
    })  # fmt: skip


def course(*kinds):
    """Sixteen scenes of each kind at 32 px; clips have five frames."""
    slices = tuple(
        Slice(kind=kind, size_px=32, frames=5 if kind in ("clip", "continuation") else 1, clips=16, batch=4)
        for kind in kinds
    )
    shares = tuple(Share(slice=index, weight=1.0, begin=0.2 * index) for index in range(len(kinds)))
    return Course(slices=slices, shares=shares, steps=STEPS)


TINY = Recipe(
    vae=schedule((1, 5), "vae_"), image_vae=schedule((1,), "image_vae_"), text_steps=STEPS,
    video=course("clip", "continuation", "picture"), image=course("picture"), edit=course("edit", "picture"),
    grade_count=2, gate_count=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which all stages have run at tiny size."""
    folder = tmp_path_factory.mktemp("nano")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train.run_stages(Run(folder), TINY, files(folder / "weights"), tuple(stages.STAGES), gated=False)
    torch.set_num_threads(threads)
    return folder


def losses(folder):
    """Stage -> losses in the order of the log."""
    found: dict[str, list[float]] = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "loss" in entry:
            found.setdefault(entry["stage"], []).append(entry["loss"])
    return found


@pytest.mark.parametrize(
    ("stage", "share"),
    [("vae_encoder", 0.9), ("vae_decoder", 0.9), ("image_vae_decoder", 0.9), ("text", 0.99), ("dit", 0.97),
     ("image", 0.97), ("edit", 0.97)],
)  # fmt: skip
def test_every_stage_learns(trained, stage, share):
    first, *_, last = losses(trained)[stage]
    assert last < share * first


def test_the_files_are_small_half_precision_and_say_what_they_are(trained):
    out = files(trained / "weights")
    for member in ("video", "image", "edit"):
        family = load_family(out, torch.device("cpu"), member)
        assert family.variant.name == f"nano_{member}"
        assert family.vae.spec == family.variant.vae
    for kind in ("model", "image_model", "edit_model", "vae", "image_vae"):
        assert all(value.dtype == torch.float16 for value in load_file(out[kind]).values()), kind
    assert sum(path.stat().st_size for path in (trained / "weights").rglob("*") if path.is_file()) < 40e6


def test_a_clip_does_not_depend_on_its_batch(trained):
    family = load_family(files(trained / "weights"), torch.device("cpu"))
    alone, pair = (generate(family, ["a"] * count, frames=5, size_px=32, steps=2, seed=3) for count in (1, 2))
    assert alone.shape == (1, 5, 32, 32, 3) and alone.isfinite().all()
    assert torch.allclose(alone[0], pair[0], atol=1e-4)


def test_the_report_has_every_member_and_task(trained):
    report = json.loads((trained / "grade.json").read_text())
    assert {member: {*found} & {"vae", "t2v", "i2v", "t2i", "i2i"} for member, found in report.items()} == {
        "video": {"vae", "t2v", "i2v", "t2i"}, "image": {"vae", "t2i"}, "edit": {"i2i", "t2i"},
    }  # fmt: skip
    assert report["video"]["t2v"]["held_out"]["color"]["count"] == TINY.grade_count
    for name in ("grade_video.png", "grade_image.png", "grade_edit.png", "log.png"):
        assert (trained / name).read_bytes().startswith(b"\x89PNG"), name


def test_every_stage_left_its_curve(trained):
    found = curves(trained / "log.jsonl")
    assert {"vae_finish", "image_vae_finish", "text", "dit", "image", "edit"} <= found.keys()
    steps, values = found["dit"]["loss"]
    assert steps[-1] == STEPS and len(values) == len(steps)


def test_a_poor_stage_stops_the_recipe(trained):
    with pytest.raises(stages.GateError, match="vae is not good enough.*psnr_mean_db is .* at least 28"):
        train.run_stages(Run(trained), TINY, files(trained / "weights"), ("vae",))


def test_finished_stages_are_not_run_again(trained):
    out = files(trained / "weights")
    before = load_file(out["vae"])
    count = len(losses(trained)["vae_finish"])
    train.run_stages(Run(trained), TINY, out, ("vae", "latents"), gated=False)
    assert len(losses(trained)["vae_finish"]) == count
    assert all(torch.equal(value, before[name]) for name, value in load_file(out["vae"]).items())


def test_the_same_seed_gives_the_same_weights(trained, tmp_path):
    """From the text encoders on: their training is the only one whose tokenizers come from another library."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    here = Run(tmp_path)
    out = files(tmp_path / "weights") | {
        kind: files(trained / "weights")[kind] for kind in ("text_encoder", "clip")
    }
    train.run_stages(here, TINY, out, ("latents", "image"), gated=False)
    torch.set_num_threads(threads)
    mine, theirs = load_file(out["image_model"]), load_file(files(trained / "weights")["image_model"])
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_data_of_a_course_is_what_its_slices_say(trained):
    video, edit = (stages.read_data(Run(trained), name) for name in ("video", "edit"))
    assert [tuple(bucket.latents_NCTHW.shape) for bucket in video] == [
        (16, 16, 2, 4, 4), (16, 16, 2, 4, 4), (16, 16, 1, 4, 4),
    ]  # fmt: skip
    assert edit[0].edit_NCTHW.shape == edit[0].latents_NCTHW.shape and edit[1].edit_NCTHW is None
    # An edit changes something and not everything.
    change = (edit[0].edit_NCTHW - edit[0].latents_NCTHW).float().abs().amax(1)
    assert (change.flatten(1).amax(1) > 0.1).all() and (change[:, 0, 0, 0] < 0.05).any()
    # Prompts of a clip differ from those of the next; some are empty, shorter than all others.
    lengths = video[0].prompts.mask_RL.sum(1)
    assert 0 < (lengths == lengths.min()).float().mean() < 0.4


def test_strays_are_clean_unmarked_and_still():
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 4, 16, 3, 2, 2)
    before = clean.clone(), noise.clone()
    put_strays(clean, noise, torch.tensor([True, False, True, False]))
    assert torch.equal(clean[[1, 3]], before[0][[1, 3]]) and torch.equal(noise[[1, 3]], before[1][[1, 3]])
    assert torch.equal(clean[:, :, 1:], before[0][:, :, 1:]) and torch.equal(noise[:, :, 1:], before[1][:, :, 1:])
    assert torch.equal(clean[0, :, 0], before[0][3, :, 0]) and torch.equal(noise[0, :, 0], clean[0, :, 0])


def test_lanes_keep_the_order_and_run_side_by_side():
    began, lock, most = [], threading.Lock(), []

    def launch(name):
        with lock:
            began.append(name)
        most.append(threading.active_count())
        time.sleep(0.02)

    train.run_lanes(2, tuple(stages.STAGES), launch)
    assert sorted(began) == sorted(stages.STAGES)
    for name, stage in stages.STAGES.items():
        assert all(began.index(need) < began.index(name) for need in stage.needs), (name, began)


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


def test_an_interrupted_run_gives_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SAVE_EVERY", 4)

    def go(folder, stop=None):
        here = Run(folder)
        torch.manual_seed(0)
        module = nn.Linear(4, 4)

        def loss_at(step):
            if step == stop:
                raise KeyboardInterrupt
            x = torch.randn(8, 4, generator=here.generator("test", step))
            return (module(x) - x.flip(1)).square().mean()

        run.train(here, "test", module, [torch.optim.Adam(module.parameters())], loss_at, steps=20, lr=0.01)
        return module.weight

    whole = go(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "broken", stop=10)
    assert torch.equal(go(tmp_path / "broken"), whole)


def test_a_diverging_run_stops(tmp_path):
    module = nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="learning rate"):
        run.train(
            Run(tmp_path), "test", module, [torch.optim.SGD(module.parameters())],
            lambda _: module.weight.sum() * float("nan"), steps=3, lr=1.0,
        )  # fmt: skip
    assert not (tmp_path / "test.ckpt").exists()
