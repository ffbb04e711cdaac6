"""Decode a clip in bounded memory, by plan; a decode that fails goes on, under another plan if need be."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ShapeError
from ..shapes import pixel_frames
from .hunyuan import HunyuanVideoVAE, check_latent
from .passage import OnPiece, Passage, Piece
from .plan import LATE_TILE, MODES, REFERENCE, SINGLE_PASS, STREAM, DecodePlan
from .sampled import Sampling
from .statistics import Given, Normalise, Recorded, Running, Source, Statistics, in_slices
from .tiling import OnTile
from .windows import Windows


class Decoding:
    """One clip on its way to pixels. Every output pixel is handed to `on_piece` exactly once, in time order per tile.

    `run` decodes to the end. Whatever it raises, a later `run` goes on at the stage that failed, and `replan` in
    between makes it go on with less memory, or on the device the autoencoder was moved to. Drop the exception first:
    its traceback holds the failed stage's tensors. With given statistics no plan changes more than rounding.

    `z_BCTHW` has the type to compute in and may lie in main memory; `device` is needed where the autoencoder's weights
    do not lie on the device it computes on. `on_tile` counts latent frames, once more for each tile. `normalise`
    computes the norms: torch's own kernels, or a `compiled.Compiled`.
    """

    def __init__(
        self,
        vae: HunyuanVideoVAE,
        z_BCTHW: Tensor,
        plan: DecodePlan,
        *,
        on_piece: OnPiece,
        on_tile: OnTile | None = None,
        statistics: Statistics | None = None,
        device: torch.device | None = None,
        normalise: Normalise = in_slices,
    ) -> None:
        check_latent(z_BCTHW, vae.spec)
        _check_plan(plan, z_BCTHW)
        self.vae = vae
        self.plan = plan
        self.statistics = statistics
        self._z = z_BCTHW
        self._on_piece = on_piece
        self._on_tile = on_tile
        self._device = device
        self._normalise = normalise
        self._work: Passage | Windows | None = None
        self._sampling: Sampling | None = None
        self._source: Source | None = None  # of the norms' moments, while frames are decoded
        self._done = 0  # latent frames, as `on_tile` counts them
        self._handed_out = 0  # frames that the released windows gave before the plan changed

    @property
    def frames_done(self) -> int:
        """Frames all of whose pixels were handed out."""
        return max(self._handed_out, self._work.frames_done if self._work is not None else 0)

    @torch.no_grad()
    def run(self) -> None:
        """Decode what is left."""
        if self.plan.mode == REFERENCE:
            self._work = self._work or Windows(
                self.vae,
                self._z,
                self.plan,
                device=self.device,
                on_piece=self._on_piece,
                on_latents=self._tick,
                normalise=self._normalise,
            )
        elif self._work is None:
            self._source = self._statistics_source()
            self._work = self._passage(slice(None), self._source, self._hand_out)
        self._work.run()

    @torch.no_grad()
    def replan(self, plan: DecodePlan, *, device: torch.device | None = None) -> None:
        """Go on under another plan; frames and tiles that were handed out stay as they are.

        Late tiles may become smaller but not larger again. The released windows cannot take over from the other modes;
        the other way round the clip's beginning is computed once more, and not handed out twice.
        """
        _check_plan(plan, self._z)
        if plan.mode == REFERENCE != self.plan.mode and self.frames_done:
            raise ShapeError(
                f"A decode under way in mode {self.plan.mode!r} cannot go on in mode {REFERENCE!r}, which blends "
                f"windows. Use {STREAM!r} or {LATE_TILE!r}."
            )
        self._device = device or self._device
        if (self.plan.mode == REFERENCE) != (plan.mode == REFERENCE):
            self._handed_out, self._work = self.frames_done, None
        elif isinstance(self._source, Recorded | Running) and not self.frames_done:
            self._work = (
                None  # what normalises with itself would change half-way, and nothing has left it yet
            )
        self.plan = plan
        if plan.mode not in (STREAM, LATE_TILE):
            self._sampling = None
        elif self._sampling is not None:
            self._sampling.replan(plan, self.device)
        if isinstance(self._work, Windows):
            self._work.replan(plan, self.device)
        elif self._work is not None:
            if isinstance(self._source, Running) and plan.mode != SINGLE_PASS:
                self._source = Given(self._source.statistics)  # tiles cannot share a running window
            self._work.replan(plan, self._source, self.device)

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return self._device or _home(self.vae)

    def _statistics_source(self) -> Source:
        latents = self._z.shape[2]
        if self.statistics is not None:
            return Given(self.statistics.to(self.device))
        if self.plan.mode == SINGLE_PASS:
            return Running()
        if self.plan.mode == STREAM and latents <= self.plan.chunk:
            return Recorded()  # the whole clip at once: its own statistics are the exact ones
        self._sampling = self._sampling or Sampling(
            latents, lambda window, source: self._passage(window, source, _ignore)
        )
        self._sampling.run()
        self.statistics, self._sampling = self._sampling.source.statistics, None
        return Given(self.statistics)

    def _passage(self, frames: slice, source: Source, on_piece: OnPiece) -> Passage:
        return Passage(
            self.vae,
            self._z[:, :, frames],
            self.plan,
            source,
            device=self.device,
            on_piece=on_piece,
            on_latents=self._tick,
            normalise=self._normalise,
        )

    def _hand_out(self, piece: Piece) -> None:
        fresh = max(self._handed_out - piece.frames.start, 0)
        if fresh:
            frames = slice(piece.frames.start + fresh, max(piece.frames.stop, piece.frames.start + fresh))
            piece = Piece(frames, piece.rows, piece.columns, piece.pixels_BCTHW[:, :, fresh:])
        if piece.frames.start < piece.frames.stop:
            self._on_piece(piece)

    def _tick(self, latents: int) -> None:
        self._done += latents
        if self._on_tile is not None:
            self._on_tile(self._done, self._done + self._left())

    def _left(self) -> int:
        if self._work is not None:
            return self._work.left
        rounds = 1 + (self.plan.tiles[0] * self.plan.tiles[1] if self.plan.mode == LATE_TILE else 0)
        return self._sampling.under_way + rounds * (self._sampling.waiting + self._z.shape[2])


@torch.no_grad()
def decode_with(
    vae: HunyuanVideoVAE,
    z_BCTHW: Tensor,
    plan: DecodePlan,
    *,
    statistics: Statistics | None = None,
    on_tile: OnTile | None = None,
    device: torch.device | None = None,
    normalise: Normalise = in_slices,
) -> Tensor:
    """Decode by plan to one tensor of pixels, which lies where the latent lies."""
    batch, _, latents, rows, columns = z_BCTHW.shape
    out_BCTHW = z_BCTHW.new_empty(batch, 3, pixel_frames(latents), 8 * rows, 8 * columns)

    def put(piece: Piece) -> None:
        out_BCTHW[:, :, piece.frames, piece.rows, piece.columns] = piece.pixels_BCTHW.to(out_BCTHW.device)

    Decoding(
        vae, z_BCTHW, plan, on_piece=put, on_tile=on_tile, statistics=statistics, device=device, normalise=normalise
    ).run()
    return out_BCTHW


@torch.no_grad()
def exact_statistics(
    vae: HunyuanVideoVAE, z_BCTHW: Tensor, *, device: torch.device | None = None
) -> Statistics:
    """Record what the norms compute when the whole latent is decoded in one pass, in that pass's memory."""
    plan = DecodePlan(mode=STREAM, latent_thw=tuple(z_BCTHW.shape[2:]), chunk=z_BCTHW.shape[2])
    source = Recorded()
    _silent(vae, z_BCTHW, plan, source, device).run()
    return source.statistics


@torch.no_grad()
def sampled_statistics(
    vae: HunyuanVideoVAE, z_BCTHW: Tensor, plan: DecodePlan, *, device: torch.device | None = None
) -> Statistics:
    """Estimate the clip's statistics from a few windows, in the memory of a decode under `plan`."""
    sampling = Sampling(
        z_BCTHW.shape[2], lambda window, source: _silent(vae, z_BCTHW[:, :, window], plan, source, device)
    )
    sampling.run()
    return sampling.source.statistics


def _silent(
    vae: HunyuanVideoVAE, z_BCTHW: Tensor, plan: DecodePlan, source: Source, device: torch.device | None
) -> Passage:
    device = device or _home(vae)
    return Passage(vae, z_BCTHW, plan, source, device=device, on_piece=_ignore, on_latents=_ignore)


def _ignore(_: object) -> None:
    pass


def _home(vae: HunyuanVideoVAE) -> torch.device:
    return vae.decoder.conv_in.conv.weight.device


def _check_plan(plan: DecodePlan, z_BCTHW: Tensor) -> None:
    if tuple(plan.latent_thw) != tuple(z_BCTHW.shape[2:]):
        raise ShapeError(
            f"The plan is for a latent of {plan.latent_thw} frames, rows and columns, this one has "
            f"{tuple(z_BCTHW.shape[2:])}. Make the plan from the latent."
        )
    if plan.mode not in MODES or plan.chunk < 1:
        raise ShapeError(
            f"Mode {plan.mode!r} with chunks of {plan.chunk}: use one of {', '.join(MODES)}, chunks from 1."
        )
