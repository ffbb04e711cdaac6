"""Decoding in pieces is the un-tiled decode: every chunk, tile grid, resume point and change of plan, in float64."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from comfyui_kandinsky5.kandinsky_core.errors import ShapeError
from comfyui_kandinsky5.kandinsky_core.vae import causal, passage, stages, stream
from comfyui_kandinsky5.kandinsky_core.vae.decoding import (
    Decoding,
    decode_with,
    exact_statistics,
    sampled_statistics,
)
from comfyui_kandinsky5.kandinsky_core.vae.plan import LATE_TILE, REFERENCE, SINGLE_PASS, STREAM
from comfyui_kandinsky5.kandinsky_core.vae.tiling import single_plan, window_plan
from tiny_vae import EXACT, Own, error, latent, plan_for, tiny_vae


@pytest.fixture(scope="module")
def vae():
    return tiny_vae()


class Case:
    """A latent, its un-tiled decode by the module itself, and that decode's statistics."""

    def __init__(self, vae, *shape):
        self.vae, self.z = vae, latent(*shape)
        with torch.no_grad():
            self.whole = vae.decode(self.z, plan=single_plan(*self.z.shape[2:]))
        self.statistics = exact_statistics(vae, self.z)

    def decode(self, mode=STREAM, **settings):
        return decode_with(self.vae, self.z, plan_for(self.z, mode, **settings), statistics=self.statistics)

    def decoding(self, canvas, mode=STREAM, **settings):
        return Decoding(
            self.vae, self.z, plan_for(self.z, mode, **settings), on_piece=canvas, statistics=self.statistics
        )


class Canvas:
    """Puts pieces together and insists that no pixel comes twice and that each place comes in time order."""

    def __init__(self, like):
        self.out = torch.full_like(like, torch.nan)
        self.places = {}

    def __call__(self, piece):
        place = (piece.rows.start, piece.rows.stop, piece.columns.start, piece.columns.stop)
        assert piece.frames.start >= self.places.get(place, 0)
        self.places[place] = piece.frames.stop
        target = self.out[:, :, piece.frames, piece.rows, piece.columns]
        assert target.shape == piece.pixels_BCTHW.shape and target.isnan().all()
        target.copy_(piece.pixels_BCTHW)


@pytest.fixture(scope="module")
def small(vae):
    return Case(vae, 1, 5, 2, 3)


@pytest.fixture(scope="module")
def wide(vae):
    """Large enough that a tile and its context are not the whole frame."""
    return Case(vae, 1, 3, 7, 11)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_every_chunk_is_the_whole(small, chunk):
    assert error(small.decode(chunk=chunk), small.whole) < EXACT


@pytest.mark.parametrize(("tiles", "chunk"), [((1, 2), 1), ((2, 2), 3), ((3, 2), 2)])
def test_every_tile_grid_is_the_whole(wide, tiles, chunk):
    assert error(wide.decode(LATE_TILE, tiles=tiles, chunk=chunk), wide.whole) < EXACT


@pytest.mark.parametrize("shape", [(2, 3, 2, 3), (1, 1, 2, 3), (2, 1, 3, 2), (1, 2, 3, 1)])
def test_batches_and_single_frames(vae, shape):
    case = Case(vae, *shape)
    assert error(case.decode(chunk=2, caches_on_host=True), case.whole) < EXACT
    assert error(case.decode(LATE_TILE, tiles=(2, 1), chunk=1), case.whole) < EXACT


def test_a_host_s_layers_give_the_same(small, monkeypatch):
    own = tiny_vae(ops=Own)
    monkeypatch.setattr(causal, "phase_kernels", None)  # would look into the layer
    case = plan_for(small.z, chunk=2)
    assert error(decode_with(own, small.z, case, statistics=small.statistics), small.whole) < EXACT


def test_a_step_that_indices_cannot_reach_is_split_in_time(small, monkeypatch):
    taken = []
    frames_at_once = stages.Stage.frames_at_once

    def spy(self, *args):
        taken.append((self.grid, frames_at_once(self, *args)))
        return taken[-1][1]

    monkeypatch.setattr(stages.Stage, "frames_at_once", spy)
    monkeypatch.setattr(stages, "INDEX_LIMIT", 8 * 5 * (16 + 2) * (24 + 2))  # five padded frames of full size
    assert error(small.decode(chunk=3), small.whole) < EXACT
    assert {frames for grid, frames in taken if grid == 8} == {3}
    assert 3 in {frames for grid, frames in taken if grid == 1}


@pytest.mark.parametrize("mode", [STREAM, LATE_TILE])
def test_without_sampling_a_short_clip_in_one_chunk_is_exact(small, mode):
    if mode == STREAM:
        assert error(decode_with(small.vae, small.z, plan_for(small.z, chunk=5)), small.whole) < EXACT
    else:
        assert (
            error(decode_with(small.vae, small.z, plan_for(small.z, mode, tiles=(1, 2))), small.whole) > EXACT
        )


@pytest.mark.parametrize("late", [False, True])
def test_a_halo_one_cell_too_small_shows(wide, monkeypatch, late):
    build = passage.decoder_stages
    first = 0 if late else 1

    def narrow(*args):
        made = build(*args)
        start = stages.late_index(made)
        steps = [index for index, stage in enumerate(made) if index >= start and stage.zoom > 1][first]
        made[steps] = replace(made[steps], halo=made[steps].halo - 1)
        for index in range(steps + 1, len(made)):
            before = made[index - 1]
            made[index] = replace(made[index], halo=min(made[index].halo, before.halo * before.zoom))
        return made

    assert error(wide.decode(LATE_TILE, tiles=(1, 2)), wide.whole) < EXACT
    monkeypatch.setattr(passage, "decoder_stages", narrow)
    assert error(wide.decode(LATE_TILE, tiles=(1, 2)), wide.whole) > 1e-6


def test_halos_are_derived_from_the_layers(vae):
    made = stages.decoder_stages(vae, latent(1, 1, 1, 1), 1)
    late = made[stages.late_index(made) :]
    assert [stage.halo for stage in late if stage.zoom > 1] == [6, 4]
    assert late[0].grid == 2 and [stage.halo for stage in late if stage.grid == 8] == [8] * 7


def test_a_cache_one_frame_too_short_shows(small, monkeypatch):
    tail = causal.Padded.tail

    def forgetful(self, frames, cache):
        kept = tail(self, frames, cache)
        if frames == 2:
            kept[:, :, 0] = kept[:, :, 1]
        return kept

    monkeypatch.setattr(causal.Padded, "tail", forgetful)
    assert error(small.decode(chunk=2), small.whole) > 1e-3


class Fault(RuntimeError):
    """Stands for running out of memory."""


class Faulty:
    """Makes the n-th convolution or attention of a decode raise when it has been computed: its result is lost."""

    def __init__(self, monkeypatch, fails):
        self.calls, self.faults, self.fails = 0, 0, fails
        monkeypatch.setattr(causal.Padded, "tail", self.failing(causal.Padded.tail))
        monkeypatch.setattr(F, "scaled_dot_product_attention", self.failing(F.scaled_dot_product_attention))

    def failing(self, function):
        def maybe(*args):
            self.calls += 1
            if self.fails(self.calls):
                self.faults += 1
                raise Fault
            return function(*args)

        return maybe


def finish(decoding, between=lambda: None):
    """Run on after every failure."""
    before = 0
    while True:
        try:
            decoding.run()
            return
        except Fault:
            assert decoding.frames_done >= before
            before = decoding.frames_done
        between()


@pytest.mark.parametrize(("mode", "tiles"), [(STREAM, (1, 1)), (LATE_TILE, (1, 2))])
def test_a_decode_resumes_at_every_step(small, monkeypatch, mode, tiles):
    faulty = Faulty(monkeypatch, lambda call: call % 2)  # each step fails once
    canvas = Canvas(small.whole)
    decoding = small.decoding(canvas, mode, tiles=tiles, chunk=1)
    finish(decoding)
    assert faulty.faults >= 5 * 34 and decoding.frames_done == 17
    assert error(canvas.out, small.whole) < EXACT


def test_a_shortcut_that_fails_leaves_the_past_as_it_was(small, monkeypatch):
    """It runs after the block's convolution, in the same step."""
    plain, calls = stages.ResSecond._added, []

    def added(*args):
        calls.append(None)
        if len(calls) % 2:
            raise Fault
        return plain(*args)

    monkeypatch.setattr(stages.ResSecond, "_added", added)
    canvas = Canvas(small.whole)
    finish(small.decoding(canvas, chunk=1))
    assert error(canvas.out, small.whole) < EXACT


LADDER = (
    {"chunk": 3},
    {"chunk": 2},
    {"chunk": 1},
    {"mode": LATE_TILE, "tiles": (1, 2), "chunk": 1},
    {"mode": LATE_TILE, "tiles": (2, 2), "chunk": 2},
    {"mode": LATE_TILE, "tiles": (3, 4), "chunk": 1, "caches_on_host": True},
)


@pytest.mark.parametrize("every", [7, 29, 41, 67])
def test_a_decode_walks_down_the_ladder(small, monkeypatch, every):
    Faulty(monkeypatch, lambda call: call % every == 0)
    canvas, steps = Canvas(small.whole), iter(LADDER[1:])
    decoding = small.decoding(canvas, **LADDER[0])

    def down():
        if (settings := next(steps, None)) is not None:
            decoding.replan(plan_for(small.z, **{"mode": STREAM} | settings))

    finish(decoding, down)
    assert error(canvas.out, small.whole) < EXACT


@pytest.mark.parametrize("at", range(3, 97, 9))
def test_late_tiles_take_over_anywhere(small, monkeypatch, at):
    Faulty(monkeypatch, lambda call: call == at)
    canvas = Canvas(small.whole)
    decoding = small.decoding(canvas, chunk=2)
    finish(decoding, lambda: decoding.replan(plan_for(small.z, LATE_TILE, tiles=(2, 2), chunk=1)))
    assert error(canvas.out, small.whole) < EXACT
    assert len(canvas.places) == (
        5 if at > 35 else 4
    )  # whole frames that were finished are not decoded again


def test_a_consumer_that_fails_gets_its_piece_again(small):
    canvas, seen = Canvas(small.whole), []

    def picky(piece):
        seen.append(piece.frames.start)
        if len(seen) in (1, 3):
            raise Fault
        canvas(piece)

    decoding = small.decoding(picky, chunk=2)
    finish(decoding)
    assert seen == [0, 0, 5, 5, 13] and error(canvas.out, small.whole) < EXACT


def test_a_cancelled_decode_goes_on(small):
    canvas, ticks = Canvas(small.whole), []

    def on_tile(done, total):
        ticks.append((done, total))
        if done == 2:
            raise Fault

    decoding = Decoding(
        small.vae,
        small.z,
        plan_for(small.z, chunk=1),
        on_piece=canvas,
        on_tile=on_tile,
        statistics=small.statistics,
    )
    with pytest.raises(Fault):
        decoding.run()
    assert decoding.frames_done == 5
    decoding.run()
    assert ticks == [(done, 5) for done in range(1, 6)]
    assert error(canvas.out, small.whole) < EXACT


def test_sampling_resumes_at_every_step(small, monkeypatch):
    wanted = decode_with(small.vae, small.z, plan_for(small.z, chunk=1))
    Faulty(monkeypatch, lambda call: call % 2)
    canvas = Canvas(small.whole)
    finish(Decoding(small.vae, small.z, plan_for(small.z, chunk=1), on_piece=canvas))
    assert error(canvas.out, wanted) < EXACT


@pytest.mark.parametrize("at", [3, 60, 100])  # in a look, in the other one, in a window
@pytest.mark.parametrize("mode", [REFERENCE, SINGLE_PASS, STREAM, LATE_TILE])
def test_sampling_goes_on_under_another_plan(small, monkeypatch, mode, at):
    plan = plan_for(small.z, mode, tiles=(2, 1) if mode == LATE_TILE else (1, 1), chunk=1)
    Faulty(monkeypatch, lambda call: call in (at, at + 10))
    canvas = Canvas(small.whole)
    decoding = Decoding(small.vae, small.z, plan_for(small.z, chunk=3), on_piece=canvas)
    finish(decoding, lambda: decoding.replan(plan))
    assert (decoding.statistics is None) == (mode in (REFERENCE, SINGLE_PASS))
    if mode in (REFERENCE, SINGLE_PASS):
        assert error(canvas.out, decode_with(small.vae, small.z, plan)) < EXACT
        return
    assert canvas.out.isfinite().all()
    undisturbed = sampled_statistics(small.vae, small.z, plan)
    assert counts(decoding.statistics) == counts(undisturbed)


def counts(statistics):
    """How many values of each norm were seen."""
    return {name: moments.count for name, moments in statistics.moments.items()}


@pytest.mark.parametrize(("mode", "tiles"), [(STREAM, (1, 1)), (LATE_TILE, (2, 1))])
def test_progress_ends_at_its_total(small, mode, tiles):
    ticks = []
    plan = plan_for(small.z, mode, tiles=tiles)
    decode_with(small.vae, small.z, plan, on_tile=lambda *at: ticks.append(at))
    assert ticks[-1][0] == ticks[-1][1] and len({total for _, total in ticks}) == 1
    assert [done for done, _ in ticks] == sorted({done for done, _ in ticks})


def test_single_pass_sees_no_future(vae):
    z = latent(1, 4, 2, 3)
    later = z.clone()
    later[:, :, 2:] += 1
    before, after = (decode_with(vae, some, plan_for(z, SINGLE_PASS, chunk=2)) for some in (z, later))
    assert torch.equal(before[:, :, :5], after[:, :, :5]) and error(before[:, :, 5:], after[:, :, 5:]) > 1e-3


def test_single_pass_over_one_chunk_is_the_whole(small):
    assert (
        error(decode_with(small.vae, small.z, plan_for(small.z, SINGLE_PASS, chunk=5)), small.whole) < EXACT
    )


def test_single_pass_goes_on_in_tiles_with_the_statistics_it_had(small, monkeypatch):
    z, canvas = small.z, Canvas(small.whole)
    plain = decode_with(small.vae, z, plan_for(z, SINGLE_PASS, chunk=2))
    Faulty(monkeypatch, lambda call: call == 50)
    decoding = Decoding(small.vae, z, plan_for(z, SINGLE_PASS, chunk=2), on_piece=canvas)
    finish(decoding, lambda: decoding.replan(plan_for(z, LATE_TILE, tiles=(1, 2), chunk=1)))
    assert torch.equal(canvas.out[:, :, :5], plain[:, :, :5]) and canvas.out.isfinite().all()


@pytest.mark.parametrize("tiles", [(1, 1), (2, 1)])
def test_reference_mode_follows_the_released_windows(vae, tiles, monkeypatch):
    z = latent(1, 7, 6, 2)
    tile_px = None if tiles == (1, 1) else (40, 16)
    with torch.no_grad():
        wanted = vae.decode(z, plan=window_plan(7, 6, 2, tile_px=tile_px))
    Faulty(monkeypatch, lambda call: call in (40, 80))
    canvas = Canvas(wanted)
    decoding = Decoding(vae, z, plan_for(z, REFERENCE, tiles=tiles), on_piece=canvas)
    finish(decoding)
    assert error(canvas.out, wanted) < EXACT and len(canvas.places) == 1


def test_released_windows_go_on_as_a_stream(vae, monkeypatch):
    z = latent(1, 7, 2, 3)
    statistics = exact_statistics(vae, z)
    stream = decode_with(vae, z, plan_for(z), statistics=statistics)
    Faulty(monkeypatch, lambda call: call == 50)
    canvas = Canvas(stream)
    decoding = Decoding(vae, z, plan_for(z, REFERENCE), on_piece=canvas, statistics=statistics)
    finish(decoding, lambda: decoding.replan(plan_for(z, chunk=1)))
    assert error(canvas.out[:, :, 9:], stream[:, :, 9:]) < EXACT and canvas.out.isfinite().all()
    with pytest.raises(ShapeError, match="blends windows"):
        decoding.replan(plan_for(z, REFERENCE))


def test_released_windows_go_on_on_another_device(vae, monkeypatch):
    z = latent(1, 7, 2, 3)
    moving, pieces = deepcopy(vae), []
    decoding = Decoding(moving, z, plan_for(z, REFERENCE), on_piece=pieces.append)
    Faulty(monkeypatch, lambda call: call == 50)

    def move():
        assert len(pieces) == 1
        decoding.replan(decoding.plan, device=moving.to("meta").decoder.conv_in.conv.weight.device)

    finish(decoding, move)
    assert [piece.pixels_BCTHW.device.type for piece in pieces] == ["cpu", "meta"]
    assert pieces[-1].frames.stop == 25


def test_plans_that_do_not_fit_are_refused(small):
    for plan in (
        replace(plan_for(small.z), latent_thw=(5, 3, 2)),
        plan_for(small.z, "fast"),
        plan_for(small.z, chunk=0),
        plan_for(small.z, LATE_TILE, tiles=(5, 1)),
    ):
        with pytest.raises(ShapeError):
            decode_with(small.vae, small.z, plan, statistics=small.statistics)


def test_statistics_of_another_network_are_refused(small):
    fewer = replace(small.statistics, moments=dict(list(small.statistics.moments.items())[1:]))
    with pytest.raises(ShapeError, match="know no norm"):
        decode_with(small.vae, small.z, plan_for(small.z), statistics=fewer)


def test_caches_wait_where_the_plan_says(small, monkeypatch):
    waits = []
    monkeypatch.setattr(stream, "parked", lambda caches, places: waits.append(len(caches)) or caches)
    small.decode(chunk=3)
    assert not waits
    small.decode(chunk=5, caches_on_host=True)
    assert not waits  # nothing comes after the only chunk
    small.decode(chunk=3, caches_on_host=True)
    assert len(waits) == 2 * 34  # convolutions and the attention: after the first chunk, and before the last
