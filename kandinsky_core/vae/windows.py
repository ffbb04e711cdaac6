"""The released windows of time, each in one pass of the lean graph, handed out as they become final."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..shapes import VAE_SPATIAL
from .hunyuan import HunyuanVideoVAE
from .passage import OnPiece, Piece
from .plan import DecodePlan
from .region import frame_region
from .stages import Stage, decoder_stages
from .statistics import Normalise, Recorded, in_slices
from .stream import Pace, Stream
from .tiling import DECODE, OVERLAP, WINDOW, Plan, assemble, fade, first_frame, window_plan


class Windows:
    """A decode under way, one window after the other; what the next window fades into is kept back."""

    def __init__(
        self,
        vae: HunyuanVideoVAE,
        z_BCTHW: Tensor,
        plan: DecodePlan,
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
        whole = frame_region(*z_BCTHW.shape[3:])
        self._place = (whole.rows, whole.columns)
        self._next = 0  # window
        self._tail: Tensor | None = None  # frames the next window fades into
        self.frames_done = 0
        self.replan(plan, device)

    def replan(self, plan: DecodePlan, device: torch.device) -> None:
        """Go on with other tiles or on another device."""
        self._plan = released_plan(plan)
        self._device = device
        self._tail = None if self._tail is None else self._tail.to(device)
        like = torch.empty(0, dtype=self._z.dtype, device=device)
        self._stages = decoder_stages(self._vae, like, min(WINDOW, self._z.shape[2]), self._normalise)

    @property
    def left(self) -> int:
        """Latent frames still to be decoded, those of overlapping windows more than once."""
        return sum(window.stop - window.start for window in self._plan.time[self._next :])

    def run(self) -> None:
        """Decode the windows that are left."""
        windows = self._plan.time
        while self._next < len(windows):
            window = windows[self._next]
            x = assemble(self._plan, self._z[:, :, window.start : window.stop], self._once, DECODE)
            x = x[:, :, first_frame(window.lead, DECODE.time_out) :]
            if self._tail is not None:
                fade(self._tail, x, self._tail.shape[2], dim=2)
            kept = windows[self._next + 1].blend * DECODE.time_out if self._next + 1 < len(windows) else 0
            frames = slice(self.frames_done, self.frames_done + x.shape[2] - kept)
            ready, tail = x.split([x.shape[2] - kept, kept], 2)
            tail = tail.clone() if kept else None
            self._on_piece(Piece(frames, *self._place, ready))
            self.frames_done, self._tail, self._next = frames.stop, tail, self._next + 1
            self._on_latents(window.stop - window.start)

    def _once(self, z_BCTHW: Tensor) -> Tensor:
        return one_pass(self._stages, z_BCTHW.to(self._device))


def one_pass(stages: Sequence[Stage], z_BCTHW: Tensor) -> Tensor:
    """Decode a latent at once, normalised with its own statistics."""
    frame = frame_region(*z_BCTHW.shape[3:])
    stream = Stream(stages=stages, core=frame, frame=frame, latents=z_BCTHW.shape[2])
    pace = Pace(chunk=z_BCTHW.shape[2], caches_on_host=False, device=z_BCTHW.device, source=Recorded())
    out: list[Tensor] = []
    stream.feed(z_BCTHW)
    stream.drain(pace, lambda x, _: out.append(x))
    return out[0] if len(out) == 1 else torch.cat(out, 2)


def released_plan(plan: DecodePlan) -> Plan:
    """Return the released windows in so many tiles, sized as the released models size them."""
    _, *sides = plan.latent_thw
    height, width = (
        side * VAE_SPATIAL
        if count == 1
        else math.ceil(side / count) * VAE_SPATIAL + OVERLAP * VAE_SPATIAL // 2
        for side, count in zip(sides, plan.tiles, strict=True)
    )
    return window_plan(*plan.latent_thw, tile_px=(height, width))
