"""Every stage of the recipe learns, resumes, repeats itself and writes files that the ordinary loaders read."""

from __future__ import annotations

import json

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import TextError
from comfyui_kandinsky5.kandinsky_core.nano import files, run, train
from comfyui_kandinsky5.kandinsky_core.nano.autoencoder import Phase
from comfyui_kandinsky5.kandinsky_core.nano.evaluate import generate, load_family
from comfyui_kandinsky5.kandinsky_core.nano.run import Run
from comfyui_kandinsky5.kandinsky_core.nano.text import encode_batch
from safetensors.torch import load_file
from torch import nn

STEPS = 30
SHORT = ((1, 4), (5, 2))
TINY = train.Recipe(
    size_px=32, frames=5, clips=24, test_clips=2, corpus_clips=16, dit_steps=STEPS, dit_batch=4, text_steps=STEPS,
    text_batch=6, basis_clips=24, grade_count=2,
    encoder=(Phase(name="encoder", batches=SHORT, steps=STEPS, lr=3e-3),),
    decoder=(Phase(name="decoder", batches=SHORT, steps=STEPS, lr=3e-3),),
    decoder_finish=(Phase(name="finish", batches=SHORT, steps=2, lr=1e-3),),
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which all stages have run at tiny size."""
    folder = tmp_path_factory.mktemp("nano")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train.run_stages(Run(folder), TINY, files(folder / "weights"))
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


@pytest.mark.parametrize(("stage", "share"), [("encoder", 0.9), ("decoder", 0.9), ("text", 0.97), ("dit", 0.97)])
def test_every_stage_learns(trained, stage, share):
    first, *_, last = losses(trained)[stage]
    assert last < share * first


def test_the_files_are_small_half_precision_and_say_what_they_are(trained):
    family = load_family(files(trained / "weights"), torch.device("cpu"))
    assert family.variant.name == "nano_video"
    assert family.vae.spec == family.variant.vae
    made = generate(family, ["a red circle", "a blue square"], frames=5, size_px=32, steps=2)
    assert made.shape == (2, 5, 32, 32, 3) and made.isfinite().all()
    assert all(value.dtype == torch.float16 for value in load_file(files(trained / "weights")["vae"]).values())
    assert sum(path.stat().st_size for path in (trained / "weights").rglob("*") if path.is_file()) < 12e6


def test_a_clip_does_not_depend_on_its_batch(trained):
    family = load_family(files(trained / "weights"), torch.device("cpu"))
    alone, pair = (generate(family, ["a"] * count, frames=5, size_px=32, steps=2, seed=3) for count in (1, 2))
    assert torch.allclose(alone[0], pair[0], atol=1e-4)


def test_the_report_has_every_task(trained):
    report = json.loads((trained / "grade.json").read_text())
    assert set(report) == {"vae", "count", "t2v", "i2v", "t2i", "i2v_first_frame"}
    assert report["t2v"]["color"]["count"] == TINY.grade_count
    assert (trained / "grade.png").read_bytes().startswith(b"\x89PNG")


def test_batched_prompts_equal_single_ones(trained):
    text = load_family(files(trained / "weights"), torch.device("cpu")).text
    prompts = ["A red circle moves left.", "", "something the language has no word for: zebra"]
    features, mask, pooled = encode_batch(text, prompts, "video")
    for index, prompt in enumerate(prompts):
        single = text.encode(prompt, "video")
        assert int(mask[index].sum()) == single.tokens
        assert torch.allclose(features[index, : single.tokens], single.features_LD, atol=1e-5)
        assert torch.allclose(pooled[index], single.pooled_P, atol=1e-5)
    with pytest.raises(TextError):
        encode_batch(text, prompts, "no such template")


def test_finished_stages_are_not_run_again(trained):
    out = files(trained / "weights")
    before = load_file(out["vae"])
    lines = len((trained / "log.jsonl").read_text().splitlines())
    train.run_stages(Run(trained), TINY, out, ("vae",))
    assert len((trained / "log.jsonl").read_text().splitlines()) == lines
    assert all(torch.equal(value, before[name]) for name, value in load_file(out["vae"]).items())


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
