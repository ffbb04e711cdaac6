"""Frame by frame is the same convolution, the trial finds the faults that were reported, the choice is said once."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from comfyui_kandinsky5.kandinsky_core.errors import BackendUnavailable
from comfyui_kandinsky5.kandinsky_core.vae import convolution
from comfyui_kandinsky5.kandinsky_core.vae.convolution import FORMS, Framewise, Trial, choose, framewise
from comfyui_kandinsky5.kandinsky_core.vae.hunyuan import HunyuanVideoVAE
from tiny import VIDEO_VAE_SPEC
from torch import nn

CPU = torch.device("cpu")


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (2, 2, 2), (3, 2, 2), (1, 1, 1)])
@pytest.mark.parametrize("frames", [3, 4, 7])
def test_frame_by_frame_is_the_same_convolution(stride, kernel, frames):
    torch.manual_seed(0)
    x = torch.randn(2, 3, frames, 9, 8, dtype=torch.float64)
    weight, bias = torch.randn(5, 3, *kernel, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    for some in (bias, None):
        out = framewise(x, weight, some, stride)
        torch.testing.assert_close(out, F.conv3d(x, weight, some, stride), atol=1e-12, rtol=0)


def test_within_the_mode_a_whole_autoencoder_runs_frame_by_frame(monkeypatch):
    torch.manual_seed(0)
    vae = HunyuanVideoVAE(VIDEO_VAE_SPEC, dtype=torch.float64).eval()
    x = torch.rand(1, 3, 9, 32, 32, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        plain = vae.decode(vae.encode(x).mean)
        calls = []
        monkeypatch.setattr(convolution, "framewise", lambda *args: calls.append(args[3]) or framewise(*args))
        with Framewise():
            by_frames = vae.decode(vae.encode(x).mean)
    torch.testing.assert_close(by_frames, plain, atol=1e-10, rtol=0)
    assert len(calls) > 40 and (2, 2, 2) in calls


def test_convolutions_of_other_kinds_are_left_alone(monkeypatch):
    monkeypatch.setattr(convolution, "framewise", lambda *args: pytest.fail("not ours"))
    x = torch.randn(1, 4, 3, 6, 6)
    padded, grouped = nn.Conv3d(4, 4, 3, padding=1), nn.Conv3d(4, 4, 3, groups=2)
    wanted = padded(x), grouped(x)
    with Framewise():
        assert torch.equal(padded(x), wanted[0])
        assert torch.equal(grouped(x), wanted[1])


def test_the_first_form_without_a_fault_is_taken_and_said(caplog):
    sound, bulky, wrong = Trial(0.004, 100), Trial(0.004, 2 << 20), Trial(0.2, 0)
    with caplog.at_level(logging.INFO, "kandinsky5"):
        assert choose({"conv3d": sound, "three conv2d": sound}.items(), 1 << 20, "here") is FORMS["conv3d"]
        assert choose({"conv3d": bulky, "three conv2d": sound}.items(), 1 << 20, "here") is framewise
        assert choose({"conv3d": wrong, "three conv2d": sound}.items(), 1 << 20, "here") is framewise
        assert choose({"conv3d": Trial(float("nan"), 0), "three conv2d": sound}.items(), 1 << 20, "here") is framewise
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4
    assert lines[0] == "VAE convolutions (here): conv3d."
    assert "three conv2d" in lines[1] and "2 MiB" in lines[1]
    assert "20.0%" in lines[2]
    with pytest.raises(BackendUnavailable, match="float32"):
        choose({"conv3d": wrong, "three conv2d": wrong}.items(), 1 << 20, "here")


def test_a_form_that_is_right_but_bulky_is_better_than_none(caplog):
    bulky, wrong = Trial(0.004, 2 << 20), Trial(0.2, 0)
    assert choose({"conv3d": wrong, "three conv2d": bulky}.items(), 1 << 20, "here") is framewise
    assert choose({"conv3d": bulky, "three conv2d": bulky}.items(), 1 << 20, "here") is FORMS["conv3d"]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "2 MiB" in caplog.text and "20.0%" in caplog.text


def test_no_form_is_tried_behind_a_good_one():
    def trials():
        yield "conv3d", Trial(0.004, 0)
        pytest.fail("needless")

    assert choose(trials(), 1 << 20, "here") is FORMS["conv3d"]


def test_the_trial_measures_the_error(monkeypatch):
    monkeypatch.setattr(convolution, "TRIAL_CHANNELS", 16)  # processors have no fast 16-bit kernel for 3-D
    monkeypatch.setattr(convolution, "TRIAL_THW", (4, 10, 10))
    piece = convolution._trial_piece(CPU, torch.bfloat16)
    assert convolution._try(framewise, *piece).error < 0.01
    assert convolution._try(lambda x, w, b, s: F.conv3d(x, w.flip(2), b, s), *piece).fault(1 << 40)


def test_processors_and_float32_are_not_tried(monkeypatch):
    monkeypatch.setattr(convolution, "_try", lambda *args: pytest.fail("no trial is needed"))
    assert convolution.convolution_for(CPU, torch.bfloat16) is F.conv3d
    assert convolution.convolution_for(torch.device("meta"), torch.float16) is F.conv3d
