"""Plans for encoding and decoding in pieces, as integers, and the one loop that runs them.

A plan counts latent cells; the loop turns them into frames and pixels. Released arithmetic: windows of 17 frames
every 8, tiles overlapping by 32 px, linear cross-fades; here no frame, row or column is lost at the end of an axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import ShapeError
from ..shapes import VAE_SPATIAL, VAE_TEMPORAL, latent_frames

OnTile = Callable[[int, int], None]  # (passes done, passes in all); may raise to cancel

WINDOW = latent_frames(17)  # latent frames per window
WINDOW_STRIDE = 2  # latent frames between windows: 8 frames
OVERLAP = 4  # latent rows or columns two tiles share: 32 px
SAMPLED = 3  # latent frames of a window that is run for statistics
SAMPLED_OF = 15  # latent frames a window stands for in a long clip


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of one axis, in latent cells `start...stop`.

    Its first `lead` cells are context that is computed and dropped, the next `blend` fade in from the previous piece.
    """

    start: int
    stop: int
    lead: int = 0
    blend: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """How a clip is cut: every window of time is assembled from every tile of rows and columns."""

    time: tuple[Span, ...]
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]

    @property
    def passes(self) -> int:
        """Number of times the network runs."""
        return len(self.time) * len(self.rows) * len(self.columns)

    @property
    def latent_thw(self) -> tuple[int, int, int]:
        """(frames, rows, columns) of the latent grid the plan covers."""
        return self.time[-1].stop, self.rows[-1].stop, self.columns[-1].stop


def single_plan(frames: int, rows: int, columns: int) -> Plan:
    """Take the whole latent grid in one pass: the quality reference, and the memory peak."""
    return Plan((Span(0, frames),), (Span(0, rows),), (Span(0, columns),))


def window_plan(frames: int, rows: int, columns: int, *, tile_px: tuple[int, int] | None = None) -> Plan:
    """Cut a latent grid into the released windows of time and, given (height, width), tiles of `tile_px`."""
    height, width = tile_px or (rows * VAE_SPATIAL, columns * VAE_SPATIAL)
    return Plan(time_windows(frames), tile_spans(rows, height), tile_spans(columns, width))


def reference_plan(frames: int, rows: int, columns: int) -> Plan:
    """Follow the released models: one pass up to 17 frames, windows of 17 frames every 8 beyond, whole frames."""
    return window_plan(frames, rows, columns)


def time_windows(frames: int) -> tuple[Span, ...]:
    """Cut `frames` latent frames into windows of 5 every 2; a later window starts a clip anew and drops that frame."""
    if frames <= WINDOW:
        return (Span(0, frames),)
    return tuple(
        Span(start, min(start + WINDOW, frames), *((1, WINDOW_STRIDE) if start else (0, 0)))
        for start in range(0, frames - WINDOW + WINDOW_STRIDE, WINDOW_STRIDE)
    )


@dataclass(frozen=True, slots=True)
class Sample:
    """Latent frames that are run for their statistics: a window, or beforehand a first look at it."""

    window: int
    frames: slice
    is_look: bool

    @property
    def latents(self) -> int:
        """Return how many latent frames it has."""
        return self.frames.stop - self.frames.start


def sample_windows(latents: int) -> tuple[slice, ...]:
    """Choose the windows: all of a clip up to 9 latent frames in parts of up to 3, of a longer one three or more.

    They lie evenly from the first latent frame to the last, one for every 15 in a long clip, and do not overlap.
    """
    if latents <= 3 * SAMPLED:
        count = math.ceil(latents / SAMPLED)
        edges = [index * latents // count for index in range(count + 1)]
        return tuple(slice(start, stop) for start, stop in pairwise(edges))
    gaps = max(3, math.ceil(latents / SAMPLED_OF)) - 1
    starts = [index * (latents - SAMPLED) // gaps for index in range(gaps + 1)]
    return tuple(slice(start, start + SAMPLED) for start in starts)


def samples(latents: int) -> tuple[Sample, ...]:
    """List what is run for the statistics of a clip: the first latent frame of every window, then the windows."""
    windows = list(enumerate(sample_windows(latents)))
    return tuple(
        Sample(index, slice(window.start, window.start + 1 if is_look else window.stop), is_look)
        for is_look in (True, False)
        for index, window in windows
    )


def sampled_latents(latents: int) -> int:
    """Return how many latent frames sampling runs."""
    return sum(sample.latents for sample in samples(latents))


def tile_spans(cells: int, tile_px: int) -> tuple[Span, ...]:
    """Cut one side of `cells` latent cells into tiles of `tile_px` that overlap by 32 px.

    Where the released grid stops short of the edge, its last tile moves to the edge if it keeps half its overlap,
    and one more tile is set at the edge if not.
    """
    tile = min(tile_px // VAE_SPATIAL, cells)
    if tile_px % VAE_SPATIAL or (tile < cells and tile <= OVERLAP):
        raise ShapeError(
            f"A tile side of {tile_px} px is not possible: use a multiple of {VAE_SPATIAL} px "
            f"above {OVERLAP * VAE_SPATIAL}."
        )
    starts = list(range(0, cells - tile + 1, tile - OVERLAP)) if tile < cells else [0]
    missing = cells - tile - starts[-1]
    if 0 < missing <= OVERLAP // 2 and len(starts) > 1:
        starts[-1] += missing
    elif missing:
        starts.append(cells - tile)
    return (
        Span(0, tile),
        *(Span(start, start + tile, 0, before + tile - start) for before, start in pairwise(starts)),
    )


def released_tile_px(height_px: int, width_px: int, free_bytes: int) -> tuple[int, int]:
    """Choose the (height, width) of a tile from free memory as the released models do; the frame itself if it fits.

    For the memory planner, whose reference mode decodes with `window_plan(..., tile_px=...)` of it.
    """
    area_limit = free_bytes / (256 * 17 * VAE_SPATIAL)
    values = 256 * 17 * (height_px + 32) * (width_px + 32)  # elements of the largest padded activation
    if height_px * width_px < area_limit and values < 2**31:
        return height_px, width_px
    tiles = max(math.ceil(height_px * width_px / area_limit), math.ceil(values / 2**31))
    aspect = max(height_px, width_px) / min(height_px, width_px)
    short, long = math.ceil(math.sqrt(tiles / aspect)), math.ceil(math.sqrt(tiles * aspect))
    counts = (long, short) if height_px > width_px else (short, long)
    height, width = (
        side if count == 1 else math.ceil(side / count / VAE_SPATIAL) * VAE_SPATIAL + 16
        for side, count in zip((height_px, width_px), counts, strict=True)
    )
    return height, width


@dataclass(frozen=True, slots=True)
class Direction:
    """How many frames (after the first) and pixels one latent cell is on the way in and on the way out."""

    time_in: int
    space_in: int
    time_out: int
    space_out: int


ENCODE = Direction(VAE_TEMPORAL, VAE_SPATIAL, 1, 1)
DECODE = Direction(1, 1, VAE_TEMPORAL, VAE_SPATIAL)


def run_plan(
    plan: Plan,
    x_BCTHW: Tensor,
    once: Callable[[Tensor], Tensor],
    way: Direction,
    on_tile: OnTile | None = None,
) -> Tensor:
    """Run `once` on every piece of `x_BCTHW` and join the pieces; calls `on_tile` after each pass."""
    frames, rows, columns = plan.latent_thw
    wanted = (first_frame(frames, way.time_in), rows * way.space_in, columns * way.space_in)
    if tuple(x_BCTHW.shape[2:]) != wanted:
        raise ShapeError(
            f"The plan covers {wanted} frames, rows and columns, the tensor has {tuple(x_BCTHW.shape[2:])}. "
            "Make the plan from the tensor's latent grid."
        )
    done = 0

    def counted(piece: Tensor) -> Tensor:
        nonlocal done
        out = once(piece)
        done += 1
        if on_tile is not None:
            on_tile(done, plan.passes)
        return out

    clip = x_BCTHW.new_empty(0)  # made when the first piece shows its channels
    for window in plan.time:
        start, stop = window.start * way.time_in, first_frame(window.stop, way.time_in)
        piece = assemble(plan, x_BCTHW[:, :, start:stop], counted, way)
        if len(plan.time) == 1:
            return piece
        if not clip.numel():
            clip = piece.new_empty(*piece.shape[:2], first_frame(frames, way.time_out), *piece.shape[3:])
        piece = piece[:, :, first_frame(window.lead, way.time_out) :]
        begin = first_frame(window.start + window.lead, way.time_out)
        blend = window.blend * way.time_out
        fade(clip[:, :, : begin + blend], piece, blend, dim=2)
        clip[:, :, begin : begin + piece.shape[2]] = piece
    return clip


def assemble(plan: Plan, x_BCTHW: Tensor, once: Callable[[Tensor], Tensor], way: Direction) -> Tensor:
    """Run one window tile by tile; each tile fades with the finished tile above it, then with the one to its left."""
    _, rows, columns = plan.latent_thw
    frame = x_BCTHW.new_empty(0)  # made when the first tile shows its channels
    above: dict[Span, Tensor] = {}
    for row in plan.rows:
        left: Tensor | None = None
        for column in plan.columns:
            y, x = (slice(span.start * way.space_in, span.stop * way.space_in) for span in (row, column))
            tile = once(x_BCTHW[..., y, x])
            if len(plan.rows) == len(plan.columns) == 1:
                return tile
            if not frame.numel():
                frame = tile.new_empty(*tile.shape[:3], rows * way.space_out, columns * way.space_out)
            if column in above:
                fade(above[column], tile, row.blend * way.space_out, dim=-2)
            if left is not None:
                fade(left, tile, column.blend * way.space_out, dim=-1)
            y, x = (slice(span.start * way.space_out, span.stop * way.space_out) for span in (row, column))
            frame[..., y, x] = tile
            above[column] = left = tile
    return frame


def fade(before: Tensor, after: Tensor, extent: int, dim: int) -> None:
    """Fade the last `extent` cells of `before` into the first of `after`, in place; its very first stays `before`."""
    if extent:
        head = after.narrow(dim, 0, extent)
        tail = before.narrow(dim, before.shape[dim] - extent, extent)
        shape = [1] * after.ndim
        shape[dim] = extent
        weight = (torch.arange(extent, device=after.device) / extent).to(after.dtype).view(shape)
        head.copy_(torch.lerp(tail, head, weight))


def first_frame(cell: int, step: int) -> int:
    """Index of the first frame of latent frame `cell`: the first cell is one frame, the others `step`."""
    return step * (cell - 1) + 1 if cell else 0
