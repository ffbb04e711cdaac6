"""Finish a decode that runs out of memory: take the next smaller plan and go on where it stopped."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from ..shapes import pixel_frames
from ..variants import VAESpec
from .plan import REFERENCE, SINGLE_PASS, DecodePlan, smaller

# What running out of memory is raised as: torch's own errors are RuntimeErrors, on a processor as well.
FAILURES = (RuntimeError, MemoryError)


class Decoder(Protocol):
    """The part of an autoencoder that is asked here."""

    spec: VAESpec


class Resumable(Protocol):
    """A decode that after an exception stands where it stood before the piece that failed."""

    vae: Decoder
    plan: DecodePlan
    frames_done: int

    def run(self) -> None:
        """Go on to the end from where it stands."""
        ...

    def replan(self, plan: DecodePlan) -> None:
        """Go on under another plan."""
        ...


def finish(
    decoding: Resumable,
    *,
    is_out_of_memory: Callable[[BaseException], bool],
    free_memory: Callable[[], None],
    to_processor: Callable[[], None],
    announce: Callable[[str], None],
) -> None:
    """Run a decoding to its end; every time memory runs out, go on with less of it and `announce` a line.

    After the least plan `to_processor` moves the autoencoder, and what the decoding holds, to the processor. Errors of
    other kinds, and what the processor itself runs out of, pass through.
    """
    on_processor = False
    plan = decoding.plan
    change: Callable[[], None] | None = None
    while True:
        try:
            if change is not None:
                change()  # moves tensors, so memory can run out here as well
            decoding.run()
            return
        except FAILURES as error:
            if on_processor or not is_out_of_memory(error):
                raise
        # Not inside the handler: the traceback keeps the tensors of the piece that failed.
        free_memory()
        less = smaller(plan, decoding.vae.spec)
        where = f"Out of memory after {decoding.frames_done} of {pixel_frames(plan.latent_thw[0])} frames ({plan})."
        if less is None:
            announce(
                f"{where} There is no smaller plan: going on from there on the processor, which is slow."
            )
            change, on_processor = to_processor, True
        else:
            announce(f"{where} Going on from there with {less}. {cost(plan, less)}")
            change, plan = partial(decoding.replan, less), less


def cost(plan: DecodePlan, less: DecodePlan) -> str:
    """Say what going on with `less` costs: time, copies and, where the modes differ in it, the picture."""
    costs = []
    if plan.mode == REFERENCE:
        costs.append("the clip's beginning is computed once more")
    elif less.work > plan.work:
        costs.append(f"{less.work / plan.work - 1:.0%} more work")
    elif less.chunk < plan.chunk:
        costs.append("more and smaller steps")
    if less.caches_on_host and not plan.caches_on_host:
        costs.append("copies to and from main memory")
    if plan.mode in (REFERENCE, SINGLE_PASS):
        costs.append("brightness may change slightly from here on")
    else:
        costs.append("none in the picture")
    return f"Cost: {', '.join(costs)}."
