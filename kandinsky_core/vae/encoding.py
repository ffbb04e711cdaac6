"""Encode a clip in bounded memory: the first frame alone, then multiples of four frames, each layer with its past."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import ShapeError
from ..shapes import VAE_SPATIAL, VAE_TEMPORAL, latent_frames, pixel_frames
from .convolution import sound_convolutions
from .hunyuan import HunyuanVideoVAE, check_pixels
from .moments import Moments
from .plan import REFERENCE, STREAM, EncodePlan
from .region import Region
from .sampled import source_for
from .stages import encoder_stages
from .statistics import Given, Recorded, Source, Statistics
from .stream import Pace, Stream
from .tiling import OnTile, first_frame, sampled_latents, samples


@torch.no_grad()
def encode_with(
    vae: HunyuanVideoVAE,
    x_BCTHW: Tensor,
    plan: EncodePlan,
    *,
    statistics: Statistics | None = None,
    on_tile: OnTile | None = None,
    device: torch.device | None = None,
) -> Moments:
    """Encode by plan to moments, which lie where the pixels lie.

    `x_BCTHW` has the type to compute in and may lie in main memory. Without statistics those of a few windows are
    taken, or the clip's own where one chunk holds it all.
    """
    check_pixels(x_BCTHW)
    latents = latent_frames(x_BCTHW.shape[2])
    _check_plan(plan, (latents, *(side // VAE_SPATIAL for side in x_BCTHW.shape[3:])))
    device = device or _home(vae)
    if plan.mode == REFERENCE:
        moments = vae.encode(x_BCTHW.to(device), on_tile=on_tile)
        return Moments(moments.mean.to(x_BCTHW.device), moments.logvar.to(x_BCTHW.device))
    sampling = statistics is None and latents > plan.chunk
    done, total = 0, latents + sampling * sampled_latents(latents)

    def tick(count: int) -> None:
        nonlocal done
        done += count
        if on_tile is not None:
            on_tile(done, total)

    if sampling:
        statistics = sampled_encode_statistics(vae, x_BCTHW, plan, device=device, on_latents=tick)
    source = Recorded() if statistics is None else Given(statistics.to(device))
    return Moments.split(_encoded(vae, x_BCTHW, plan, source, device, tick))


def exact_encode_statistics(
    vae: HunyuanVideoVAE, x_BCTHW: Tensor, *, device: torch.device | None = None
) -> Statistics:
    """Record what the norms compute when the whole clip is encoded in one pass, in that pass's memory."""
    _, _, frames, height, width = x_BCTHW.shape
    latent_thw = (latent_frames(frames), height // VAE_SPATIAL, width // VAE_SPATIAL)
    plan = EncodePlan(mode=STREAM, latent_thw=latent_thw, chunk=latent_thw[0])
    source = Recorded()
    _encoded(vae, x_BCTHW, plan, source, device or _home(vae), lambda _: None)
    return source.statistics


def sampled_encode_statistics(
    vae: HunyuanVideoVAE,
    x_BCTHW: Tensor,
    plan: EncodePlan,
    *,
    device: torch.device | None = None,
    on_latents: Callable[[int], None] | None = None,
) -> Statistics:
    """Estimate the clip's statistics from a few windows, in the memory of an encode under `plan`."""
    latents = latent_frames(x_BCTHW.shape[2])
    source = source_for(latents)
    for sample in samples(latents):
        source.enter(sample.window, is_look=sample.is_look)
        start = VAE_TEMPORAL * sample.frames.start  # a window begins with a lone frame, as a clip does
        x = x_BCTHW[:, :, start : start + pixel_frames(sample.latents)]
        _encoded(vae, x, plan, source, device or _home(vae), on_latents or (lambda _: None))
    return source.statistics


@torch.no_grad()
def _encoded(
    vae: HunyuanVideoVAE,
    x_BCTHW: Tensor,
    plan: EncodePlan,
    source: Source,
    device: torch.device,
    on_latents: Callable[[int], None],
) -> Tensor:
    latents = latent_frames(x_BCTHW.shape[2])
    frame = Region(0, x_BCTHW.shape[3], 0, x_BCTHW.shape[4])
    stages = encoder_stages(vae, torch.empty(0, dtype=x_BCTHW.dtype, device=device), latents)
    stream = Stream(stages=stages, core=frame, frame=frame, latents=latents)
    pace = Pace(chunk=plan.chunk, caches_on_host=plan.caches_on_host, device=device, source=source)
    out: list[Tensor] = []
    # A clip that one chunk holds goes through at once, so that norms without given statistics see all of it.
    edges = [0, latents] if latents <= plan.chunk else [0, *range(1, latents, plan.chunk), latents]
    for start, stop in pairwise(edges):
        stream.feed(x_BCTHW[:, :, first_frame(start, VAE_TEMPORAL) : first_frame(stop, VAE_TEMPORAL)])
        with sound_convolutions(device, x_BCTHW.dtype):
            stream.drain(pace, lambda x, _: out.append(x.to(x_BCTHW.device)))
        on_latents(stop - start)
    return torch.cat(out, 2)


def _home(vae: HunyuanVideoVAE) -> torch.device:
    return vae.encoder.conv_in.conv.weight.device


def _check_plan(plan: EncodePlan, latent_thw: tuple[int, ...]) -> None:
    if tuple(plan.latent_thw) != latent_thw:
        raise ShapeError(
            f"The plan is for a latent of {plan.latent_thw} frames, rows and columns, the clip's is {latent_thw}. "
            "Make the plan from the clip."
        )
    if plan.mode not in (REFERENCE, STREAM) or plan.chunk < 1:
        raise ShapeError(
            f"Encoding in mode {plan.mode!r} with chunks of {plan.chunk} is not possible: "
            f"use {REFERENCE!r} or {STREAM!r}, chunks from 1."
        )
