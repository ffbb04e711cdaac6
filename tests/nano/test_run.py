"""One training: it repeats itself after an interruption, refuses another recipe's files and stops when it diverges."""

from __future__ import annotations

import copy

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import KandinskyError
from comfyui_kandinsky5.kandinsky_core.nano import run
from comfyui_kandinsky5.kandinsky_core.nano.run import Run
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


def linear_run(folder, *, stop=None, steps=20, lr=0.01, recipe=None, **options):
    """Train a linear layer, until `stop`; return the weights and their average."""
    here = Run(folder, **options)
    torch.manual_seed(0)
    module = nn.Linear(4, 4)
    average = copy.deepcopy(module)

    def loss_at(step):
        if step == stop:
            raise KeyboardInterrupt
        x = torch.randn(8, 4, generator=here.generator("test", step))
        return (module(x) - x.flip(1)).square().mean()

    run.train(
        here, "test", module, [torch.optim.Adam(module.parameters())], loss_at, steps=steps, lr=lr, recipe=recipe,
        ema=average,
    )  # fmt: skip
    return module.weight, average.weight


def test_an_interrupted_run_gives_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SAVE_EVERY", 4)
    whole = linear_run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        linear_run(tmp_path / "broken", stop=10)
    again = linear_run(tmp_path / "broken")
    assert torch.equal(again[0], whole[0]) and torch.equal(again[1], whole[1])
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 2}, "seed was 1, is now 2"),
        ({"dtype": torch.bfloat16}, "dtype was torch.float32, is now torch.bfloat16"),
        ({"steps": 21}, "steps was 20, is now 21"),
        ({"lr": 0.02}, "lr was 0.01, is now 0.02"),
        ({"recipe": {"batch": (4, 8)}}, r"recipe was None, is now {'batch': \[4, 8\]}"),
    ],
)
def test_a_checkpoint_of_another_recipe_is_refused(tmp_path, change, said):
    linear_run(tmp_path)
    with pytest.raises(run.ResumeError, match=rf"test\.ckpt was made by another recipe: {said}\. Take another --out"):
        linear_run(tmp_path, **change)
    linear_run(tmp_path, resume=False, **change)
    linear_run(tmp_path, **change, stop=0)  # finished: not one step


def test_a_diverging_run_stops(tmp_path):
    module = nn.Linear(1, 1)
    with pytest.raises(KandinskyError, match="Loss of stage test is nan at step 1. Lower the learning rate"):
        run.train(
            Run(tmp_path), "test", module, [torch.optim.SGD(module.parameters())],
            lambda _: module.weight.sum() * float("nan"), steps=3, lr=1.0,
        )  # fmt: skip
    assert not (tmp_path / "test.ckpt").exists()


def test_a_report_holds_no_numbers_that_are_none(tmp_path):
    run.write_json(tmp_path / "x.json", {"a": [1.5, float("nan")], "b": {"c": float("inf"), "d": "nan"}})
    assert run.read_json(tmp_path / "x.json") == {"a": [1.5, None], "b": {"c": None, "d": "nan"}}
