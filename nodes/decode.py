"""Decode by plan and come to an end: what every decode node does, under both hosts.

Legend: B batch, C channels, T frames (of pixels or latents), H rows, W columns.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kandinsky_core.errors import BudgetError, KandinskyError, ShapeError
from ..kandinsky_core.io.assembly import FrameAssembly, Place
from ..kandinsky_core.io.image import to_uint8
from ..kandinsky_core.memory.plan import Plan
from ..kandinsky_core.shapes import VAE_SPATIAL, pixel_frames
from ..kandinsky_core.vae.compiled import Compiled
from ..kandinsky_core.vae.convolution import sound_convolutions
from ..kandinsky_core.vae.decoding import Decoding
from ..kandinsky_core.vae.flux import FluxVAE
from ..kandinsky_core.vae.passage import Piece
from ..kandinsky_core.vae.plan import AUTO, MODES, DecodePlan, decode_plans, needed_bytes, plan_decode
from ..kandinsky_core.vae.rescue import finish
from ..kandinsky_core.vae.statistics import Normalise, in_slices
from ..kandinsky_core.vae.tiling import OnTile
from .comfy_io import io
from .host import Workplace, host
from .latents import KEEP
from .memory import MemoryPlan

logger = logging.getLogger("kandinsky5")

GIB = 2**30
PERCENT = 100
PROCESSOR = torch.device("cpu")

Put = Callable[[Place, Tensor], None]  # takes a piece of the result: its place, pixels [T,H,W,3] 0…1 on the device


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """How to decode."""

    mode: str = AUTO
    limit_bytes: int | None = None  # of device memory for weights and work together; None: what is free
    planned: DecodePlan | None = None  # to begin with, if it is for this latent and fits
    compile: bool = False

    @classmethod
    def of(cls, mode: str, memory_gb: float, plan: Plan | None, compile: bool) -> Wanted:
        """Read what `memory_inputs` ask for: what is set on the node goes before the plan."""
        limit_bytes, planned = int(memory_gb * GIB) or None, None
        if plan is not None:
            limit_bytes = limit_bytes or plan.budget_bytes
            mode, planned = (plan.decode_mode, plan.decode) if mode == AUTO else (mode, None)
        return cls(mode=mode, limit_bytes=limit_bytes, planned=planned, compile=compile)


def memory_inputs() -> list[Any]:
    """Return the last inputs of a decode node: mode, memory_gb, keep_latents, plan, compile."""
    return [
        io.Combo.Input(
            "mode",
            options=[AUTO, *MODES],
            default=AUTO,
            tooltip="'auto': by the memory that is free; stream and late-tile give the same picture. "
            "'reference': the released windows. 'single-pass': statistics run along with the clip.",
        ),
        io.Float.Input(
            "memory_gb",
            default=0.0,
            min=0.0,
            max=1024.0,
            step=0.5,
            tooltip="Memory of the device that may be used, in GiB, weights included. 0: what is free.",
        ),
        io.Int.Input(
            "keep_latents",
            default=KEEP,
            min=0,
            max=10000,
            tooltip="The latent is written to output/latents before decoding; so many of them are kept. 0: none.",
        ),
        MemoryPlan.Input(
            "plan",
            optional=True,
            tooltip="From Kandinsky 5 Memory Plan: decodes as planned, within its budget. 'mode' and 'memory_gb' "
            "go before it where they are set.",
        ),
        io.Boolean.Input(
            "compile",
            default=False,
            optional=True,
            advanced=True,
            tooltip="Compile the norms of a video VAE with torch.compile. The first decode waits for the compiler; on "
            "a processor it gains nothing. Where it cannot be done, a line says why and the decode goes on without.",
        ),
    ]


def decode_images(vae: Any, samples: Tensor, wanted: Wanted) -> tuple[Tensor, str]:
    """Decode to IMAGE and a report."""
    image_THWC = host().zeros((*image_shape(samples), 3))
    return image_THWC, decode(vae, samples, wanted, into(image_THWC))


def image_shape(samples: Tensor) -> tuple[int, int, int]:
    """Return (frames, rows, columns) of what raw latents become, one clip after the other."""
    frames = pixel_frames(samples.shape[2]) if samples.ndim == 5 else 1
    rows, columns = (side * VAE_SPATIAL for side in samples.shape[-2:])
    return samples.shape[0] * frames, rows, columns


def into(image_THWC: Tensor) -> Put:
    """Return a `Put` that fills an IMAGE."""

    def put(place: Place, pixels_THWC: Tensor) -> None:
        image_THWC[place] = pixels_THWC.to(image_THWC)

    return put


def onto(film: FrameAssembly) -> Put:
    """Return a `Put` that feeds a clip that is being written."""

    def put(place: Place, pixels_THWC: Tensor) -> None:
        film.put(place, to_uint8(pixels_THWC).cpu().numpy())

    return put


def decode(vae: Any, samples: Tensor, wanted: Wanted, put: Put) -> str:
    """Decode raw latents clip by clip, handing every pixel to `put` once; return a report.

    When memory runs out the plan is remade with less and decoding goes on where it stood, at last on the processor.
    """
    work = _Work(host().workplace(vae), samples, wanted, put)
    with torch.no_grad():
        return work.run()


class Picture:
    """One picture on its way to pixels, in the form of `Decoding`: it takes one pass, so there is nothing to resume."""

    def __init__(
        self, vae: FluxVAE, z_BCTHW: Tensor, plan: DecodePlan, *,
        on_piece: Callable[[Piece], None], on_tile: OnTile, device: torch.device,
    ) -> None:  # fmt: skip
        self.vae = vae
        self.plan = plan
        self.frames_done = 0
        self._z_BCHW = z_BCTHW.squeeze(2)
        self._on_piece = on_piece
        self._on_tile = on_tile
        self._device = device

    def run(self) -> None:
        """Decode it."""
        pixels_BCHW = self.vae.decode(self._z_BCHW.to(self._device), on_tile=self._on_tile)
        whole = (slice(0, 1), slice(0, pixels_BCHW.shape[2]), slice(0, pixels_BCHW.shape[3]))
        self._on_piece(Piece(*whole, pixels_BCHW.unsqueeze(2)))
        self.frames_done = 1

    def replan(self, plan: DecodePlan, *, device: torch.device | None = None) -> None:
        """Go on elsewhere."""
        self.plan = plan
        self._device = device or self._device


class _Work:
    """One call of `decode`; what the first clip learned of the memory holds for the next."""

    def __init__(self, place: Workplace, samples: Tensor, wanted: Wanted, put: Put) -> None:
        self.place = place
        self.spec = place.network.spec
        self.clips = _checked(samples, self.spec.kind, self.spec.latent_channels)
        self.wanted = wanted
        self.put = put
        self.told: list[str] = []
        self.tick = host().progress(PERCENT).tick

    def run(self) -> str:
        clips, _, latents, rows, columns = self.clips.shape
        plan = self._plan((latents, rows, columns))
        self.told.append(f"{clips * pixel_frames(latents)} frames of {columns * 8} × {rows * 8}: {plan}")
        measure = _PeakMeter(self.place.device)
        normalise = Compiled(self.place.is_out_of_memory, self._announce) if self.wanted.compile else in_slices
        for index in range(clips):
            plan = self._clip(index, plan, normalise)
        self.told.append(measure.told(plan))
        return "\n".join(self.told)

    def _plan(self, latent_thw: tuple[int, int, int]) -> DecodePlan:
        weights = sum(weight.nbytes for weight in self.place.network.parameters())
        limit = None if self.wanted.limit_bytes is None else max(self.wanted.limit_bytes - weights, 0)
        best = self._fitting(latent_thw, limit)
        self.place.make_room(needed_bytes(best.peak_bytes))
        free = self.place.free_bytes() or None
        least = min((bound for bound in (free, limit) if bound is not None), default=None)
        return self._fitting(latent_thw, least, announce=True)

    def _fitting(
        self, latent_thw: tuple[int, int, int], free_bytes: int | None, *, announce: bool = False
    ) -> DecodePlan:
        """Return the best plan that fits; if none does, the least: estimates are careful, and there is a way on."""
        if self.wanted.planned is not None:
            try:
                return self._as_planned(self.wanted.planned, latent_thw, free_bytes)
            except KandinskyError as error:
                if announce:
                    self._announce(f"Not decoded as the memory plan says. {error} Planned anew.")
        kind = {"itemsize": self.place.dtype.itemsize, "mode": self.wanted.mode}
        try:
            return plan_decode(self.spec, latent_thw, free_bytes=free_bytes, **kind)
        except BudgetError as error:
            plans = list(decode_plans(self.spec, latent_thw, **kind))
            if not plans:
                raise
            if announce:
                self._announce(f"{error} Trying the least plan.")
            return min(plans, key=lambda plan: plan.peak_bytes)

    def _as_planned(
        self, planned: DecodePlan, latent_thw: tuple[int, int, int], free_bytes: int | None
    ) -> DecodePlan:
        """Return the planned way with the bytes of this VAE; raise if it is for another latent or does not fit."""
        if tuple(planned.latent_thw) != latent_thw:
            raise ShapeError(
                f"It is for a latent of {planned.latent_thw} frames, rows and columns; this one has {latent_thw}."
            )
        return plan_decode(
            self.spec, latent_thw, free_bytes=free_bytes, itemsize=self.place.dtype.itemsize, mode=planned.mode,
            chunk=planned.chunk, tiles=planned.tiles,
        )  # fmt: skip

    def _clip(self, index: int, plan: DecodePlan, normalise: Normalise) -> DecodePlan:
        place = self.place
        first = index * pixel_frames(self.clips.shape[2])

        def on_piece(piece: Piece) -> None:
            frames = slice(first + piece.frames.start, first + piece.frames.stop)
            pixels_THWC = piece.pixels_BCTHW[0].movedim(0, -1).float().div_(2).add_(0.5).clamp_(0, 1)
            self.put((frames, piece.rows, piece.columns), pixels_THWC)

        def on_tile(done: int, total: int) -> None:
            self.tick(int(PERCENT * (index + done / max(total, 1)) / len(self.clips)))

        z = self.clips[index : index + 1].to(place.dtype)
        made = {"on_piece": on_piece, "on_tile": on_tile, "device": place.device}
        if self.spec.kind == "flux":
            decoding = Picture(place.network, z, plan, **made)
        else:
            decoding = Decoding(place.network, z, plan, normalise=normalise, **made)

        def to_processor() -> None:
            place.to_processor()
            decoding.replan(decoding.plan, device=PROCESSOR)

        with sound_convolutions(place.device, place.dtype):
            finish(
                decoding, is_out_of_memory=place.is_out_of_memory, free_memory=place.release, to_processor=to_processor,
                announce=self._announce,
            )  # fmt: skip
        return decoding.plan

    def _announce(self, line: str) -> None:
        logger.warning(line)
        self.told.append(line)


class _PeakMeter:
    """What a device's memory held at most since this was made, where the device counts it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = getattr(torch, device.type, None)
        self._counts = hasattr(self._memory, "max_memory_allocated")
        if self._counts:
            self._before = self._memory.memory_allocated(device)
            self._memory.reset_peak_memory_stats(device)

    def told(self, plan: DecodePlan) -> str:
        """Set the measured peak beside that of the plan that ended the work."""
        estimated = f"Peak besides weights: {plan.peak_bytes / GIB:.2f} GiB estimated"
        if not self._counts:
            return f"{estimated}, not measured on this device."
        measured = self._memory.max_memory_allocated(self._device) - self._before
        return f"{estimated}, {measured / GIB:.2f} GiB measured."


def _checked(samples: Tensor, kind: str, channels: int) -> Tensor:
    """Return latents as clips [B,C,T,H,W]; a picture is a clip of one frame to either autoencoder."""
    is_picture = samples.ndim == 4 or (samples.ndim == 5 and samples.shape[2] == 1)
    if samples.ndim not in (4, 5) or samples.shape[1] != channels or (kind == "flux" and not is_picture):
        raise ShapeError(
            f"This VAE takes latents of {channels} channels and {5 if kind == 'hunyuan' else 4} axes; got "
            f"{list(samples.shape)}. Video latents need the HunyuanVideo VAE, picture latents the FLUX one."
        )
    return samples.unsqueeze(2) if samples.ndim == 4 else samples
