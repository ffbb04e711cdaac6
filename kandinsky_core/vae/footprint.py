"""Bytes and arithmetic of the autoencoders, counted from the list of their convolutions.

What a convolution keeps alive is written down once; the most that any of them needs is the peak. A grid is told by how
many frames and rows (columns) it has per latent frame and latent row: 1, 1 is the latent grid, 4, 8 the pixel grid.
Counts are elements unless the name says otherwise. `first`: of a clip's first chunk, whose first latent is one frame;
no later chunk is smaller.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

from ..variants import VAESpec
from .blocks import PIXEL_CHANNELS

MAX_ELEMENTS = 2**31  # kernels that index with 32 bits fail silently above
CONTEXT = 2  # frames a causal convolution of 3 taps sees before the first it writes
REACH = 1  # cells it sees to each side
LATE_SPACE = 2  # late tiles start from the grid with 2 rows per latent row
# (time, space) of the levels; both halves step in space first, so they meet on different grids in between
DECODER_GRIDS = ((1, 1), (1, 2), (2, 4), (4, 8))
ENCODER_GRIDS = ((4, 8), (4, 4), (2, 2), (1, 1))


@dataclass(frozen=True, slots=True)
class Cut:
    """Part of one side of a frame: `start...stop` of `cells`, counted on the grid late tiles start from."""

    start: int
    stop: int
    cells: int

    @classmethod
    def whole(cls, latent_cells: int) -> Cut:
        """Take the whole side."""
        return cls(0, LATE_SPACE * latent_cells, LATE_SPACE * latent_cells)

    def length(self, space: int, halo: int) -> int:
        """Count its cells on a grid, with as much of `halo` to each side as the frame has."""
        start, stop, cells = (edge * space // LATE_SPACE for edge in (self.start, self.stop, self.cells))
        return min(stop + halo, cells) - max(start - halo, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One convolution over 3 x 3 x 3 cells, with the norm before it if there is one.

    Sizes `height` and `width` are those of its input, in cells.
    """

    grid: tuple[int, int]  # (time, space) it reads
    grid_out: tuple[int, int]
    channels_in: int
    channels_out: int
    skipped: int = 0  # channels of a residual block's input, which its second convolution adds
    shortcut: bool = False  # through a 1 x 1 x 1 convolution
    halo: int = 0  # cells around a late tile that it and all later steps need

    @property
    def enlarges(self) -> bool:
        """Whether it is an upsampler: every cell is repeated, and a kernel of 2 taps meets each pair of copies."""
        return self.grid_out[1] > self.grid[1]

    @property
    def carried(self) -> int:
        """Frames of its input it keeps for the next chunk: copies are not kept, a stride of 2 skips one."""
        return CONTEXT if self.grid[0] == self.grid_out[0] else CONTEXT - 1

    def macs(self, latents: int, height: int, width: int) -> int:
        """Multiply-adds for a clip of so many latent frames."""
        taps = (2 if self.grid_out[0] > self.grid[0] else 3) * (4 if self.enlarges else 9)
        weights = (self.channels_in * taps + self.shortcut * self.skipped) * self.channels_out
        return weights * self._given(latents, height, width, first=True)

    def largest(self, latents: int, height: int, width: int, *, first: bool) -> int:
        """Elements of the larger of the buffer it reads and what it writes."""
        out = self.channels_out * self._given(latents, height, width, first=first)
        return max(self._padded(latents, height, width, first=first), out)

    def alive(self, latents: int, height: int, width: int, *, first: bool) -> int:
        """Elements alive while it takes some latent frames: what came in, the buffer it reads, what goes out.

        An upsampler makes one of its 4 (8) phases after the other, each from a shifted copy of its input; a copy is
        there until the next one is.
        """
        came = _frames(self.grid[0], latents, first=first) * height * width
        padded = self._padded(latents, height, width, first=first)
        out = self.channels_out * self._given(latents, height, width, first=first)
        return (self.channels_in + self.skipped) * came + (3 if self.enlarges else 1) * padded + out

    def alive_in_module(self, latents: int, height: int, width: int, *, pads: bool) -> int:
        """Elements alive while the module computes it: what is added later or came in, its norm's output, the output.

        Between them stands a padded copy in video, and in pictures that of an enlarged or a strided input.
        """
        came = _frames(self.grid[0], latents, first=True) * height * width
        given = self._given(latents, height, width, first=True)
        copy = self.channels_in * (given if self.enlarges else came if self.grid != self.grid_out else 0)
        if pads:
            copy = self._padded(latents, height, width, first=True)
        normed = self.channels_in * came if self.grid == self.grid_out else 0
        return (self.skipped or self.channels_in) * came + normed + copy + self.channels_out * given

    def cache(self, height: int, width: int) -> int:
        """Elements kept from chunk to chunk."""
        return self.channels_in * self.carried * height * width

    def _padded(self, latents: int, height: int, width: int, *, first: bool) -> int:
        frames = _frames(self.grid[0], latents, first=first)
        # A lone first frame is convolved in 2-D; all else has the frames before it in front.
        before = 0 if first and frames == 1 and not self.enlarges else self.carried
        return self.channels_in * (frames + before) * (height + 2 * REACH) * (width + 2 * REACH)

    def _given(self, latents: int, height: int, width: int, *, first: bool) -> int:
        """Cells it writes."""
        (_, space), (time_out, space_out) = self.grid, self.grid_out
        return _frames(time_out, latents, first=first) * (height * space_out // space) * (width * space_out // space)


def _frames(time: int, latents: int, *, first: bool) -> int:
    return time * (latents - 1) + 1 if first else time * latents


@dataclass(frozen=True, slots=True)
class Network:
    """The steps of one half, or of a part of it, and how much of a frame they work on."""

    steps: tuple[Step, ...]

    def macs(self, latents: int, rows: Sequence[Cut], columns: Sequence[Cut]) -> int:
        """Return the multiply-adds of the convolutions for a clip cut into pieces, which read beyond their edges."""
        return sum(step.macs(latents, _length(step, rows), _length(step, columns)) for step in self.steps)

    def indexable(self, chunk: int, latents: int, rows: Cut, columns: Cut) -> bool:
        """Say whether 32 bits index every tensor when `chunk` of a clip's latent frames are taken at once."""
        first = chunk >= latents
        return all(
            step.largest(chunk, *_size(step, rows, columns), first=first) < MAX_ELEMENTS for step in self.steps
        )

    def working(self, chunk: int, latents: int, rows: Cut, columns: Cut) -> int:
        """Return the most elements alive while a chunk passes, without what is kept between chunks."""
        first = chunk >= latents
        return max(step.alive(chunk, *_size(step, rows, columns), first=first) for step in self.steps)

    def caches(self, rows: Cut, columns: Cut) -> list[int]:
        """Return the elements each step keeps from chunk to chunk."""
        return [step.cache(*_size(step, rows, columns)) for step in self.steps]


def _size(step: Step, rows: Cut, columns: Cut) -> tuple[int, int]:
    return rows.length(step.grid[1], step.halo), columns.length(step.grid[1], step.halo)


def _length(step: Step, cuts: Iterable[Cut]) -> int:
    return sum(cut.length(step.grid[1], step.halo) for cut in cuts)


@cache
def decoder_network(spec: VAESpec) -> Network:
    """List the decoder's convolutions in the order they run."""
    widths = spec.block_out_channels[::-1]
    grids = _grids(spec, DECODER_GRIDS)
    steps = [
        Step(grid=grids[0], grid_out=grids[0], channels_in=spec.latent_channels, channels_out=widths[0]),
        *_residuals(grids[0], (widths[0],) * 3),
    ]
    for level, (grid, width) in enumerate(zip(grids, widths, strict=True)):
        before = widths[max(level - 1, 0)]
        steps += _residuals(grid, (before, *(width,) * (spec.layers_per_block + 1)))
        if level < len(widths) - 1:
            steps.append(Step(grid=grid, grid_out=grids[level + 1], channels_in=width, channels_out=width))
    last = grids[-1]
    steps.append(Step(grid=last, grid_out=last, channels_in=widths[-1], channels_out=PIXEL_CHANNELS))
    return Network(tuple(steps))


@cache
def decoder_parts(spec: VAESpec) -> tuple[Network, Network]:
    """Return the decoder's steps on whole frames, and those that late tiles take, with the context they need."""
    steps = decoder_network(spec).steps
    start = next(index for index, step in enumerate(steps) if step.enlarges and step.grid[1] == LATE_SPACE)
    return Network(steps[:start]), Network(tuple(_with_halos(steps[start:])))


@cache
def encoder_network(spec: VAESpec) -> Network:
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
    steps.append(Step(grid=last, grid_out=last, channels_in=widths[-1], channels_out=2 * spec.latent_channels))
    return Network(tuple(steps))


def _grids(spec: VAESpec, video: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    return video if spec.kind == "hunyuan" else tuple((1, space) for _, space in video)


def _residuals(grid: tuple[int, int], widths: Iterable[int]) -> Iterator[Step]:
    for before, after in pairwise(widths):
        yield Step(grid=grid, grid_out=grid, channels_in=before, channels_out=after)
        yield Step(
            grid=grid, grid_out=grid, channels_in=after, channels_out=after, skipped=before, shortcut=before != after
        )  # fmt: skip


def _with_halos(steps: Sequence[Step]) -> Iterator[Step]:
    """Give each step the context it gets: an upsampler what is needed from there on, the others what that gives."""
    need, needs = 0, []
    for step in reversed(steps):
        need = -(-(need + REACH) // (2 if step.enlarges else 1))
        needs.append(need)
    have = 0
    for step, need in zip(steps, reversed(needs), strict=True):
        have = need if step.enlarges else have
        yield replace(step, halo=have)
        have *= 2 if step.enlarges else 1


def weight_bytes(spec: VAESpec, itemsize: int, *, encoder: bool = True, decoder: bool = True) -> int:
    """Return the bytes of the parameters of both halves, or of one."""
    count = 0
    if encoder:
        count += _weights(spec, encoder_network(spec).steps) + _quant(spec, 2 * spec.latent_channels)
    if decoder:
        count += _weights(spec, decoder_network(spec).steps) + _quant(spec, spec.latent_channels)
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


def pixels(latents: int, rows: int, columns: int) -> int:
    """Return the elements of decoded pixels."""
    time, space = DECODER_GRIDS[-1]
    return PIXEL_CHANNELS * _frames(time, latents, first=True) * rows * columns * space**2


def chunk_bytes(
    spec: VAESpec, network: Network, itemsize: int, chunk: int, latent_thw: tuple[int, int, int], *, on_host: bool
) -> int:
    """Return the peak of causal chunks of whole frames; `on_host` leaves only the running layer's past on the device.

    A single chunk remembers nothing.
    """
    latents, rows, columns = latent_thw
    frame = Cut.whole(rows), Cut.whole(columns)
    seen = spec.block_out_channels[-1] * latents * rows * columns  # what the attention keeps of the whole clip
    pasts = [*network.caches(*frame), seen] if chunk < latents else [0]
    kept = max(pasts) if on_host else sum(pasts)
    # The attention makes the keys and values of all of it again, while little else is alive.
    working = max(network.working(chunk, latents, *frame), 2 * seen)
    return itemsize * (working + kept) + _merged_bytes(spec, network, itemsize)


def module_bytes(spec: VAESpec, network: Network, itemsize: int, latents: int, rows: int, columns: int) -> int:
    """Return the peak of one pass of the module itself: of pictures, and of the released windows when encoding."""
    frame = Cut.whole(rows), Cut.whole(columns)
    pads = spec.kind == "hunyuan"
    return itemsize * max(step.alive_in_module(latents, *_size(step, *frame), pads=pads) for step in network.steps)


def late_bytes(
    spec: VAESpec, itemsize: int, chunk: int, latent_thw: tuple[int, int, int], tile: tuple[Cut, Cut], *, on_host: bool
) -> int:
    """Return the peak of late tiles none of which is larger than `tile`."""
    latents, rows, columns = latent_thw
    early, late = decoder_parts(spec)
    features = 0 if on_host else late.steps[0].channels_in * latents * rows * columns * LATE_SPACE**2
    early_bytes = chunk_bytes(spec, early, itemsize, chunk, latent_thw, on_host=on_host)
    pasts = late.caches(*tile) if chunk < latents else [0]
    kept = max(pasts) if on_host else sum(pasts)
    late_bytes = itemsize * (late.working(chunk, latents, *tile) + kept)
    return itemsize * features + max(early_bytes, late_bytes) + _merged_bytes(spec, late, itemsize)


def _merged_bytes(spec: VAESpec, network: Network, itemsize: int) -> int:
    """Return the bytes of the upsamplers' kernels in their short form, which a decode makes beside the weights."""
    count = 0
    for step in network.steps:
        if step.enlarges and spec.kind == "hunyuan":
            taps = 4 * 3 * 2 * 2 if step.grid[0] == step.grid_out[0] else 8 * 2 * 2 * 2
            count += taps * step.channels_in * step.channels_out
    return count * itemsize
