"""A clip on its way through the stages: what every stage remembers, and the activation in between.

The unit of work is one stage on one piece of time. A piece leaves its place only when the next activation is there, so
whatever a stage raises (out of memory, a cancelled run), nothing is lost or done twice, and the way on may be another:
smaller pieces, a part of the frame, caches in main memory, another device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .region import Region
from .stages import Caches, Flow, Now, Stage
from .statistics import Source

Emit = Callable[[Tensor, int], None]  # (what leaves the last stage, how many frames left before)


@dataclass(slots=True, kw_only=True)
class Pace:
    """How a stream is run; may change between two steps."""

    chunk: int  # latent frames at once
    caches_on_host: bool
    device: torch.device
    source: Source


@dataclass(slots=True, kw_only=True)
class Stream:
    """One piece of the frame, `core` (in pixels) with the context each stage needs, in time order."""

    stages: Sequence[Stage]
    core: Region
    frame: Region  # the whole frame, in pixels
    latents: int  # of the whole clip, in latent frames
    caches: list[Caches | None] = field(default_factory=list)
    at: list[int] = field(default_factory=list)  # frames each stage has taken; the last: frames given
    flows: list[tuple[int, Flow]] = field(
        default_factory=list
    )  # (stage to come, its input), the next one last

    def __post_init__(self) -> None:
        if not self.at:
            self.caches = [None] * len(self.stages)
            self.at = [0] * (len(self.stages) + 1)

    @property
    def given(self) -> int:
        """Frames that have left the last stage."""
        return self.at[-1]

    @property
    def fed(self) -> int:
        """Frames that were fed."""
        return self.at[0] + sum(flow[0].shape[2] for index, flow in self.flows if index == 0)

    def region(self, index: int) -> Region:
        """Return where stage `index` works, on its input's grid; behind the last stage it is the last one's."""
        stage = self.stages[min(index, len(self.stages) - 1)]
        return self._on_grid(self.core, stage).grown(stage.halo, *self._size(stage))

    def _on_grid(self, region: Region, stage: Stage) -> Region:
        return region.scaled(stage.grid, 8)

    def _size(self, stage: Stage) -> tuple[int, int]:
        return self._on_grid(self.frame, stage).size

    def feed(self, x: Tensor) -> None:
        """Put frames before the first stage: all of the frame, or exactly the first stage's region."""
        self.flows.insert(0, (0, (x,)))

    def drain(self, pace: Pace, emit: Emit) -> None:
        """Take all that was fed through the stages."""
        while self.flows:
            self._step(pace, emit)

    def _step(self, pace: Pace, emit: Emit) -> None:
        index, flow = self.flows[-1]
        if index == len(self.stages):
            emit(flow[0], self.given)
            self.at[index] += flow[0].shape[2]
            self.flows.pop()
            return
        stage, at, here = self.stages[index], self.at[index], self.region(index)
        flow = self._cropped(index, flow, here)
        frames = stage.frames_at_once(pace.chunk, at, *here.size, flow[0].shape[0])
        piece = tuple(x[:, :, :frames].to(pace.device) for x in flow)
        rest = tuple(x[:, :, frames:] for x in flow)
        if pace.caches_on_host and (kept := self.caches[index]):
            self.caches[index] = parked(
                kept, None
            )  # beforehand: what is updated in place must need no memory after
        kept = self.caches[index]
        now = Now(
            at=at,
            caches=kept and tuple(cache.to(pace.device) for cache in kept),
            core=self._on_grid(self.core, stage).inside(here),
            rate=stage.rate,
            source=pace.source,
            last=at + piece[0].shape[2] == stage.rate * (self.latents - 1) + 1,
        )
        pace.source.begin()
        out, caches = stage.layer(piece, now)
        if now.last:
            self.caches[index] = None
        else:
            self.caches[index] = parked(caches, kept) if pace.caches_on_host else caches
        pace.source.commit()
        self.at[index] += piece[0].shape[2]
        self.flows[-1:] = [(index, rest), (index + 1, out)] if rest[0].shape[2] else [(index + 1, out)]

    def _cropped(self, index: int, flow: Flow, here: Region) -> Flow:
        """Drop context that was needed up to here: an upsampler needs less than what stood around its input."""
        if index and flow[0].shape[-2:] != here.size:
            before = self.region(index - 1).scaled(self.stages[index - 1].zoom)
            return tuple(here.inside(before).crop(x) for x in flow)
        return flow

    def split(self, index: int) -> tuple[Stream, Stream]:
        """Part before stage `index`: an early stream that goes on, and a late one with all that is beyond."""
        early, late = (
            Stream(
                stages=self.stages[part],
                core=self.core,
                frame=self.frame,
                latents=self.latents,
                caches=self.caches[part],
                at=self.at[part.start : part.stop + 1],
                flows=[
                    (place - part.start, flow)
                    for place, flow in self.flows
                    if part.start <= place < part.stop or place == part.stop == len(self.stages)
                ],
            )
            for part in (slice(0, index), slice(index, len(self.stages)))
        )
        early.at[-1] = late.fed
        return early, late

    def part(self, core: Region) -> Stream:
        """Return a stream for a part of this one's core that goes on from here; its tensors lie in main memory."""
        part = Stream(
            stages=self.stages,
            core=core,
            frame=self.frame,
            latents=self.latents,
            at=list(self.at),
            caches=[None] * len(self.stages),
        )

        def cut(index: int, tensors: tuple[Tensor, ...], outer: Region) -> tuple[Tensor, ...]:
            inner = part.region(index).inside(outer)
            return tuple(
                inner.crop(x).to("cpu", copy=True, memory_format=torch.contiguous_format) for x in tensors
            )

        part.caches = [
            kept and cut(index, kept, self.region(index)) for index, kept in enumerate(self.caches)
        ]
        part.flows = [(index, cut(index, flow, self._extent(index, flow))) for index, flow in self.flows]
        return part

    def _extent(self, index: int, flow: Flow) -> Region:
        """Return what an activation covers before it is cropped for its stage."""
        here = self.region(index)
        if index and flow[0].shape[-2:] != here.size:
            return self.region(index - 1).scaled(self.stages[index - 1].zoom)
        return here

    def park(self) -> None:
        """Move all tensors to main memory, as after a failure that memory ran out in."""
        self.caches = [kept and parked(kept, None) for kept in self.caches]
        self.flows = [(index, tuple(x.cpu() for x in flow)) for index, flow in self.flows]


def parked(caches: Caches, places: Caches | None) -> Caches:
    """Copy to main memory, into `places` where they lie there already."""
    return tuple(
        cache if cache.device.type == "cpu" else _host_place(cache, place).copy_(cache)
        for cache, place in zip(caches, places or (None,) * len(caches), strict=True)
    )


def _host_place(cache: Tensor, place: Tensor | None) -> Tensor:
    if place is not None and place.device.type == "cpu":
        return place
    return torch.empty(cache.shape, dtype=cache.dtype)
