"""How a latent is decoded, and pixels are encoded, in bounded memory: plans as values that print themselves.

A plan is the first of a list of candidates, best first, that fits. Running out of memory all the same takes the next
one of the same list that is clearly smaller, so a plan and its rescue can never disagree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

from ..errors import BudgetError, KandinskyError, ShapeError
from ..shapes import VAE_SPATIAL, pixel_frames
from ..variants import VAESpec
from . import footprint
from .footprint import Cut, Network
from .tiling import OVERLAP, WINDOW, samples, tile_spans, time_windows

REFERENCE, STREAM, LATE_TILE, SINGLE_PASS = "reference", "stream", "late-tile", "single-pass"
MODES = (REFERENCE, STREAM, LATE_TILE, SINGLE_PASS)
AUTO = "auto"

CHUNKS = (4, 3, 2, 1)  # latent frames at once; more gains nothing and meets the limit of 2^31 elements
LATE_CHUNKS = (2, 1)
MOST_TILES = 32
MARGIN = 1.2  # of live bytes: workspaces of kernels and gaps between blocks; not yet measured on a device
RESERVE_BYTES = 2**29  # left to the driver and to others; a tenth where less is free
SMALLER = (
    0.85  # of the plan that ran out: the estimate was too low or others took memory, so a step must be felt
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """One way to decode one clip. `reference` follows the released windows, the others are causal chunks.

    `stream` and `late-tile` freeze GroupNorm's statistics from a few sampled windows; `single-pass` takes them from a
    running causal window; `late-tile` decodes the late levels tile by tile with hard cuts.
    """

    mode: str
    latent_thw: tuple[int, int, int]
    chunk: int = 2  # latent frames decoded at once (all modes but reference)
    tiles: tuple[int, int] = (1, 1)  # (rows, columns) of late tiles, or of the reference mode's tiles
    caches_on_host: bool = False  # convolution caches and features wait in main memory between chunks
    peak_bytes: int = 0  # estimated live bytes of activations and caches on the device, without weights
    work: float = 1.0  # estimated FLOPs over those of one pass without overlap
    itemsize: int = 2  # bytes per element that `peak_bytes` counts with

    def __str__(self) -> str:
        return _described(self, self.tiles)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodePlan:
    """One way to encode one clip: the first frame alone, then `chunk` latent frames (4 frames each) at once."""

    mode: str  # reference or stream
    latent_thw: tuple[int, int, int]
    chunk: int = 2
    caches_on_host: bool = False
    peak_bytes: int = 0
    work: float = 1.0
    itemsize: int = 2

    def __str__(self) -> str:
        return _described(self, (1, 1))


_Plan = TypeVar("_Plan", DecodePlan, EncodePlan)


def late_cuts(latent_cells: int, count: int) -> tuple[Cut, ...]:
    """Cut a side into `count` pieces as equal as the grid that late tiles start from allows, as `Region.cut` does."""
    cells = footprint.LATE_SPACE * latent_cells
    edges = [cells * index // count for index in range(count + 1)]
    return tuple(Cut(start, stop, cells) for start, stop in pairwise(edges))


def reference_tile_px(cells: int, count: int) -> int:
    """Return the side in pixels that the released models give a tile when they cut `cells` latent cells in `count`."""
    return VAE_SPATIAL * cells if count == 1 else VAE_SPATIAL * (-(-cells // count) + 2)


def needed_bytes(peak_bytes: int) -> int:
    """Return the free memory that makes room for so many live bytes."""
    wanted = MARGIN * peak_bytes
    return int(min(wanted + RESERVE_BYTES, wanted / 0.9))


def plan_decode(
    spec: VAESpec,
    latent_thw: tuple[int, int, int],
    *,
    free_bytes: int | None,
    itemsize: int,
    mode: str = AUTO,
    chunk: int | None = None,
    tiles: tuple[int, int] | None = None,
) -> DecodePlan:
    """Choose how to decode a latent of (frames, rows, columns) in `free_bytes`: free once the weights are loaded.

    None means no limit. `chunk` and `tiles` leave only the plans that have them. Raises `BudgetError` if none fits.
    """
    _check(latent_thw, mode, (AUTO, *MODES))
    plans = (
        plan
        for plan in decode_plans(spec, latent_thw, itemsize, mode, tiles)
        if chunk in (None, plan.chunk) and tiles in (None, plan.tiles)
    )
    asked = "".join(
        f", {name} {value}" for name, value in (("chunk", chunk), ("tiles", tiles)) if value is not None
    )
    return _first_that_fits(plans, free_bytes, f"Decoding {_size(spec, latent_thw)} (mode {mode}{asked})")


def plan_encode(
    spec: VAESpec,
    latent_thw: tuple[int, int, int],
    *,
    free_bytes: int | None,
    itemsize: int,
    mode: str = AUTO,
) -> EncodePlan:
    """Choose how to encode pixels to a latent of (frames, rows, columns) in `free_bytes`; None means no limit.

    Raises `BudgetError` if nothing fits.
    """
    _check(latent_thw, mode, (AUTO, REFERENCE, STREAM))
    plans = encode_plans(spec, latent_thw, itemsize, mode)
    return _first_that_fits(plans, free_bytes, f"Encoding {_size(spec, latent_thw)} (mode {mode})")


def smaller(plan: DecodePlan, spec: VAESpec) -> DecodePlan | None:
    """Return the plan to go on with after `plan` ran out of memory, or None after the least.

    Smaller chunks and late tiles leave the picture as it is. The released windows have only tiles whose borders show:
    they go on as chunks too.
    """
    modes = (SINGLE_PASS, LATE_TILE) if plan.mode == SINGLE_PASS else (AUTO,)
    others = (other for mode in modes for other in decode_plans(spec, plan.latent_thw, plan.itemsize, mode))
    below = (
        other
        for other in others
        if other.peak_bytes <= SMALLER * plan.peak_bytes
        and other.mode != REFERENCE
        and not (plan.mode == LATE_TILE != other.mode)  # tiles that are done cannot become whole frames
    )
    return next(below, None)


def decode_plans(
    spec: VAESpec,
    latent_thw: tuple[int, int, int],
    itemsize: int,
    mode: str = AUTO,
    tiles: tuple[int, int] | None = None,
) -> Iterator[DecodePlan]:
    """List the plans of a mode, best first; `auto` has those whose picture does not depend on memory.

    Of the late tiles only those that are worth it, or those asked for.
    """
    if spec.kind == "flux":
        yield from _picture(spec, latent_thw, itemsize)
        return
    if mode == REFERENCE:
        yield from _windows(spec, latent_thw, itemsize)
    if mode == AUTO and latent_thw[0] <= WINDOW:
        yield from _whole(spec, latent_thw, itemsize)
    if mode in (AUTO, STREAM):
        yield from _chunks(spec, latent_thw, itemsize, STREAM, on_host=False)
    if mode in (AUTO, LATE_TILE):
        yield from _late_tiles(spec, latent_thw, itemsize, tiles)
    if mode == STREAM:
        yield from _chunks(spec, latent_thw, itemsize, STREAM, on_host=True)
    if mode == SINGLE_PASS:
        for on_host in (False, True):
            yield from _chunks(spec, latent_thw, itemsize, SINGLE_PASS, on_host=on_host)


def _picture(spec: VAESpec, latent_thw: tuple[int, int, int], itemsize: int) -> Iterator[DecodePlan]:
    """List the image autoencoder's only way: one pass."""
    _, rows, columns = latent_thw
    network = footprint.decoder_network(spec)
    if network.indexable(1, 1, Cut.whole(rows), Cut.whole(columns)):
        yield DecodePlan(
            mode=REFERENCE, latent_thw=latent_thw, chunk=1, itemsize=itemsize,
            peak_bytes=footprint.module_bytes(spec, network, itemsize, 1, rows, columns),
        )  # fmt: skip


def _whole(spec: VAESpec, latent_thw: tuple[int, int, int], itemsize: int) -> Iterator[DecodePlan]:
    """List one pass over everything, if kernels can index it."""
    latents, rows, columns = latent_thw
    network = footprint.decoder_network(spec)
    if network.indexable(latents, latents, Cut.whole(rows), Cut.whole(columns)):
        yield DecodePlan(
            mode=REFERENCE, latent_thw=latent_thw, chunk=latents, itemsize=itemsize,
            peak_bytes=footprint.chunk_bytes(spec, network, itemsize, latents, latent_thw, on_host=False),
        )  # fmt: skip


def _windows(spec: VAESpec, latent_thw: tuple[int, int, int], itemsize: int) -> Iterator[DecodePlan]:
    """List the released windows with more and more of the released tiles; grids without smaller tiles are left out."""
    latents, *sides = latent_thw
    network = footprint.decoder_network(spec)
    windows = [span.stop - span.start for span in time_windows(latents)]
    once = sum(_ideal(network, (window, *sides)) for window in windows) / _ideal(network, latent_thw)
    grids = []
    for tiles in _tile_grids(*sides):
        tile_px = [reference_tile_px(cells, count) for cells, count in zip(sides, tiles, strict=True)]
        if all(
            count == 1 or OVERLAP * VAE_SPATIAL < px < VAE_SPATIAL * cells
            for cells, count, px in zip(sides, tiles, tile_px, strict=True)
        ):
            rows, columns = (tile_spans(cells, px) for cells, px in zip(sides, tile_px, strict=True))
            area = rows[0].stop * columns[0].stop
            grids.append((len(rows) * len(columns) * area, area, tiles, (rows[0].stop, columns[0].stop)))
    least = math.prod(sides) + 1
    for computed, area, tiles, tile in sorted(grids):
        if area < least and network.indexable(max(windows), max(windows), *map(Cut.whole, tile)):
            least = area
            peak = footprint.chunk_bytes(spec, network, itemsize, max(windows), (max(windows), *tile), on_host=False)
            # A window's pixels are put together from its tiles, which are kept for their neighbours to fade into.
            pixels = 0 if tiles == (1, 1) else 2 * footprint.pixels(max(windows), *sides)
            yield DecodePlan(
                mode=REFERENCE, latent_thw=latent_thw, chunk=max(windows), tiles=tiles, itemsize=itemsize,
                peak_bytes=peak + itemsize * pixels, work=once * computed / math.prod(sides),
            )  # fmt: skip


def _chunks(
    spec: VAESpec, latent_thw: tuple[int, int, int], itemsize: int, mode: str, *, on_host: bool
) -> Iterator[DecodePlan]:
    """List causal chunks of whole frames, largest first."""
    latents, rows, columns = latent_thw
    network = footprint.decoder_network(spec)
    for chunk in _possible(CHUNKS, latents):
        if network.indexable(chunk, latents, Cut.whole(rows), Cut.whole(columns)):
            yield DecodePlan(
                mode=mode, latent_thw=latent_thw, chunk=chunk, caches_on_host=on_host, itemsize=itemsize,
                peak_bytes=footprint.chunk_bytes(spec, network, itemsize, chunk, latent_thw, on_host=on_host),
                work=_with_statistics(network, latent_thw) if mode == STREAM and chunk < latents else 1.0,
            )  # fmt: skip


def _late_tiles(
    spec: VAESpec, latent_thw: tuple[int, int, int], itemsize: int, tiles: tuple[int, int] | None
) -> Iterator[DecodePlan]:
    """List late tiles by their work, first with everything on the device, then with the past in main memory."""
    latents, rows, columns = latent_thw
    early, late = footprint.decoder_parts(spec)
    grids = _late_grids(spec, latent_thw, tiles)
    sampling = _with_statistics(footprint.decoder_network(spec), latent_thw)
    for on_host in (False, True):
        for work, grid, tile in grids:
            for chunk in _possible(LATE_CHUNKS, latents):
                if early.indexable(chunk, latents, Cut.whole(rows), Cut.whole(columns)) and late.indexable(
                    chunk, latents, *tile
                ):
                    yield DecodePlan(
                        mode=LATE_TILE, latent_thw=latent_thw, chunk=chunk, tiles=grid, caches_on_host=on_host,
                        peak_bytes=footprint.late_bytes(spec, itemsize, chunk, latent_thw, tile, on_host=on_host),
                        work=work * sampling, itemsize=itemsize,
                    )  # fmt: skip


@lru_cache(64)
def _late_grids(
    spec: VAESpec, latent_thw: tuple[int, int, int], only: tuple[int, int] | None
) -> tuple[tuple[float, tuple[int, int], tuple[Cut, Cut]], ...]:
    """List (work, grid, largest tile), least work first; grids whose tiles are not smaller for it are left out."""
    latents, *sides = latent_thw
    grids = []
    for grid in [only] if only else _tile_grids(*(footprint.LATE_SPACE * side for side in sides)):
        cuts = [late_cuts(side, count) for side, count in zip(sides, grid, strict=True)]
        computed = math.prod(sum(map(_pixels, side)) for side in cuts)
        tile = (max(cuts[0], key=_pixels), max(cuts[1], key=_pixels))
        grids.append((computed, math.prod(map(_pixels, tile)), grid, cuts, tile))
    early, late = footprint.decoder_parts(spec)
    early_macs = _ideal(early, latent_thw)
    kept, least = [], math.prod(sides) * VAE_SPATIAL**2
    for _, area, grid, cuts, tile in sorted(grids, key=lambda entry: entry[:3]):
        if area < least:
            least = area
            macs = early_macs + late.macs(latents, *cuts)
            kept.append((macs / _ideal(footprint.decoder_network(spec), latent_thw), grid, tile))
    return tuple(sorted(kept, key=lambda entry: entry[0]))


def _pixels(cut: Cut) -> int:
    """Length in pixels of what a late tile computes in the end; the context it needs there is 8 px."""
    return cut.length(VAE_SPATIAL, VAE_SPATIAL)


def encode_plans(
    spec: VAESpec, latent_thw: tuple[int, int, int], itemsize: int, mode: str
) -> Iterator[EncodePlan]:
    """List the ways to encode, best first."""
    latents, rows, columns = latent_thw
    network = footprint.encoder_network(spec)
    frame = Cut.whole(rows), Cut.whole(columns)
    if spec.kind == "flux" or mode == REFERENCE:
        windows = [span.stop - span.start for span in time_windows(latents)]
        if network.indexable(max(windows), max(windows), *frame):
            yield EncodePlan(
                mode=REFERENCE, latent_thw=latent_thw, chunk=max(windows), itemsize=itemsize,
                peak_bytes=footprint.module_bytes(spec, network, itemsize, max(windows), rows, columns),
                work=sum(network.macs(window, *([cut] for cut in frame)) for window in windows)
                / _ideal(network, latent_thw),
            )  # fmt: skip
        return
    for on_host in (False, True):
        for chunk in _possible((WINDOW, *CHUNKS) if latents <= WINDOW else CHUNKS, latents):
            if network.indexable(chunk, latents, *frame):
                yield EncodePlan(
                    mode=STREAM, latent_thw=latent_thw, chunk=chunk, caches_on_host=on_host, itemsize=itemsize,
                    peak_bytes=footprint.chunk_bytes(spec, network, itemsize, chunk, latent_thw, on_host=on_host),
                    work=_with_statistics(network, latent_thw) if chunk < latents else 1.0,
                )  # fmt: skip


def _ideal(network: Network, latent_thw: tuple[int, int, int]) -> int:
    """Multiply-adds of one pass without overlap."""
    latents, rows, columns = latent_thw
    return network.macs(latents, [Cut.whole(rows)], [Cut.whole(columns)])


def _with_statistics(network: Network, latent_thw: tuple[int, int, int]) -> float:
    """Work with that of sampling the statistics, over the work without."""
    latents, *sides = latent_thw
    run = sum(_ideal(network, (sample.latents, *sides)) for sample in samples(latents))
    return 1 + run / _ideal(network, latent_thw)


def _possible(chunks: Iterable[int], latents: int) -> list[int]:
    """Chunks that a clip can have: none longer than the clip."""
    return sorted({min(chunk, latents) for chunk in chunks}, reverse=True)


def _tile_grids(rows: int, columns: int) -> list[tuple[int, int]]:
    """All (rows, columns) of up to `MOST_TILES` pieces with at least one cell each."""
    return [
        (down, across)
        for down in range(1, min(MOST_TILES, rows) + 1)
        for across in range(1, min(MOST_TILES // down, columns) + 1)
    ]


def _first_that_fits(plans: Iterable[_Plan], free_bytes: int | None, what: str) -> _Plan:
    best: _Plan | None = None
    least: _Plan | None = None
    for plan in plans:
        if free_bytes is None or needed_bytes(plan.peak_bytes) <= free_bytes:
            return plan
        best = best or plan
        least = plan if least is None or plan.peak_bytes < least.peak_bytes else least
    if best is None or least is None:
        raise BudgetError(
            f"{what} is not possible: leave chunk and tiles open, take another mode or a smaller size."
        )
    raise BudgetError(
        f"{what} takes {_gib(needed_bytes(best.peak_bytes))} of free memory, or "
        f"{_gib(needed_bytes(least.peak_bytes))} with the least plan ({least}); {_gib(free_bytes)} is free. "
        "Free memory, take a smaller size, or run it on the processor."
    )


def _check(latent_thw: tuple[int, int, int], mode: str, modes: tuple[str, ...]) -> None:
    if mode not in modes:
        raise KandinskyError(f"Mode {mode!r} is unknown. Possible: {', '.join(modes)}.")
    if len(latent_thw) != 3 or min(latent_thw) < 1:
        raise ShapeError(f"A latent grid is (frames, rows, columns), at least 1 each; got {latent_thw}.")


def _size(spec: VAESpec, latent_thw: tuple[int, int, int]) -> str:
    frames, rows, columns = latent_thw
    picture = f"{VAE_SPATIAL * columns} x {VAE_SPATIAL * rows} px"
    return picture if spec.kind == "flux" else f"{pixel_frames(frames)} frames of {picture}"


def _described(plan: DecodePlan | EncodePlan, tiles: tuple[int, int]) -> str:
    rows, columns = tiles
    if plan.mode == REFERENCE:
        chunk = (
            "one pass"
            if plan.chunk == plan.latent_thw[0]
            else f"windows of {pixel_frames(plan.chunk)} frames"
        )
    else:
        chunk = f"{plan.chunk} latent frame{'s' * (plan.chunk > 1)} at a time"
    parts = [f"{plan.mode}: {chunk}"]
    if tiles != (1, 1):
        parts.append(f"{rows} x {columns} tiles")
    if plan.caches_on_host:
        parts.append("caches in main memory")
    parts += [f"peak {_gib(plan.peak_bytes)}", f"work x {plan.work:.2f}"]
    return ", ".join(parts)


def _gib(count_bytes: int) -> str:
    return f"{count_bytes / 2**30:.2f} GiB"
