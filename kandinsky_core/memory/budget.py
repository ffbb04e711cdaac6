"""From a budget to a plan: what stays, what travels, in which pieces; and what to change when nothing fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import BudgetError, KandinskyError
from ..shapes import VideoShape, snap_frames, snap_side
from ..vae.plan import needed_bytes
from .estimate import PRECISIONS, Job, Stage, decode_plan, encode_plan, sample_stage, text_stage
from .plan import Plan

GB = 10**9
# What a card of that size has left for a run: the desktop, the driver and the context take the rest.
PROFILES = {"8 GB": 7 * GB, "12 GB": 11 * GB, "16 GB": 148 * GB // 10, "24 GB": 225 * GB // 10}
PIECES = (1, 8, 16)  # of the hidden tensor
GROUPS = (1, 2, 4, 8)  # of heads
SMALLER = (7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4)  # of a length or a side
SETTINGS = ("resident_blocks", "prefetch", "streams_text", "hidden_pieces", "head_groups", "decode_mode")


def needed(stage: Stage) -> int:
    """Free device memory that makes room for a stage: its weights, and its live bytes with a margin."""
    return stage.weight_bytes + needed_bytes(stage.work_bytes)


def make_plan(job: Job, budget_bytes: int, fixed: Mapping[str, Any] | None = None) -> Plan:
    """Choose the plan that costs least among those that fit; `fixed` are fields of `Plan` that are not to be chosen.

    Everything stays on the device if it fits. If not, the hidden tensor is cut, then blocks travel (as few as
    possible), then attention runs by groups of heads. Raises `BudgetError` with the least need if nothing fits.
    """
    fixed = dict(fixed or {})
    if unknown := fixed.keys() - set(SETTINGS):
        raise KandinskyError(f"A plan has no {', '.join(sorted(unknown))}. Its settings are {', '.join(SETTINGS)}.")
    if job.precision not in PRECISIONS:
        raise KandinskyError(f"Precision '{job.precision}' is unknown. Possible: {', '.join(PRECISIONS)}.")
    plan = Plan(budget_bytes=budget_bytes, **fixed)
    plan = _first_that_fits(job, _text_plans(plan, fixed), text_stage)
    if job.has_start:
        plan = replace(plan, encode=encode_plan(job, plan))
    plan = _first_that_fits(job, _sample_plans(job, plan, fixed), sample_stage)
    return replace(plan, decode=decode_plan(job, plan))


def make_sample_plan(job: Job, budget_bytes: int) -> Plan:
    """Choose as `make_plan` does for the sampling alone; text and pixels are left to their own planning."""
    return _first_that_fits(job, _sample_plans(job, Plan(budget_bytes=budget_bytes), {}), sample_stage)


def _text_plans(plan: Plan, fixed: Mapping[str, Any]) -> Iterator[Plan]:
    for streams in [fixed["streams_text"]] if "streams_text" in fixed else [False, True]:
        yield replace(plan, streams_text=streams)


def _sample_plans(job: Job, plan: Plan, fixed: Mapping[str, Any]) -> Iterator[Plan]:
    """Ways to sample, by what they cost."""

    def choices(name: str, others: tuple[int, ...]) -> tuple[int, ...]:
        return (fixed[name],) if name in fixed else others

    blocks = job.row.spec.num_visual_blocks
    groups = tuple(count for count in GROUPS if job.row.spec.heads % count == 0)
    for resident in choices("resident_blocks", (blocks,)):
        for pieces in choices("hidden_pieces", PIECES):
            kept = None if resident == blocks else resident
            yield replace(plan, resident_blocks=kept, hidden_pieces=pieces, head_groups=choices("head_groups", (1,))[0])
    for count in choices("head_groups", groups):
        cut = replace(plan, hidden_pieces=choices("hidden_pieces", PIECES)[-1], head_groups=count)
        for resident in choices("resident_blocks", tuple(range(blocks - 1, -1, -1))):
            yield replace(cut, resident_blocks=resident)


def _first_that_fits(job: Job, plans: Iterator[Plan], stage_of: Callable[[Job, Plan], Stage]) -> Plan:
    least: tuple[int, Stage] | None = None
    for plan in plans:
        stage = stage_of(job, plan)
        wanted = needed(stage)
        if wanted <= plan.budget_bytes:
            return plan
        if least is None or wanted < least[0]:
            least = wanted, stage
    assert least is not None  # every list of plans has at least one
    shape = job.shape
    raise BudgetError(
        f"{job.row.title}, {shape.width_px} x {shape.height_px}, {shape.frames} frame(s), batch {job.batch}: stage "
        f"'{least[1].name}' needs at least {least[0] / GB:.1f} GB of device memory in every way that is allowed; "
        f"the budget is {plan.budget_bytes / GB:.1f} GB. Take a smaller size, fewer frames, a smaller batch or lighter "
        "weights, or leave the settings on automatic."
    )


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a run, what it costs, and the run as it would be."""

    title: str
    price: str
    job: Job
    fixed: Mapping[str, Any]


def changes(job: Job, fixed: Mapping[str, Any] | None = None) -> Iterator[Change]:
    """Single changes that make a run need less, the cheapest first."""
    fixed = dict(fixed or {})
    for name in SETTINGS:
        if name in fixed:
            rest = {key: value for key, value in fixed.items() if key != name}
            yield Change(f"leave {name} automatic", "nothing but time", job, rest)
    if job.in_one_batch and job.passes > 1:
        yield Change("both prompts one after the other", "nothing but time", replace(job, in_one_batch=False), fixed)
    for batch in range(job.batch - 1, 0, -1):
        yield Change(f"batch {batch}", "more runs", replace(job, batch=batch), fixed)
    for name in ("fp8", "q8_0", "q4_k"):
        if PRECISIONS[name].weight < PRECISIONS[job.precision].weight:
            yield Change(f"{name} weights", "another file, a little precision", replace(job, precision=name), fixed)
    shape = job.shape
    for share in SMALLER:
        frames = snap_frames(round(shape.frames * share))
        if frames < shape.frames:
            shorter = replace(job, shape=replace(shape, frames=frames))
            yield Change(f"{frames} frames instead of {shape.frames}", "a shorter clip", shorter, fixed)
    for share in SMALLER:
        width, height = (snap_side(round(side * share)) for side in (shape.width_px, shape.height_px))
        smaller = VideoShape(width_px=width, height_px=height, frames=shape.frames)
        if smaller.tokens < shape.tokens:
            yield Change(f"{width} x {height} pixels", "a smaller picture", replace(job, shape=smaller), fixed)


def cheapest_change(job: Job, budget_bytes: int, fixed: Mapping[str, Any] | None = None) -> Change | None:
    """Return the first change after which a plan fits the budget, None when no single one is enough."""
    for change in changes(job, fixed):
        try:
            make_plan(change.job, budget_bytes, change.fixed)
        except BudgetError:
            continue
        return change
    return None


def describe(job: Job, plan: Plan) -> str:
    """Say what a plan does, one line a choice."""
    lines = [
        f"Budget: {plan.budget_bytes / GB:.1f} GB",
        f"Text encoder: {'layer by layer' if plan.streams_text else 'as a whole'}",
        *describe_sampling(job, plan),
    ]
    if plan.encode is not None:
        lines.append(f"Encode: {plan.encode}")
    if plan.decode is not None:
        lines.append(f"Decode: {plan.decode}")
    return "\n".join(lines)


def describe_sampling(job: Job, plan: Plan) -> list[str]:
    """Say how a plan samples."""
    blocks = job.row.spec.num_visual_blocks
    kept = blocks if plan.resident_blocks is None else min(blocks, plan.resident_blocks)
    sample = sample_stage(job, plan)
    stays = (
        f"all {blocks} blocks stay on the device"
        if kept == blocks
        else f"{kept} of {blocks} blocks stay on the device, {sample.bus_bytes / GB:.1f} GB travel in each step, "
        f"{plan.prefetch} block(s) ahead"
    )
    return [
        f"Weights: {job.precision}, {stays}",
        f"Feed-forward: at least {plan.hidden_pieces} piece(s) of the hidden tensor",
        f"Attention: {'all heads at once' if plan.head_groups == 1 else f'{plan.head_groups} groups of heads'}",
    ]
