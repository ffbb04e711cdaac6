"""Decoding under the standalone host: plans, reports, and a way on whenever memory runs out."""

from __future__ import annotations

import errno
import gc
import os
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.nn.functional as F
from comfyui_kandinsky5.kandinsky_core.errors import BudgetError, KandinskyError, MediaError, ShapeError
from comfyui_kandinsky5.kandinsky_core.io import media
from comfyui_kandinsky5.kandinsky_core.io.latents import read_latent
from comfyui_kandinsky5.kandinsky_core.io.media import read_video
from comfyui_kandinsky5.kandinsky_core.memory.plan import Plan
from comfyui_kandinsky5.kandinsky_core.vae import compiled, decoding
from comfyui_kandinsky5.kandinsky_core.vae.plan import (
    LATE_TILE,
    REFERENCE,
    SINGLE_PASS,
    STREAM,
    DecodePlan,
    decode_plans,
    needed_bytes,
    plan_decode,
)
from comfyui_kandinsky5.nodes import standalone_vae
from comfyui_kandinsky5.nodes.decode import Wanted, decode_images
from comfyui_kandinsky5.nodes.vae import K5VAEDecodeTiled
from comfyui_kandinsky5.nodes.video import FPS, K5DecodeVideo, frame_rate
from compiler import can_compile
from torch.testing import assert_close

LATENT = torch.randn(1, 16, 6, 6, 8, generator=torch.Generator().manual_seed(0))
THW = tuple(LATENT.shape[2:])
EXACT = {"atol": 1e-5, "rtol": 0}  # float32 rounding of another order of summation


@pytest.fixture
def vae(host, models):
    return host.load_vae(models / "vae" / tiny.VIDEO_VAE, dtype="fp32")


@pytest.fixture
def known(vae, host, monkeypatch):
    """The statistics a decode would sample, taken once, so that all plans have the same; gives the picture."""
    network = host.workplace(vae).network
    plan = DecodePlan(mode=STREAM, latent_thw=tuple(LATENT.shape[2:]))
    statistics = decoding.sampled_statistics(network, LATENT, plan)

    class Known(decoding.Sampling):
        def __init__(self, *_):
            super().__init__(1, None)
            self.source = SimpleNamespace(statistics=statistics)

        def run(self):
            pass

    monkeypatch.setattr(decoding, "Sampling", Known)
    return decode_images(vae, LATENT, Wanted())[0]


@pytest.fixture
def image_vae(host, models):
    return host.load_vae(models / "vae" / tiny.IMAGE_VAE, dtype="fp32")


class Scarce:
    """Convolutions that run out of memory: call `after` of an attempt fails, in the first `attempts` attempts."""

    def __init__(self, monkeypatch, after=0, attempts=1):
        self.after, self.attempts, self.calls, self.failures = after, attempts, 0, 0
        for name in ("conv3d", "conv2d"):
            monkeypatch.setattr(F, name, self._scarce(getattr(F, name)))

    def _scarce(self, convolve):
        def scarce(*arguments):
            self.calls += 1
            if self.calls > self.after and self.failures < self.attempts:
                self.calls = 0
                self.failures += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            return convolve(*arguments)

        return scarce


@pytest.mark.parametrize("mode", ["auto", REFERENCE, STREAM, LATE_TILE, SINGLE_PASS])
def test_every_mode_gives_the_frames_and_says_how(vae, mode):
    image, report = K5VAEDecodeTiled.execute(vae, {"samples": LATENT}, mode, 0.0, 0).result
    assert image.shape == (21, 48, 64, 3) and 0 <= image.min() < image.max() <= 1
    plan = {"auto": STREAM}.get(mode, mode)
    assert report.startswith(f"21 frames of 64 × 48: {plan}: ") and "not measured on this device" in report


def planned(budget_bytes, latent_thw=THW, **how):
    """A memory plan whose decode is as asked for."""
    how = {"free_bytes": budget_bytes, "itemsize": 4} | how
    return Plan(budget_bytes=budget_bytes, decode=plan_decode(tiny.VIDEO_VAE_SPEC, latent_thw, **how))


def test_a_memory_plan_says_how_to_decode(vae, known):
    plan = planned(2**30, mode=LATE_TILE, chunk=1, tiles=(2, 2))
    image, report = K5VAEDecodeTiled.execute(vae, {"samples": LATENT}, "auto", 0.0, 0, plan).result
    assert f"64 × 48: {plan.decode}\n" in report and "2 x 2 tiles" in report
    assert_close(image, known, **EXACT)


def test_what_is_set_on_the_node_goes_before_the_memory_plan(vae):
    plan = planned(2**30, mode=LATE_TILE, tiles=(2, 2))
    _, report = K5VAEDecodeTiled.execute(vae, {"samples": LATENT}, SINGLE_PASS, 0.0, 0, plan).result
    assert f": {SINGLE_PASS}: " in report


def test_a_mode_set_on_the_memory_plan_is_kept_with_the_latent(vae, host):
    """For another latent than the planned one, too; whoever resumes decodes in it."""
    plan = replace(planned(2**30, latent_thw=(2, 6, 8), mode=SINGLE_PASS), decode_mode=SINGLE_PASS)
    _, report = K5VAEDecodeTiled.execute(vae, {"samples": LATENT}, "auto", 0.0, 8, plan).result
    assert f": {SINGLE_PASS}: " in report.splitlines()[1]
    (path,) = host.latents().values()
    assert read_latent(path).facts["mode"] == SINGLE_PASS


def test_a_memory_plan_for_another_latent_still_gives_its_budget(vae, host):
    weights = sum(weight.nbytes for weight in host.workplace(vae).network.parameters())
    least = min(plan.peak_bytes for plan in decode_plans(tiny.VIDEO_VAE_SPEC, THW, 4))
    plan = planned(weights + needed_bytes(least), latent_thw=(2, 6, 8), mode=LATE_TILE)
    _, report = K5VAEDecodeTiled.execute(vae, {"samples": LATENT}, "auto", 0.0, 0, plan).result
    assert "It is for a latent of (2, 6, 8) frames, rows and columns; this one has (6, 6, 8). Planned anew" in report
    assert f"peak {least / 2**30:.2f} GiB" in report.splitlines()[1]


def test_a_memory_plan_that_does_not_fit_any_more_is_made_anew(vae, host, monkeypatch):
    plan = planned(2**30, mode=STREAM, chunk=4)
    ways = decode_plans(tiny.VIDEO_VAE_SPEC, THW, 4, STREAM)
    free = min(needed_bytes(way.peak_bytes) for way in ways if way.chunk == 4) - 1
    monkeypatch.setattr(standalone_vae.StandaloneWorkplace, "free_bytes", lambda _: free)
    _, report = K5VAEDecodeTiled.execute(vae, {"samples": LATENT}, "auto", 0.0, 0, plan).result
    assert "Not decoded as the memory plan says. Decoding " in report and "Planned anew" in report
    assert "stream: 4 latent frames" not in report.splitlines()[1]


def test_clips_of_a_batch_follow_each_other(vae):
    both = torch.cat([LATENT, -LATENT])
    image, _ = decode_images(vae, both, Wanted())
    assert_close(image[21:], decode_images(vae, -LATENT, Wanted())[0], **EXACT)


def test_late_tiles_are_the_picture_of_stream(vae, known):
    assert_close(decode_images(vae, LATENT, Wanted(mode=LATE_TILE))[0], known, **EXACT)


def test_compiled_norms_give_the_same_picture(vae, known):
    image, report = K5VAEDecodeTiled.execute(vae, {"samples": LATENT}, "auto", 0.0, 0, compile=True).result
    assert_close(image, known, **EXACT)
    assert ("torch.compile is left" in report) != can_compile()


def test_why_nothing_is_compiled_is_told_once_for_a_batch(vae, known, monkeypatch, caplog):
    def refuse(*_):
        raise RuntimeError("no compiler in sight\nand much more")

    monkeypatch.setattr(compiled, "check", refuse)
    image, report = decode_images(vae, torch.cat([LATENT, LATENT]), Wanted(compile=True))
    assert torch.equal(image[:21], known) and torch.equal(image[21:], known)
    [line] = [line for line in report.splitlines() if "torch.compile" in line]
    assert "(RuntimeError: no compiler in sight)" in line
    assert [record.getMessage() for record in caplog.records].count(line) == 1


@pytest.mark.parametrize("mode", [STREAM, LATE_TILE])
@pytest.mark.parametrize("after", [0, 1, 7, 33, 80])
def test_running_out_at_any_stage_goes_on_to_the_same_picture(vae, known, monkeypatch, mode, after, caplog):
    scarce = Scarce(monkeypatch, after)
    image, report = decode_images(vae, LATENT, Wanted(mode=mode))
    assert scarce.failures == 1
    assert_close(image, known, **EXACT)
    assert "Out of memory after" in report and "Going on from there with" in report
    assert "Going on from there with" in caplog.text


@pytest.mark.parametrize("after", [0, 50])
def test_running_out_while_statistics_are_sampled_samples_again(vae, monkeypatch, after):
    wanted, _ = decode_images(vae, LATENT, Wanted())
    scarce = Scarce(monkeypatch, after)
    image, report = decode_images(vae, LATENT, Wanted())
    assert scarce.failures == 1 and "Out of memory after 0 of 21 frames" in report
    assert (image - wanted).square().mean() < 1e-3  # smaller windows of random weights: other statistics


def test_the_ladder_ends_on_the_processor_with_the_same_picture(vae, known, monkeypatch, host):
    scarce = Scarce(monkeypatch, after=3, attempts=1000)
    moved = []
    real = standalone_vae.StandaloneWorkplace.to_processor

    def to_processor(place):
        moved.append(scarce.failures)
        scarce.attempts = 0
        real(place)

    monkeypatch.setattr(standalone_vae.StandaloneWorkplace, "to_processor", to_processor)
    image, report = decode_images(vae, LATENT, Wanted())
    assert_close(image, known, **EXACT)
    rungs = re.findall(r"Going on from there with ([a-z-]+): .*", report)
    assert rungs[0] == STREAM and rungs[-1] == LATE_TILE and len(moved) == 1
    assert "caches in main memory" in report and "on the processor, which is slow" in report
    assert host._resident is None  # the next work loads the weights on the device again


@pytest.mark.parametrize("rungs", range(1, 6))
def test_every_rung_is_a_place_to_end(vae, known, monkeypatch, rungs):
    Scarce(monkeypatch, after=5, attempts=rungs)
    image, report = decode_images(vae, LATENT, Wanted())
    assert_close(image, known, **EXACT)
    assert report.count("Out of memory") == rungs


def test_when_the_processor_runs_out_too_the_error_names_the_latent(vae, host, monkeypatch):
    Scarce(monkeypatch, attempts=1000)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory.* The latent is safe: ") as caught:
        K5VAEDecodeTiled.execute(vae, {"samples": LATENT}, "auto", 0.0, 8)
    assert str(next(iter(host.latents().values()))) in str(caught.value)


def test_the_released_windows_go_on_in_chunks(vae, monkeypatch):
    counted = Scarce(monkeypatch, attempts=0)
    wanted, _ = decode_images(vae, LATENT, Wanted(mode=REFERENCE))
    Scarce(monkeypatch, after=int(0.8 * counted.calls))
    image, report = decode_images(vae, LATENT, Wanted(mode=REFERENCE))
    done = int(re.search(r"Out of memory after (\d+) of 21 frames", report)[1])
    assert done and torch.equal(image[:done], wanted[:done])
    assert "Going on from there with stream" in report


def test_a_mode_that_a_size_does_not_have_is_refused(vae):
    with pytest.raises(BudgetError, match="late-tile.* is not possible: .*take another mode"):
        decode_images(vae, LATENT[..., :2, :2], Wanted(mode=LATE_TILE))


def test_a_picture_goes_on_on_the_processor(image_vae, monkeypatch):
    latent = LATENT[:, :, 0]
    wanted, _ = decode_images(image_vae, latent, Wanted())
    Scarce(monkeypatch, after=4)
    image, report = decode_images(image_vae, latent, Wanted())
    assert torch.equal(image, wanted) and "on the processor" in report


def test_other_errors_pass_through(vae, monkeypatch):
    def broken(*_):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(F, "conv3d", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        decode_images(vae, LATENT, Wanted())


def test_a_limit_of_memory_changes_the_plan_and_not_the_picture(vae, known):
    image, report = decode_images(vae, LATENT, Wanted(limit_bytes=1))
    assert "Trying the least plan" in report and "late-tile" in report
    assert_close(image, known, **EXACT)


def test_latents_of_another_vae_are_refused(vae, image_vae):
    with pytest.raises(ShapeError, match="picture latents the FLUX one"):
        decode_images(image_vae, LATENT, Wanted())
    with pytest.raises(ShapeError, match="16 channels"):
        decode_images(vae, LATENT[:, :4], Wanted())


def test_nothing_of_a_failed_decode_stays_in_memory(vae, monkeypatch):
    Scarce(monkeypatch, attempts=1000)
    with pytest.raises(RuntimeError):
        decode_images(vae, LATENT, Wanted())
    gc.collect()
    left = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == (21, 48, 64, 3)]
    assert not left


@pytest.mark.parametrize("mode", [REFERENCE, STREAM, LATE_TILE])
def test_a_clip_in_a_file_has_the_frames_of_the_images(vae, host, mode):
    image, _ = decode_images(vae, LATENT, Wanted(mode=mode))
    out = K5DecodeVideo.execute(vae, {"samples": LATENT}, 8.0, "sub/x", "mkv", "lossless", 14.0, mode, 0.0, 0)
    clip = out.result[0]
    assert clip.path == host.output / "sub" / "x_00001_.mkv" and clip.fps == 8
    found = read_video(clip.path)
    assert torch.equal((found.frames_THW3 * 255).round(), (image * 255).round())
    assert [path.name for path in clip.path.parent.iterdir()] == ["x_00001_.mkv"]


def test_a_clip_that_cannot_be_written_names_its_own_place(vae, host, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(media._Encoder, "write", full)
    with pytest.raises(MediaError, match="The latent is safe: ") as raised:
        K5DecodeVideo.execute(vae, {"samples": LATENT}, 8.0, "sub/x", "mp4", "h264", 14.0, "auto", 0.0, 8)
    assert str(host.output / "sub" / "x_00001_.mp4") in str(raised.value) and ".partial" not in str(raised.value)
    assert not list((host.output / "sub").iterdir())


def test_a_number_taken_meanwhile_is_left_alone(vae, host):
    def take(done, total):
        (host.output / "x_00001_.mp4").write_text("another run's clip")

    host.on_progress = take
    out = K5DecodeVideo.execute(vae, {"samples": LATENT}, 8.0, "x", "mp4", "h264", 14.0, "auto", 0.0, 0)
    assert out.result[0].path == host.output / "x_00002_.mp4" and out.result[0].path.stat().st_size > 100
    assert (host.output / "x_00001_.mp4").read_text() == "another run's clip"


def test_cancelling_leaves_the_latent_and_no_half_file(vae, host):
    def cancel(done, total):
        if done > 40:
            raise KeyboardInterrupt

    host.on_progress = cancel
    with pytest.raises(KeyboardInterrupt):
        K5DecodeVideo.execute(vae, {"samples": LATENT}, 8.0, "x", "mp4", "h264", 14.0, "auto", 0.0, 8)
    left = [path for path in host.output.rglob("*") if path.is_file()]
    assert left == list(host.latents().values()) and len(left) == 1


def test_whatever_a_decode_refuses_the_latent_is_on_disk_first(vae, host):
    def decode(vae, prefix):
        return K5DecodeVideo.execute(vae, {"samples": LATENT}, 0.0, prefix, "mp4", "h264", 14.0, "auto", 0.0, 8)

    with pytest.raises(KandinskyError, match="leads out of the output folder.* The latent is safe: "):
        decode(vae, "../x")
    assert len(host.latents()) == 1
    next(iter(host.latents().values())).unlink()
    for call in (lambda: decode(object(), "x"), lambda: K5VAEDecodeTiled.execute(
        object(), {"samples": LATENT}, "auto", 0.0, 8
    )):  # fmt: skip
        with pytest.raises(KandinskyError, match="neither HunyuanVideo's nor FLUX's.* The latent is safe: "):
            call()
    assert len(host.latents()) == 1


def test_a_prefix_is_checked_before_anything_runs(host):
    assert K5DecodeVideo.validate_inputs("sub/%width%") is True and K5DecodeVideo.validate_inputs(None) is True
    assert "leads out of the output folder" in K5DecodeVideo.validate_inputs("../x")


@pytest.mark.parametrize("made", [None, "fast", [24], 0, -1, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_not_believed(made):
    assert frame_rate({"fps": made}) == FPS and frame_rate({}) == FPS
    assert frame_rate({"fps": 8}) == 8.0
