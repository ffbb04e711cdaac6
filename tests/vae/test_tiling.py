"""Plans cover every frame and pixel, their weights sum to one, and the loop reports and can be stopped."""

from __future__ import annotations

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import ShapeError
from comfyui_kandinsky5.kandinsky_core.shapes import pixel_frames
from comfyui_kandinsky5.kandinsky_core.vae import tiling
from hypothesis import given, settings
from hypothesis import strategies as st

REPEATABLE = settings(deadline=None, derandomize=True, max_examples=60)
CELLS = st.integers(1, 60)
TILE_PX = st.integers(5, 40).map(lambda cells: 8 * cells)


def enlarge(z_BCTHW: torch.Tensor) -> torch.Tensor:
    """A decoder that only repeats: every output cell says which latent cell it came from."""
    pixels = z_BCTHW.repeat_interleave(8, -1).repeat_interleave(8, -2)
    return torch.cat((pixels[:, :, :1], pixels[:, :, 1:].repeat_interleave(4, 2)), 2)


def reduce(x_BCTHW: torch.Tensor) -> torch.Tensor:
    """The encoder that undoes it."""
    return x_BCTHW[:, :, ::4, ::8, ::8]


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(1, 1, *shape)


@REPEATABLE
@given(st.integers(1, 70))
def test_time_windows_cover_every_frame_once_or_faded(frames):
    windows = tiling.time_windows(frames)
    assert windows[0].start == 0 and windows[-1].stop == frames
    assert all(span.stop - span.start <= 5 for span in windows)
    reached = 0
    for span in windows:
        assert span.start + span.lead + span.blend == reached
        assert span.stop > reached
        reached = span.stop
    z = numbered(frames, 1, 1)
    plan = tiling.reference_plan(frames, 1, 1)
    assert torch.equal(tiling.run_plan(plan, z, enlarge, tiling.DECODE), enlarge(z))
    assert torch.equal(tiling.run_plan(plan, enlarge(z), reduce, tiling.ENCODE), z)


@REPEATABLE
@given(CELLS, TILE_PX)
def test_tiles_cover_every_cell_and_fade_where_they_overlap(cells, tile_px):
    spans = tiling.tile_spans(cells, tile_px)
    assert (spans[0].start, spans[0].blend, spans[-1].stop) == (0, 0, cells)
    for before, after in zip(spans, spans[1:], strict=False):
        assert after.stop - after.start == min(tile_px // 8, cells)
        assert after.start > before.start
        assert after.blend == before.stop - after.start >= tiling.OVERLAP // 2


@REPEATABLE
@given(st.integers(1, 14), CELLS, CELLS, TILE_PX, TILE_PX)
def test_plan_puts_every_cell_in_its_place(frames, rows, columns, tile_height, tile_width):
    plan = tiling.window_plan(frames, rows, columns, tile_px=(tile_height, tile_width))
    z = numbered(frames, rows, columns)
    assert torch.equal(tiling.run_plan(plan, z, lambda piece: piece.clone(), tiling.Direction(1, 1, 1, 1)), z)


def test_plan_in_pixels_both_ways():
    plan = tiling.window_plan(8, 11, 17, tile_px=(56, 64))
    z = numbered(8, 11, 17)
    pixels = tiling.run_plan(plan, z, enlarge, tiling.DECODE)
    assert pixels.shape == (1, 1, pixel_frames(8), 88, 136)
    assert torch.equal(pixels, enlarge(z))
    assert torch.equal(tiling.run_plan(plan, pixels, reduce, tiling.ENCODE), z)


@REPEATABLE
@given(st.integers(1, 14), CELLS, CELLS, TILE_PX, TILE_PX, st.floats(-100, 100))
def test_fading_weights_sum_to_one(frames, rows, columns, tile_height, tile_width, value):
    plan = tiling.window_plan(frames, rows, columns, tile_px=(tile_height, tile_width))
    field = torch.full((1, 1, frames, rows, columns), value, dtype=torch.float64)
    out = tiling.run_plan(plan, field, lambda piece: piece.clone(), tiling.Direction(1, 1, 1, 1))
    torch.testing.assert_close(out, field, rtol=0, atol=1e-6)


@REPEATABLE
@given(st.integers(1, 20), CELLS, TILE_PX)
def test_faded_cells_lie_between_their_pieces(frames, rows, tile_px):
    plan = tiling.window_plan(frames, rows, 1, tile_px=(tile_px, 8))
    piece_numbers = iter(range(10**6))

    def constant(piece: torch.Tensor) -> torch.Tensor:
        return torch.full_like(piece, 3.0 + next(piece_numbers) % 2)

    out = tiling.run_plan(plan, numbered(frames, rows, 1), constant, tiling.Direction(1, 1, 1, 1))
    assert out.min() >= 3.0 and out.max() <= 4.0


def test_released_window_counts():
    assert len(tiling.time_windows(31)) == 14
    assert len(tiling.time_windows(61)) == 29
    assert [(span.start, span.stop) for span in tiling.time_windows(6)] == [(0, 5), (2, 6)]


def test_last_tile_moves_or_is_added():
    width = tiling.tile_spans(1408 // 8, 488)  # released: 0, 456, 912 and 8 px lost
    assert [(8 * span.start, 8 * span.blend) for span in width] == [(0, 0), (456, 32), (920, 24)]
    added = tiling.tile_spans(1280 // 8, 336)  # released: 32 px lost
    assert [8 * span.start for span in added] == [0, 304, 608, 912, 944]


def test_progress_is_reported_and_can_cancel():
    plan = tiling.window_plan(9, 12, 6, tile_px=(56, 48))
    z, seen = numbered(9, 12, 6), []
    tiling.run_plan(plan, z, enlarge, tiling.DECODE, lambda done, total: seen.append((done, total)))
    assert seen == [(index + 1, plan.passes) for index in range(plan.passes)]
    assert plan.passes == 3 * 2

    class Cancelled(Exception):
        pass

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 2:
            raise Cancelled

    seen.clear()
    with pytest.raises(Cancelled):
        tiling.run_plan(plan, z, enlarge, tiling.DECODE, stop)
    assert len(seen) == 2


def test_impossible_tiles_and_foreign_plans_are_refused():
    with pytest.raises(ShapeError, match="multiple of 8"):
        tiling.tile_spans(40, 100)
    with pytest.raises(ShapeError, match="above 32"):
        tiling.tile_spans(40, 32)
    with pytest.raises(ShapeError, match="latent grid"):
        tiling.run_plan(tiling.single_plan(5, 4, 4), numbered(4, 4, 4), enlarge, tiling.DECODE)
