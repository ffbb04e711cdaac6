"""Running out of memory walks down the ladder, at every rung and stage, and the clip is the undisturbed one."""

from __future__ import annotations

import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from comfyui_kandinsky5.kandinsky_core.vae import causal, stream
from comfyui_kandinsky5.kandinsky_core.vae.decoding import Decoding, decode_with, exact_statistics
from comfyui_kandinsky5.kandinsky_core.vae.plan import (
    AUTO,
    LATE_TILE,
    REFERENCE,
    SINGLE_PASS,
    STREAM,
    plan_decode,
    smaller,
)
from comfyui_kandinsky5.kandinsky_core.vae.rescue import finish
from tiny_vae import EXACT, error, latent, tiny_vae

CPU = torch.device("cpu")


class OutOfMemory(RuntimeError):
    """Stands for the device's own error."""


class Broken(RuntimeError):
    """Stands for any other error."""


class Rescued:
    """One decode of a tiny autoencoder whose stages fail when `fails(call, plan)` says so, and what became of it."""

    def __init__(self, monkeypatch, vae, z, plan, fails, statistics=None, error=OutOfMemory):
        self.lines, self.calls, self.failures, self.freed, self.moved = [], 0, [], 0, 0
        self.out = torch.full((1, 3, 4 * z.shape[2] - 3, 8 * z.shape[3], 8 * z.shape[4]), torch.nan, dtype=z.dtype)
        self.fails, self.error, self.traces = fails, error, []
        monkeypatch.setattr(causal.Padded, "tail", self.failing(causal.Padded.tail))
        monkeypatch.setattr(F, "scaled_dot_product_attention", self.failing(F.scaled_dot_product_attention))
        self.decoding = Decoding(vae, z, plan, on_piece=self.put, statistics=statistics)

    def failing(self, function):
        def maybe(*args):
            self.calls += 1
            if self.fails(self.calls, self.decoding.plan) and not self.moved:
                self.failures.append(self.decoding.plan)
                held = torch.empty(1)
                self.traces.append(weakref.ref(held))
                raise self.error("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return function(*args)

        return maybe

    def put(self, piece):
        target = self.out[:, :, piece.frames, piece.rows, piece.columns]
        assert target.isnan().all(), "a pixel came twice"
        target.copy_(piece.pixels_BCTHW)

    def free_memory(self):
        self.freed += 1
        assert sys.exc_info() == (None, None, None)
        assert self.traces[-1]() is None, "the failed stage's tensors are still held"

    def to_processor(self):
        self.moved += 1
        self.decoding.replan(self.decoding.plan, device=CPU)

    def finish(self):
        finish(
            self.decoding, is_out_of_memory=lambda error: isinstance(error, OutOfMemory),
            free_memory=self.free_memory, to_processor=self.to_processor, announce=self.lines.append,
        )  # fmt: skip
        assert self.freed == len(self.lines) == len(self.failures)
        return self


@pytest.fixture(scope="module")
def vae():
    return tiny_vae()


@pytest.fixture(scope="module")
def clip(vae):
    """A latent, its statistics and the undisturbed decode."""
    z = latent(1, 7, 4, 5)
    statistics = exact_statistics(vae, z)
    return z, statistics, decode_with(vae, z, plan(vae, z), statistics=statistics)


def plan(vae, z, mode=AUTO, **asked):
    return plan_decode(vae.spec, tuple(z.shape[2:]), free_bytes=None, itemsize=8, mode=mode, **asked)


def rungs(vae, z):
    found = [plan(vae, z)]
    while (less := smaller(found[-1], vae.spec)) is not None:
        found.append(less)
    return found


def test_the_tiny_ladder_has_every_kind_of_rung(vae, clip):
    kinds = {(rung.mode, rung.caches_on_host) for rung in rungs(vae, clip[0])}
    assert kinds == {(STREAM, False), (LATE_TILE, False), (LATE_TILE, True)}


@pytest.mark.parametrize("rung", range(-1, 6))
def test_memory_that_holds_only_a_smaller_plan_is_found(monkeypatch, vae, clip, rung):
    z, statistics, whole = clip
    ladder = rungs(vae, z)
    room_bytes = ladder[rung].peak_bytes if rung >= 0 else 0  # -1: no plan at all

    def full(call, now):
        return call > 40 and now.peak_bytes > room_bytes

    run = Rescued(monkeypatch, vae, z, ladder[0], full, statistics).finish()
    assert error(run.out, whole) < EXACT
    assert run.moved == (rung < 0)
    assert run.failures == (ladder if rung < 0 else ladder[:rung])
    assert run.decoding.plan == ladder[rung]
    if rung < 0:
        assert "processor" in run.lines[-1] and "no smaller plan" in run.lines[-1]
    for line, before, after in zip(run.lines, ladder, ladder[1:], strict=False):
        assert line.startswith("Out of memory after ") and str(before) in line and str(after) in line
        assert "Cost: " in line and "none in the picture" in line


@pytest.fixture(scope="module")
def calls(vae, clip):
    """How many calls that can fail an undisturbed decode makes, by mode."""
    z, statistics, _ = clip
    with pytest.MonkeyPatch.context() as patch:
        modes = (STREAM, LATE_TILE)
        return {mode: _undisturbed(patch, vae, z, plan(vae, z, mode, chunk=2), statistics) for mode in modes}


def _undisturbed(patch, vae, z, start, statistics):
    with patch.context() as inner:
        return Rescued(inner, vae, z, start, lambda *_: False, statistics).finish().calls


@pytest.mark.parametrize("mode", [STREAM, LATE_TILE])
@pytest.mark.parametrize("part", range(13))
def test_one_failure_anywhere_changes_nothing(monkeypatch, vae, clip, calls, mode, part):
    z, statistics, whole = clip
    at = 1 + (calls[mode] - 1) * part // 12  # from the first to the last
    start = plan(vae, z, mode, chunk=2)
    run = Rescued(monkeypatch, vae, z, start, lambda call, _: call == at, statistics).finish()
    assert run.failures == [start]
    assert error(run.out, whole) < EXACT


def test_memory_that_runs_out_between_two_plans_takes_the_next_one(monkeypatch, vae, clip):
    z, statistics, whole = clip
    ladder = rungs(vae, z)
    run = Rescued(monkeypatch, vae, z, ladder[0], lambda call, now: call > 40 and now == ladder[0], statistics)
    replan, asked = run.decoding.replan, []

    def scarce(less):
        asked.append(less)
        if len(asked) == 1:
            run.failures.append(less)
            raise OutOfMemory
        replan(less)

    monkeypatch.setattr(run.decoding, "replan", scarce)
    run.finish()
    assert asked == ladder[1:3] and run.decoding.plan == ladder[2]
    assert error(run.out, whole) < EXACT


@pytest.mark.parametrize("at", [1, 2])
def test_memory_that_runs_out_while_tiles_are_cut_loses_nothing(monkeypatch, vae, clip, at):
    z, statistics, whole = clip
    start = next(rung for rung in rungs(vae, z)[::-1] if rung.mode == STREAM)
    run = Rescued(monkeypatch, vae, z, start, lambda call, now: call > 40 and now == start, statistics)
    part, cuts = stream.Stream.part, []

    def scarce(*args):
        cuts.append(run.decoding.plan)
        if len(cuts) == at:
            run.failures.append(run.decoding.plan)
            raise OutOfMemory
        return part(*args)

    monkeypatch.setattr(stream.Stream, "part", scarce)
    run.finish()
    assert [failed.mode for failed in run.failures] == [STREAM, LATE_TILE]
    assert error(run.out, whole) < EXACT


@pytest.mark.parametrize("at", [3, 30, 60])
def test_a_failure_while_statistics_are_sampled_goes_on(monkeypatch, vae, clip, at):
    z, _, _ = clip
    wanted = decode_with(vae, z, plan(vae, z, STREAM, chunk=2))
    run = Rescued(monkeypatch, vae, z, plan(vae, z, STREAM, chunk=2), lambda call, _: call == at).finish()
    assert len(run.failures) == 1 and "after 0 of 25 frames" in run.lines[0]
    scale = wanted.std().item()
    assert (run.out - wanted).std().item() < 0.15 * scale  # pools of smaller pieces, the same windows


def test_the_other_modes_go_on_as_chunks(monkeypatch, vae, clip):
    z, statistics, whole = clip
    start = plan(vae, z, REFERENCE)
    run = Rescued(monkeypatch, vae, z, start, lambda call, now: now == start and call > 50, statistics).finish()
    assert run.decoding.plan.mode in (STREAM, LATE_TILE) and "computed once more" in run.lines[0]
    assert error(run.out[:, :, 17:], whole[:, :, 17:]) < EXACT and run.out.isfinite().all()
    monkeypatch.undo()
    start = plan(vae, z, SINGLE_PASS, chunk=2)
    run = Rescued(monkeypatch, vae, z, start, lambda call, now: now == start and call > 50).finish()
    assert run.decoding.plan.mode != REFERENCE and "brightness" in run.lines[0] and run.out.isfinite().all()


def test_other_errors_pass_through(monkeypatch, vae, clip):
    z, statistics, whole = clip
    run = Rescued(monkeypatch, vae, z, plan(vae, z), lambda call, _: call == 60, statistics, error=Broken)
    with pytest.raises(Broken):
        run.finish()
    assert not run.lines
    run.fails = lambda *_: False
    run.decoding.run()  # and the decode stands where it stood
    assert error(run.out, whole) < EXACT


def test_what_the_processor_runs_out_of_passes_through(vae, clip):
    class Hopeless:
        def __init__(self):
            self.vae, self.plan, self.frames_done, self.plans = vae, plan(vae, clip[0]), 0, []

        def run(self):
            raise OutOfMemory

        def replan(self, less):
            self.plan = less
            self.plans.append(less)

    decoding, lines = Hopeless(), []
    with pytest.raises(OutOfMemory):
        finish(
            decoding, is_out_of_memory=lambda _: True, free_memory=lambda: None, to_processor=lambda: None,
            announce=lines.append,
        )  # fmt: skip
    assert decoding.plans == rungs(vae, clip[0])[1:] and len(lines) == len(decoding.plans) + 1
