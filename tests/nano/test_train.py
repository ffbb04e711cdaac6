"""Every stage of the recipe learns, resumes, repeats itself and writes files that the ordinary loaders read."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.io.load import load_crossdit
from comfyui_kandinsky5.kandinsky_core.model.crossdit import CrossDiT
from comfyui_kandinsky5.kandinsky_core.nano import (
    files,
    reports,
    run,
    stages,
    text,
    train,
)
from comfyui_kandinsky5.kandinsky_core.nano.autoencoder import Schedule
from comfyui_kandinsky5.kandinsky_core.nano.batch import Batch, Phase
from comfyui_kandinsky5.kandinsky_core.nano.controls import BREAKS
from comfyui_kandinsky5.kandinsky_core.nano.corpus import Slice
from comfyui_kandinsky5.kandinsky_core.nano.family import load_family
from comfyui_kandinsky5.kandinsky_core.nano.gate import CONTROLS
from comfyui_kandinsky5.kandinsky_core.nano.generate import generate
from comfyui_kandinsky5.kandinsky_core.nano.plot import curves, plot
from comfyui_kandinsky5.kandinsky_core.nano.recipe import Course, Recipe, Share
from comfyui_kandinsky5.kandinsky_core.nano.reports import other_sizes
from comfyui_kandinsky5.kandinsky_core.nano.run import Run
from comfyui_kandinsky5.kandinsky_core.sampling.conditioning import Known
from comfyui_kandinsky5.kandinsky_core.train.losses import flow_matching_loss, logit_normal_times
from safetensors.torch import load_file

STEPS, TEXT_STEPS = 16, 30
pytestmark = pytest.mark.usefixtures("one_thread", "tiny")


def shipping(folder, **options):
    """A run in the mode whose weights ship."""
    return Run(folder, dtype=torch.bfloat16, **options)


def schedule(frames, prefix):
    """Every phase for two steps at 16 px."""
    batches = tuple(Batch(clips=2, frames=count, size_px=16) for count in frames)
    return Schedule(**{
        part: (Phase(name=prefix + part, batches=batches, steps=2, lr=3e-3),)
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
    vae=schedule((1, 5), "vae_"), image_vae=schedule((1,), "image_vae_"), text_steps=TEXT_STEPS,
    video=course("clip", "continuation", "picture"), image=course("picture"), edit=course("edit", "picture"),
    grade_count=2, gate_count=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(small):
    """Few questions to the text encoders, one more size to grade, no curves after every stage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "train_text", partial(stages.train_text, batch=8, checked=50))
        patch.setattr(reports, "other_sizes", lambda row: [(32, row.frames[0])])
        patch.setattr(train, "plot", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory, one_thread, tiny):
    """A folder in which all stages have run at tiny size."""
    folder = tmp_path_factory.mktemp("nano")
    train.run_stages(shipping(folder), TINY, files(folder / "weights"), tuple(stages.STAGES), gated=False)
    return folder


@pytest.mark.parametrize(("member", "row"), [("video", stages.VIDEO), ("image", stages.IMAGE), ("edit", stages.EDIT)])
def test_a_transformer_learns(trained, member, row):
    """The loss of one batch before and after: the logged one depends on what its step has drawn."""
    out = files(trained / "weights")
    bucket = stages.read_data(shipping(trained), stages.courses(TINY)[member], member, out)[0]
    generator = torch.Generator().manual_seed(0)
    clean, prompts, edit = bucket.draw(16, generator)
    noise = torch.randn(clean.shape, generator=generator)
    times = logit_normal_times(16, generator)
    torch.manual_seed(1)
    fresh = CrossDiT(row.spec)
    learned = load_crossdit(out["model" if member == "video" else f"{member}_model"], dtype=torch.float32).model
    with torch.no_grad():
        before, after = (
            flow_matching_loss(
                model, clean, prompts, times, noise, known=Known(edit_BCTHW=edit), rope_scale=row.rope_at(4, 4)
            ).item()
            for model in (fresh, learned)
        )
    assert after < 0.8 * before


def test_the_text_encoders_learn(trained):
    out = files(trained / "weights")
    tokenizers = text.load_qwen_tokenizer(out["text_encoder"]), text.load_clip_tokenizer(out["clip"])
    qwen, clip = (json.loads((out[kind] / "config.json").read_text()) for kind in ("text_encoder", "clip"))
    torch.manual_seed(1)
    reader = text.Reader(
        text.new_qwen(tokenizers[0], qwen["text_config"]["vocab_size"]),
        text.new_clip(tokenizers[1], clip["vocab_size"]), tokenizers,
    )  # fmt: skip

    @torch.no_grad()
    def loss():
        return sum(text.reading_loss(reader, random.Random(seed), 16).item() for seed in range(6))

    before = loss()
    reader.load_state_dict(torch.load(trained / "text.ckpt", weights_only=True)["module"])
    assert loss() < 0.9 * before
    found = json.loads((trained / "text.json").read_text())
    assert {"clip/qwen/motion", "clip/clip/color", "edit/qwen/new_shape"} <= found.keys()


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
    pair, first, second = (
        generate(family, ["a"] * count, frames=5, size_px=32, steps=2, seed=seed)
        for count, seed in ((2, 3), (1, 3), (1, 4))
    )
    assert pair.shape == (2, 5, 32, 32, 3) and pair.isfinite().all()
    assert torch.allclose(pair, torch.cat([first, second]), atol=1e-4)
    assert not torch.allclose(first, second, atol=1e-2)


def test_the_report_has_every_member_and_task(trained):
    report = json.loads((trained / "grade.json").read_text())
    assert {member: {*found} & {"vae", "t2v", "i2v", "t2i", "i2i"} for member, found in report.items()} == {
        "video": {"vae", "t2v", "i2v", "t2i"}, "image": {"vae", "t2i"}, "edit": {"vae", "i2i", "t2i"},
    }  # fmt: skip
    assert report["video"]["t2v"]["held_out"]["color"]["count"] == TINY.grade_count
    sizes = {member: found["other_sizes"] for member, found in report.items()}
    assert {(member, size): {*parts} for member, found in sizes.items() for size, parts in found.items()} == {
        ("video", "32px_17f"): {"t2v", "i2v", "vae"},
        ("image", "32px_1f"): {"t2i", "vae"},
        ("edit", "32px_1f"): {"i2i", "vae"},
    }
    for name in ("grade_video.png", "grade_image.png", "grade_edit.png"):
        assert (trained / name).read_bytes().startswith(b"\x89PNG"), name


def test_the_other_sizes_are_those_of_the_variants():
    assert other_sizes(stages.VIDEO) == [(128, 17), (256, 17), (64, 49)]
    assert other_sizes(stages.IMAGE) == other_sizes(stages.EDIT) == [(256, 1)]


def test_the_controls_have_every_member_task_and_break(trained):
    report = json.loads((trained / "controls.json").read_text())
    tasks = {"video": {"t2v", "continuation", "t2i"}, "image": {"t2i"}, "edit": {"i2i", "t2i"}}
    assert report.keys() == tasks.keys()
    for member, names in tasks.items():
        assert report[member].keys() - {"variant", "count", "size_px", "frames"} == names
        for task in names:
            assert report[member][task].keys() == {"sound"} | {name for name in BREAKS if task in BREAKS[name].tasks}
    # Nothing that a limit names is missing; that two-step weights fail them is another matter.
    failures = stages.STAGES["controls"].gate(shipping(trained), TINY, files(trained / "weights"))
    assert len(failures) <= len(CONTROLS) and not any("not measured" in failure for failure in failures)


def test_every_stage_left_its_curve(trained, tmp_path):
    plot(trained / "log.jsonl", tmp_path / "log.png")
    assert (tmp_path / "log.png").read_bytes().startswith(b"\x89PNG")
    found = curves(trained / "log.jsonl")
    assert {"vae_finish", "image_vae_finish", "text", "dit", "image", "edit"} <= found.keys()
    steps, values = found["dit"]["loss"]
    assert steps[-1] == STEPS and len(values) == len(steps)


def test_curves_are_drawn_after_every_stage(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(train, "plot", lambda log, picture: drawn.append((log, picture)))
    for name in ("one", "other"):
        monkeypatch.setitem(stages.STAGES, name, stages.Stage(work=lambda *_: None))
    train.run_stages(Run(tmp_path), TINY, {}, ("one", "other"))
    assert drawn == [(tmp_path / "log.jsonl", tmp_path / "log.png")] * 2


def test_a_poor_stage_stops_the_recipe(trained):
    with pytest.raises(stages.GateError, match="vae is not good enough.*psnr_mean_db is .* at least 28"):
        train.run_stages(shipping(trained), TINY, files(trained / "weights"), ("vae",))


def test_text_encoders_that_read_badly_stop_the_recipe(tmp_path, monkeypatch):
    def reading(share):
        monkeypatch.setattr(stages, "train_text", lambda *_, **__: {"clip/qwen/color": share, "clip/clip/color": 1.0})
        train.run_stages(Run(tmp_path), TINY, files(tmp_path), ("text",))

    reading(0.95)
    with pytest.raises(stages.GateError, match=r"text is not good enough to go on: clip/qwen/color is .* in 0\.94 of"):
        reading(0.94)


def test_finished_stages_are_not_run_again(trained):
    out = files(trained / "weights")
    before = load_file(out["vae"])
    data = [stages.data_file(shipping(trained), name) for name in stages.courses(TINY)]
    written = [path.stat().st_mtime_ns for path in data]
    count = len((trained / "log.jsonl").read_text().splitlines())
    train.run_stages(shipping(trained), TINY, out, ("vae", "latents"), gated=False)
    entries = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()[count:]]
    assert [entry["now"] for entry in entries] == ["begins"] * 2
    assert [path.stat().st_mtime_ns for path in data] == written
    assert all(torch.equal(value, before[name]) for name, value in load_file(out["vae"]).items())


def test_the_same_seed_gives_the_same_weights(trained, tmp_path):
    """From the text encoders on."""
    theirs = files(trained / "weights")
    out = files(tmp_path / "weights") | {kind: theirs[kind] for kind in ("text_encoder", "clip")}
    train.run_stages(shipping(tmp_path), TINY, out, ("latents", "image"), gated=False)
    again = load_file(theirs["image_model"])
    assert all(torch.equal(value, again[name]) for name, value in load_file(out["image_model"]).items())


def test_data_of_another_recipe_is_refused(trained):
    out = files(trained / "weights")
    with pytest.raises(run.ResumeError, match=r"latents_video\.pt was made by another recipe: seed was 1, is now 2\."):
        stages.latents_stage(shipping(trained, seed=2), TINY, out)
    fewer = replace(TINY.image, slices=(replace(TINY.image.slices[0], clips=8),))
    with pytest.raises(run.ResumeError, match=r"latents_image\.pt was made by .* slices was .*'clips': 16"):
        stages.image_stage(shipping(trained), replace(TINY, image=fewer), out)
    with pytest.raises(run.ResumeError, match=r"dtype was torch\.bfloat16, is now torch\.float32"):
        stages.read_data(Run(trained), TINY.image, "image", out)


def test_weights_of_another_recipe_are_not_continued(trained):
    slower = replace(TINY, image=replace(TINY.image, lr=1e-3))
    with pytest.raises(run.ResumeError, match=r"image\.ckpt was made by .* lr was 0\.002, is now 0\.001; "):
        stages.image_stage(shipping(trained), slower, files(trained / "weights"))


def test_a_stage_says_what_it_lacks(trained, tmp_path):
    with pytest.raises(stages.MissingError, match="latents_edit.pt is missing. Run --stage latents"):
        stages.edit_stage(shipping(tmp_path), TINY, files(trained / "weights"))


def test_data_of_a_course_is_what_its_slices_say(trained):
    out = files(trained / "weights")
    video, edit = (
        stages.read_data(shipping(trained), stages.courses(TINY)[name], name, out) for name in ("video", "edit")
    )
    assert [tuple(bucket.latents_NCTHW.shape) for bucket in video] == [
        (16, 16, 2, 4, 4), (16, 16, 2, 4, 4), (16, 16, 1, 4, 4),
    ]  # fmt: skip
    assert edit[0].edit_NCTHW.shape == edit[0].latents_NCTHW.shape and edit[1].edit_NCTHW is None
    # An edit changes something and not everything.
    change = (edit[0].edit_NCTHW - edit[0].latents_NCTHW).float().abs().amax(1)
    assert (change.flatten(1).amax(1) > 0.1).all() and (change[:, 0, 0, 0] < 0.05).any()
    # Some prompts are empty, for guidance; the others tell clips apart.
    encoder = stages.text_encoder(shipping(trained), out)
    for bucket, kind in zip(video, ("clip", "continuation", "picture"), strict=True):
        nothing = int(text.encode_batch(encoder, [""], text.TEMPLATE_OF[kind])[1].sum())
        lengths = bucket.prompts.mask_RL.sum(1)
        assert 0.02 < (lengths == nothing).float().mean() < 0.25 and lengths.min() == nothing
        assert len(bucket.prompts.pooled_RP.unique(dim=0)) > 16
