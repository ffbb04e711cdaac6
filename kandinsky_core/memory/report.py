"""Estimates and plans as text for people, and as plain values for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..errors import BudgetError
from .budget import GB, PROFILES, cheapest_change, make_plan, needed
from .card import CARDS, run_seconds, time_class
from .estimate import Estimate, Job, estimate
from .plan import Plan

HEADER = ("stage", "weights", "work", "device", "with margin", "main memory", "bus/step", "TFLOP")
ASSUMED = (
    "GB are 10^9 bytes of live tensors; 'with margin' is what should be free. Times assume each card's usual rates and "
    "leave out loading; they are classes, not promises. Nothing here was measured on this machine."
)


def summary(job: Job, *, budget_bytes: int, fixed: Mapping[str, Any] | None = None) -> str:
    """Return the whole report: a table by stage, what fits where, how long it takes, what would make it fit."""
    shape = job.shape
    head = (
        f"{job.row.title}: {shape.width_px} x {shape.height_px}, {shape.frames} frame(s), batch {job.batch}, "
        f"{shape.tokens:,} tokens, {job.precision} weights, "
        + ("dense attention" if not job.is_sparse else f"block-sparse attention keeping {job.kept:.0%}")
    )
    lines = [head, "", f"With {budget_bytes / GB:.1f} GB of device memory:"]
    try:
        plan = make_plan(job, budget_bytes, fixed)
    except BudgetError as error:
        lines += [str(error), change_line(job, budget_bytes, fixed)]
    else:
        found = estimate(job, plan)
        lines += [table(found), plan_line(job, plan), f"Time: {times(found)}."]
    lines += ["", "Cards:", *fit_lines(job, fixed), "", ASSUMED]
    return "\n".join(lines)


def table(found: Estimate) -> str:
    """Return one row a stage, in columns."""
    rows = [HEADER]
    for stage in found.stages:
        sizes = (stage.weight_bytes, stage.work_bytes, stage.device_bytes, needed(stage), stage.host_bytes)
        flops = stage.flops.total * stage.steps / 1e12
        rows.append((stage.name, *map(size, (*sizes, stage.bus_bytes)), f"{flops:,.2f}"))
    return columns(rows)


def size(nbytes: int) -> str:
    """Return bytes in GB, or MB below a tenth of one."""
    return f"{nbytes / GB:.2f} GB" if nbytes >= GB / 10 else f"{nbytes / 10**6:.1f} MB"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return text in columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def fit_lines(job: Job, fixed: Mapping[str, Any] | None = None) -> list[str]:
    """Return for each size of card how the run fits, or what to change."""
    lines = []
    for name, budget_bytes in PROFILES.items():
        try:
            plan = make_plan(job, budget_bytes, fixed)
        except BudgetError:
            lines.append(f"{name}: does not fit. {change_line(job, budget_bytes, fixed)}")
        else:
            lines.append(f"{name}: fits, {plan_line(job, plan)}")
    return lines


def change_line(job: Job, budget_bytes: int, fixed: Mapping[str, Any] | None = None) -> str:
    """Name the cheapest single change that makes the budget fit."""
    change = cheapest_change(job, budget_bytes, fixed)
    if change is None:
        return "No single change is enough: make it both smaller and shorter, or compute on the processor."
    return f"Cheapest change that fits: {change.title} (costs {change.price})."


def plan_line(job: Job, plan: Plan) -> str:
    """Say in one line what a plan does."""
    blocks = job.row.spec.num_visual_blocks
    parts = [
        "all blocks stay on the device"
        if plan.resident_blocks is None
        else f"{plan.resident_blocks} of {blocks} blocks stay on the device"
    ]
    if plan.streams_text:
        parts.append("text encoder layer by layer")
    if plan.hidden_pieces > 1:
        parts.append(f"feed-forward in {plan.hidden_pieces} pieces")
    if plan.head_groups > 1:
        parts.append(f"attention in {plan.head_groups} groups of heads")
    if plan.decode is not None:
        parts.append(f"decode by {plan.decode}")
    return "; ".join(parts)


def times(found: Estimate) -> str:
    """Return the time class of a run on each known card."""
    return ", ".join(f"{card.name} {time_class(run_seconds(found, card))}" for card in CARDS)


def values(job: Job, *, budget_bytes: int, fixed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the report as plain values; `plan` and `stages` are None where nothing fits, `problem` says why."""
    shape = job.shape
    found: dict[str, Any] = {
        "variant": job.row.name, "width": shape.width_px, "height": shape.height_px, "frames": shape.frames,
        "batch": job.batch, "precision": job.precision, "kept": job.kept, "budget_bytes": budget_bytes,
        "plan": None, "stages": None, "problem": None, "time": None,
    }  # fmt: skip
    try:
        plan = make_plan(job, budget_bytes, fixed)
    except BudgetError as error:
        found["problem"] = str(error)
    else:
        estimated = estimate(job, plan)
        found["plan"] = asdict(plan)
        found["stages"] = [
            asdict(stage) | {"device_bytes": stage.device_bytes, "needed_bytes": needed(stage)}
            for stage in estimated.stages
        ]
        found["time"] = {card.name: time_class(run_seconds(estimated, card)) for card in CARDS}
    found["cards"] = {name: _fit(job, budget_bytes, fixed) for name, budget_bytes in PROFILES.items()}
    return found


def _fit(job: Job, budget_bytes: int, fixed: Mapping[str, Any] | None) -> dict[str, Any]:
    try:
        return {"fits": True, "plan": asdict(make_plan(job, budget_bytes, fixed)), "change": None}
    except BudgetError:
        change = cheapest_change(job, budget_bytes, fixed)
        return {"fits": False, "plan": None, "change": change and {"change": change.title, "costs": change.price}}
