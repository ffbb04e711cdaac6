"""Bytes and arithmetic of the autoencoders, counted from the list of their convolutions.

What a convolution keeps alive is written down once; the most that any of them needs is the peak. A grid is told by how
many frames and rows (columns) it has per latent frame and latent row: 1, 1 is the latent grid, 4, 8 the pixel grid.
Counts are elements unless the name says otherwise. `first`: of a clip's first chunk, whose first latent is one frame;
no later chunk is smaller.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from ..variants import VAESpec
from .blocks import PIXEL_CHANNELS

MAX_ELEMENTS = 2**31  # kernels that index with 32 bits fail silently above
HALO = (
    6  # cells a late tile reads beyond its own on the grid it starts from: the reach of the late convolutions
)
CONTEXT = 2  # frames a causal convolution of 3 taps sees before the first it writes
# (time, space) of the levels; both halves step in space first, so they meet on different grids in between
DECODER_GRIDS = ((1, 1), (1, 2), (2, 4), (4, 8))
ENCODER_GRIDS = ((4, 8), (4, 4), (2, 2), (1, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One convolution over 3 x 3 x 3 cells, with the norm before it if there is one."""

    grid: tuple[int, int]  # (time, space) it reads
    grid_out: tuple[int, int]
    channels_in: int
    channels_out: int
    skipped: int = 0  # channels of a residual block's input, which its second convolution adds
    shortcut: bool = False  # through a 1 x 1 x 1 convolution
    late: bool = False  # belongs to the decoder's late tiles

    @property
    def enlarges(self) -> bool:
        """Whether it is an upsampler: every cell is repeated, and a kernel of 2 taps meets each pair of copies."""
        return self.grid_out[1] > self.grid[1]

    @property
    def carried(self) -> int:
        """Frames of its input it keeps for the next chunk: copies are not kept, a stride of 2 skips one."""
        return CONTEXT if self.grid[0] == self.grid_out[0] else CONTEXT - 1

    def macs(self, latents: int, rows: float, columns: float) -> int:
        """Multiply-adds for a clip of so many latent frames, rows and columns."""
        taps = (2 if self.grid_out[0] > self.grid[0] else 3) * (4 if self.enlarges else 9)
        weights = (self.channels_in * taps + self.shortcut * self.skipped) * self.channels_out
        return weights * _cells(self.grid_out, latents, rows, columns, first=True)

    def largest(self, latents: int, rows: float, columns: float, *, first: bool) -> int:
        """Elements of the larger of the buffer it reads and what it writes."""
        return max(
            self._padded(latents, rows, columns, first=first),
            self.channels_out * _cells(self.grid_out, latents, rows, columns, first=first),
        )

    def alive(self, latents: int, rows: float, columns: float, *, first: bool) -> int:
        """Elements alive while it takes some latent frames: what came in, the buffer it reads, what goes out.

        An upsampler makes one of its 4 (8) phases after the other: a shifted copy of its input, and the phase.
        """
        came = _cells(self.grid, latents, rows, columns, first=first)
        gone = _cells(self.grid_out, latents, rows, columns, first=first)
        padded = self._padded(latents, rows, columns, first=first)
        phase = padded + self.channels_out * came if self.enlarges else 0
        return (self.channels_in + self.skipped) * came + padded + self.channels_out * gone + phase

    def cache(self, rows: float, columns: float) -> int:
        """Elements kept from chunk to chunk."""
        return self.channels_in * self.carried * int(self.grid[1] * rows) * int(self.grid[1] * columns)

    def _padded(self, latents: int, rows: float, columns: float, *, first: bool) -> int:
        time, space = self.grid
        frames = _frames(time, latents, first=first)
        # A lone first frame is convolved in 2-D; every other chunk has the frames before it in front.
        before = 0 if first and frames == 1 else self.carried
        return self.channels_in * (frames + before) * int(space * rows + 2) * int(space * columns + 2)


def _frames(time: int, latents: int, *, first: bool) -> int:
    return time * (latents - 1) + 1 if first else time * latents


def _cells(grid: tuple[int, int], latents: int, rows: float, columns: float, *, first: bool) -> int:
    time, space = grid
    return _frames(time, latents, first=first) * int(space * rows) * int(space * columns)


@cache
def decoder_steps(spec: VAESpec) -> tuple[Step, ...]:
    """List the decoder's convolutions in the order they run."""
    widths = spec.block_out_channels[::-1]
    grids = _grids(spec, DECODER_GRIDS)
    steps = [
        Step(grid=grids[0], grid_out=grids[0], channels_in=spec.latent_channels, channels_out=widths[0]),
        *_residuals(grids[0], (widths[0],) * 3),
    ]
    for level, (grid, width) in enumerate(zip(grids, widths, strict=True)):
        before = widths[max(level - 1, 0)]
        steps += _residuals(grid, (before, *(width,) * (spec.layers_per_block + 1)), late=level > 1)
        if level < len(widths) - 1:
            steps.append(
                Step(
                    grid=grid,
                    grid_out=grids[level + 1],
                    channels_in=width,
                    channels_out=width,
                    late=level > 0,
                )
            )
    last = grids[-1]
    steps.append(
        Step(grid=last, grid_out=last, channels_in=widths[-1], channels_out=PIXEL_CHANNELS, late=True)
    )
    return tuple(steps)


@cache
def encoder_steps(spec: VAESpec) -> tuple[Step, ...]:
    """List the encoder's convolutions in the order they run."""
    widths = spec.block_out_channels
    grids = _grids(spec, ENCODER_GRIDS)
    steps = [Step(grid=grids[0], grid_out=grids[0], channels_in=PIXEL_CHANNELS, channels_out=widths[0])]
    for level, (grid, width) in enumerate(zip(grids, widths, strict=True)):
        before = widths[max(level - 1, 0)]
        steps += _residuals(grid, (before, *(width,) * spec.layers_per_block))
        if level < len(widths) - 1:
            steps.append(Step(grid=grid, grid_out=grids[level + 1], channels_in=width, channels_out=width))
    last = grids[-1]
    steps += _residuals(last, (widths[-1],) * 3)
    steps.append(
        Step(grid=last, grid_out=last, channels_in=widths[-1], channels_out=2 * spec.latent_channels)
    )
    return tuple(steps)


def _grids(spec: VAESpec, video: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    return video if spec.kind == "hunyuan" else tuple((1, space) for _, space in video)


def _residuals(grid: tuple[int, int], widths: Iterable[int], *, late: bool = False) -> Iterator[Step]:
    for before, after in pairwise(widths):
        made = {"grid": grid, "grid_out": grid, "channels_out": after, "late": late}
        yield Step(channels_in=before, **made)
        yield Step(channels_in=after, skipped=before, shortcut=before != after, **made)


def weight_bytes(spec: VAESpec, itemsize: int, *, encoder: bool = True, decoder: bool = True) -> int:
    """Return the bytes of the parameters of both halves, or of one."""
    count = 0
    if encoder:
        count += _weights(spec, encoder_steps(spec)) + _quant(spec, 2 * spec.latent_channels)
    if decoder:
        count += _weights(spec, decoder_steps(spec)) + _quant(spec, spec.latent_channels)
    return count * itemsize


def _weights(spec: VAESpec, steps: tuple[Step, ...]) -> int:
    taps = 27 if spec.kind == "hunyuan" else 9
    count = 0
    for index, step in enumerate(steps):
        count += (step.channels_in * taps + 1) * step.channels_out
        if step.grid == step.grid_out and index:
            count += 2 * step.channels_in  # its norm
        if step.shortcut:
            count += (step.skipped + 1) * step.channels_out
    width = spec.block_out_channels[-1]
    return count + 4 * (width + 1) * width + 2 * width  # attention: four projections and a norm


def _quant(spec: VAESpec, channels: int) -> int:
    return (channels + 1) * channels if spec.kind == "hunyuan" else 0


def macs(steps: Iterable[Step], latents: int, rows: float, columns: float) -> int:
    """Return the multiply-adds of the convolutions for a clip of so many latent frames, rows and columns."""
    return sum(step.macs(latents, rows, columns) for step in steps)


def indexable(steps: Iterable[Step], chunk: int, latents: int, rows: float, columns: float) -> bool:
    """Say whether 32 bits index every tensor when `chunk` of a clip's latent frames are taken at once."""
    first = chunk >= latents
    return all(step.largest(chunk, rows, columns, first=first) < MAX_ELEMENTS for step in steps)


def pass_bytes(steps: Iterable[Step], itemsize: int, latents: int, rows: int, columns: int) -> int:
    """Return the peak of one pass over a clip, or over a window of one."""
    return itemsize * max(step.alive(latents, rows, columns, first=True) for step in steps)


def chunk_bytes(
    spec: VAESpec, steps: Sequence[Step], itemsize: int, chunk: int, latent_thw: tuple[int, int, int],
    *, on_host: bool,
) -> int:  # fmt: skip
    """Return the peak of causal chunks of whole frames; `on_host` leaves only the running layer's past there."""
    latents, rows, columns = latent_thw
    pasts = [step.cache(rows, columns) for step in steps]
    pasts.append(
        2 * spec.block_out_channels[-1] * latents * rows * columns
    )  # keys and values of the whole clip
    kept = max(pasts) if on_host else sum(pasts)
    return itemsize * (_busiest(steps, chunk, latents, rows, columns) + kept)


def late_bytes(
    spec: VAESpec, itemsize: int, chunk: int, latent_thw: tuple[int, int, int], tile: tuple[float, float],
    *, on_host: bool,
) -> int:  # fmt: skip
    """Return the peak of late tiles of (rows, columns) latent cells, the context around them included."""
    latents, rows, columns = latent_thw
    early, late = split_steps(spec)
    features = (
        0 if on_host else late[0].channels_in * _cells(late[0].grid, latents, rows, columns, first=True)
    )
    early_bytes = chunk_bytes(spec, early, itemsize, chunk, latent_thw, on_host=on_host)
    pasts = [step.cache(*tile) for step in late]
    kept = max(pasts) if on_host else sum(pasts)
    return itemsize * features + max(early_bytes, itemsize * (_busiest(late, chunk, latents, *tile) + kept))


def split_steps(spec: VAESpec) -> tuple[list[Step], list[Step]]:
    """Return the decoder's steps on whole frames, and those that late tiles take."""
    steps = decoder_steps(spec)
    return [step for step in steps if not step.late], [step for step in steps if step.late]


def _busiest(steps: Iterable[Step], chunk: int, latents: int, rows: float, columns: float) -> int:
    first = chunk >= latents
    return max(step.alive(chunk, rows, columns, first=first) for step in steps)
