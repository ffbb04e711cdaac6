"""One clip through the decoder in causal chunks: whole frames, or late levels tile by tile.

Late tiles: the levels up to twice the latent's grid run on whole frames and leave their features; the rest runs on
pieces of the frame, each in time order with its own past, with as much real context around as it sees. Cuts are hard.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..shapes import pixel_frames
from .hunyuan import HunyuanVideoVAE
from .plan import LATE_TILE, DecodePlan
from .region import Region, frame_region
from .stages import Stage, decoder_stages, late_index
from .statistics import Normalise, Source, in_slices
from .stream import Pace, Stream


@dataclass(frozen=True, slots=True)
class Piece:
    """Finished pixels `[B,3,T,H,W]` of some frames, rows and columns, on the device they were made on."""

    frames: slice
    rows: slice
    columns: slice
    pixels_BCTHW: Tensor


OnPiece = Callable[[Piece], None]


@dataclass(frozen=True, slots=True)
class Features:
    """What the whole-frame levels gave from latent frame `start` on."""

    start: int
    x_BCTHW: Tensor

    def frames(self, first: int, count: int) -> Tensor:
        """View some latent frames' features."""
        return self.x_BCTHW[:, :, first - self.start : first - self.start + count]

    def to(self, device: torch.device | str) -> Features:
        """Move to a device."""
        return Features(self.start, self.x_BCTHW.to(device))


class Passage:
    """A decode under way. `run` goes on from where it stands, also after an exception; `replan` changes the way on."""

    def __init__(
        self,
        vae: HunyuanVideoVAE,
        z_BCTHW: Tensor,
        plan: DecodePlan,
        source: Source,
        *,
        device: torch.device,
        on_piece: OnPiece,
        on_latents: Callable[[int], None],
        normalise: Normalise = in_slices,
    ) -> None:
        self._vae = vae
        self._normalise = normalise
        self._z = z_BCTHW
        self._on_piece = on_piece
        self._on_latents = on_latents
        self._latents = z_BCTHW.shape[2]
        self._under_way = 0  # latent frames fed and not reported yet
        self._pace = Pace(chunk=plan.chunk, caches_on_host=plan.caches_on_host, device=device, source=source)
        self._frame = frame_region(*z_BCTHW.shape[3:])
        stages = self._stages()
        self._late = late_index(stages)
        self._front: Stream | None = Stream(
            stages=stages, core=self._frame, frame=self._frame, latents=self._latents
        )
        self._tiles: list[Stream] | None = None  # still to be decoded, the first may be under way
        self._features: Features | None = None
        self._shape(plan)

    @property
    def frames_done(self) -> int:
        """Frames all of whose pixels were handed out."""
        if self._tiles is None:
            return self._front.given
        return min((tile.given for tile in self._tiles), default=pixel_frames(self._latents))

    @property
    def left(self) -> int:
        """Latent frames still to be fed, counted once for the whole-frame levels and once for each tile."""
        under_way = [*(self._tiles or ()), *((self._front,) if self._front else ())]
        return sum(self._latents - stream.fed for stream in under_way)

    def run(self) -> None:
        """Decode to the end."""
        chunk = self._pace.chunk
        if self._front is not None:
            z = self._z
            self._stream(self._front, lambda first: z[:, :, first : first + chunk], self._leave_front)
            if self._tiles is not None:
                self._front = None  # its caches are not needed any more
        while self._tiles:
            tile = self._tiles[0]
            self._stream(tile, self._crops(tile), self._crop_out(tile))
            self._tiles.pop(0)
        if self._tiles is not None:
            self._features = None

    def replan(self, plan: DecodePlan, source: Source, device: torch.device) -> None:
        """Go on under another plan, on the device the autoencoder is on now; tiles may get smaller, not larger."""
        source.to(device)
        self._pace = Pace(chunk=plan.chunk, caches_on_host=plan.caches_on_host, device=device, source=source)
        stages = self._stages()
        if self._front is not None:
            self._front.stages = stages if self._tiles is None else stages[: self._late]
        for tile in self._tiles or ():
            tile.stages = stages[self._late :]
        self._shape(plan)
        if plan.caches_on_host:
            for stream in (*(self._tiles or ()), *((self._front,) if self._front else ())):
                stream.park()
            self._features = self._features and self._features.to("cpu")

    def _stages(self) -> list[Stage]:
        like = torch.empty(0, dtype=self._z.dtype, device=self._pace.device)
        return decoder_stages(self._vae, like, self._latents, self._normalise)

    def _shape(self, plan: DecodePlan) -> None:
        if plan.mode == LATE_TILE and self._tiles is None:
            front, late = self._front.split(self._late)
            tiles = [late.part(core) for core in self._frame.cut(*plan.tiles)]
            self._front, self._tiles = front, tiles  # together, and last: cutting may run out of memory
        elif self._tiles is not None:
            largest = self._frame.cut(*plan.tiles)
            height, width = (max(tile.size[side] for tile in largest) for side in range(2))
            self._tiles = [part for tile in self._tiles for part in _smaller(tile, height, width)]

    def _stream(
        self, stream: Stream, source: Callable[[int], Tensor], emit: Callable[[Tensor, int], None]
    ) -> None:
        while stream.flows or stream.fed < self._latents:
            if not stream.flows:
                x = source(stream.fed)
                stream.feed(x)
                self._under_way += x.shape[2]
            stream.drain(self._pace, emit)
            latents, self._under_way = self._under_way, 0
            self._on_latents(latents)

    def _leave_front(self, x_BCTHW: Tensor, first: int) -> None:
        if self._tiles is None:
            self._hand_out(x_BCTHW, first, self._frame)
            return
        if self._features is None:
            batch, channels, _, height, width = x_BCTHW.shape
            place = "cpu" if self._pace.caches_on_host else x_BCTHW.device
            shape = (batch, channels, self._latents - first, height, width)
            self._features = Features(first, torch.empty(shape, dtype=x_BCTHW.dtype, device=place))
        self._features.frames(first, x_BCTHW.shape[2]).copy_(x_BCTHW)

    def _crops(self, tile: Stream) -> Callable[[int], Tensor]:
        return lambda first: tile.region(0).crop(self._features.frames(first, self._pace.chunk))

    def _crop_out(self, tile: Stream) -> Callable[[Tensor, int], None]:
        inner = tile.core.inside(tile.region(len(tile.stages)))
        return lambda x, first: self._hand_out(inner.crop(x), first, tile.core)

    def _hand_out(self, x_BCTHW: Tensor, first: int, place: Region) -> None:
        self._on_piece(Piece(slice(first, first + x_BCTHW.shape[2]), place.rows, place.columns, x_BCTHW))


def _smaller(tile: Stream, height: int, width: int) -> list[Stream]:
    rows, columns = (
        math.ceil(side / most) for side, most in zip(tile.core.size, (height, width), strict=True)
    )
    return [tile] if rows == columns == 1 else [tile.part(core) for core in tile.core.cut(rows, columns)]
