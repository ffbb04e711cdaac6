"""Encode by plan under both hosts.

Legend: B batch, C channels, T frames (of pixels or latents), H rows, W columns.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ..kandinsky_core.errors import BudgetError
from ..kandinsky_core.shapes import VAE_SPATIAL, latent_frames
from ..kandinsky_core.vae.convolution import sound_convolutions
from ..kandinsky_core.vae.encoding import encode_with
from ..kandinsky_core.vae.moments import Moments
from ..kandinsky_core.vae.plan import EncodePlan, needed_bytes, plan_encode
from ..kandinsky_core.vae.rescue import FAILURES
from .host import Workplace

logger = logging.getLogger("kandinsky5")

SMALLER = 0.85  # of the plan that ran out: a step must be felt
PERCENT = 100


@torch.no_grad()
def encode(place: Workplace, image_THWC: Tensor, tick: Callable[[int], None]) -> Tensor:
    """Encode one clip 0…1 [T,H,W,3] to raw latents [1,16,t,h,w] (video), or T pictures to [T,16,h,w] (image).

    The latent is the mean of the posterior, so the same pictures give the same latents. When memory runs out it is
    done again with less, at last on the processor. `tick` is told of every percent.
    """
    pixels_TCHW = image_THWC[..., :3].movedim(-1, 1) * 2 - 1
    if place.network.spec.kind == "hunyuan":
        return _finish(place, pixels_TCHW.movedim(0, 1)[None], tick).mode().float()
    pictures = pixels_TCHW.split(1)
    share = len(pictures)
    made = [
        _finish(place, picture, lambda done, at=index: tick((PERCENT * at + done) // share)).mode()
        for index, picture in enumerate(pictures)
    ]
    return torch.cat(made).float()


def _finish(place: Workplace, pixels: Tensor, tick: Callable[[int], None]) -> Moments:
    """Encode with the best plan that fits, and with less each time memory runs out."""
    plan = _plan(place, pixels, None)
    place.make_room(needed_bytes(plan.peak_bytes))
    plan = _plan(place, pixels, place.free_bytes() or None) or plan  # estimates are careful, and there is a way on
    on_processor = False
    while True:
        try:
            with sound_convolutions(place.device, place.dtype):
                return _once(place, pixels, plan, tick)
        except FAILURES as error:
            if on_processor or not place.is_out_of_memory(error):
                raise
        # Not inside the handler: the traceback keeps the tensors of the attempt that failed.
        place.release()
        less = _plan(place, pixels, int(SMALLER * needed_bytes(plan.peak_bytes)))
        if less is None:
            logger.warning("Out of memory while encoding (%s): doing it again on the processor, which is slow.", plan)
            place.to_processor()
            on_processor = True
        else:
            logger.warning("Out of memory while encoding (%s): doing it again with %s.", plan, less)
            plan = less


def _once(place: Workplace, pixels: Tensor, plan: EncodePlan, tick: Callable[[int], None]) -> Moments:
    def on_tile(done: int, total: int) -> None:
        tick(PERCENT * done // max(total, 1))

    pixels = pixels.to(place.dtype)
    if place.network.spec.kind == "flux":
        moments = place.network.encode(pixels.to(place.device), on_tile=on_tile)
        return Moments(moments.mean.to(pixels.device), moments.logvar.to(pixels.device))
    return encode_with(place.network, pixels, plan, on_tile=on_tile, device=place.device)


def _plan(place: Workplace, pixels: Tensor, free_bytes: int | None) -> EncodePlan | None:
    """Return the best plan within `free_bytes`, None if there is none."""
    frames = pixels.shape[2] if pixels.ndim == 5 else 1
    latent_thw = (latent_frames(frames), *(side // VAE_SPATIAL for side in pixels.shape[-2:]))
    try:
        return plan_encode(place.network.spec, latent_thw, free_bytes=free_bytes, itemsize=place.dtype.itemsize)
    except BudgetError:
        return None
