"""`kandinsky5 estimate`: read a run off the command line or a workflow file, and say what it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..kandinsky_core.errors import KandinskyError, ShapeError
from ..kandinsky_core.io import identify, open_checkpoint
from ..kandinsky_core.memory.budget import GB, PROFILES
from ..kandinsky_core.memory.estimate import PRECISIONS, Job
from ..kandinsky_core.shapes import VideoShape
from ..kandinsky_core.variants import VARIANTS, Variant, variant
from ..nodes import files
from ..nodes.host import Host
from ..nodes.memory import AUTO, DENSE, KEPT, SPARSE
from ..nodes.size import CUSTOM, SIZES, K5Size
from .graph import Call, Graph, GraphError, Link

SIZED = ("K5EmptyLatent", "K5ImageToVideo", "K5ImageEdit")  # nodes that decide what is sampled
STARTED = SIZED[1:]  # of these, the ones that encode a picture
SET_BY_SAMPLER = (("steps", 0), ("cfg", -1.0))  # and the values that mean "as released"
NAMED = {"width": "width", "height": "height", "frames": "length", "batch": "batch_size"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What the user asked about; None: as the workflow says, else as the model was released."""

    variant: str | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    batch: int | None = None
    precision: str | None = None
    attention: str = AUTO
    kept: float = KEPT
    guidance: float | None = None
    steps: int | None = None
    start_image: bool = False


def job_of(question: Question, graph: Graph | None, *, is_cpu: bool) -> Job:
    """Return the run that is asked about; of a workflow with several samplers the one with most to do."""
    if graph is not None:
        samplers = [call for call in graph.values() if call.type == "K5Sample"]
        if not samplers:
            raise GraphError(["This workflow has no Kandinsky 5 Sampler. Use --variant and sizes instead."])
        jobs = [job_of(_filled(question, sampler, graph), None, is_cpu=is_cpu) for sampler in samplers]
        return max(jobs, key=lambda job: job.shape.tokens * job.batch)
    if question.variant is None:
        raise KandinskyError(f"Say which model with --variant, or give a --workflow. Known: {', '.join(VARIANTS)}.")
    row = variant(question.variant)
    precision = question.precision or "bf16"
    if precision not in PRECISIONS:
        raise KandinskyError(f"Precision '{precision}' is unknown. Possible: {', '.join(PRECISIONS)}.")
    if not 0 < question.kept <= 1:
        raise KandinskyError(f"--kept is a share of the attention, above 0 and up to 1; got {question.kept:g}.")
    batch = 1 if question.batch is None else question.batch
    if batch < 1:
        raise ShapeError(f"A batch has at least 1 clip; got {batch}.")
    height, width = row.sizes[0]
    attention = row.attention.kind if question.attention == AUTO else question.attention
    return Job(
        row=row,
        shape=VideoShape(
            width_px=question.width or width,
            height_px=question.height or height,
            frames=question.frames or row.frames[0],
        ),
        batch=batch,
        precision=precision,
        kept=question.kept if attention == SPARSE else 1.0,
        guidance=question.guidance,
        steps=question.steps,
        has_start=question.start_image or row.needs_image,
        is_cpu=is_cpu,
    )


def budget_of(given: str, host: Host) -> int:
    """Return the bytes that `--budget` means: what is free here, a card of a usual size, or a number of free GB."""
    if given == AUTO:
        if free := host.free_bytes():
            return free
        raise KandinskyError("This device does not tell how much is free. Give --budget in GB, for example 12.")
    if (profile := f"{given} GB") in PROFILES:
        return PROFILES[profile]
    return round(free_gb(given) * GB)


def free_gb(given: str) -> float:
    """Return the number of GB that `--budget` gives."""
    try:
        budget = float(given)
    except ValueError as error:
        raise KandinskyError(f"--budget '{given}' is neither 'auto' nor a number of GB.") from error
    if not 0 < budget < math.inf:
        raise KandinskyError(f"--budget must be above 0 GB; got {given}.")
    return budget


def _filled(question: Question, sampler: Call, graph: Graph) -> Question:
    """Take from a workflow what the question leaves open: a sampler's model, latent and settings."""
    models, latents = _chain(sampler, "model", graph), _chain(sampler, "latent", graph)
    loader, sized = _first(models, ("K5LoadModel",), sampler), _first(latents, SIZED, sampler)
    found: dict[str, Any] = {"start_image": question.start_image or sized.type in STARTED}
    if question.variant is None:
        found["variant"] = _row_of(loader).name
    given = _sizes(sized, graph)
    for name, widget in NAMED.items():
        if getattr(question, name) is None and widget in given:
            if given[widget] is None:
                raise GraphError([f"{sized} takes the size of its picture. Give --width and --height."])
            found[name] = given[widget]
    dtype = loader.inputs.get("dtype", AUTO)
    if question.precision is None and dtype != AUTO:
        found["precision"] = "fp8" if str(dtype).startswith("fp8") else dtype
    steps, guidance = (_value(sampler.inputs.get(name, automatic), graph) for name, automatic in SET_BY_SAMPLER)
    if question.steps is None and steps > 0:
        found["steps"] = steps
    if question.guidance is None and guidance >= 0:
        found["guidance"] = guidance
    if question.attention == AUTO and not any(call.type == "K5Nabla" for call in models):
        found["attention"] = DENSE
    return replace(question, **found)


def _sizes(sized: Call, graph: Graph) -> dict[str, Any]:
    """Return the sizes that a node sets by their widgets' names, None for what only its picture tells."""
    found = {widget: _value(sized.inputs[widget], graph) for widget in NAMED.values() if widget in sized.inputs}
    label = sized.inputs.get("size", CUSTOM)
    if label == CUSTOM:
        return found
    width, height = SIZES.get(label) or (None, None)
    return found | {"width": width, "height": height}


def _chain(call: Call, name: str, graph: Graph) -> list[Call]:
    """Return the nodes that a value of a call comes through, the nearest first, as far as inputs of that name lead."""
    found = []
    while isinstance(link := call.inputs.get(name), Link) and link.call in graph and len(found) < len(graph):
        call = graph[link.call]
        found.append(call)
    return found


def _first(calls: list[Call], kinds: tuple[str, ...], sampler: Call) -> Call:
    for call in calls:
        if call.type in kinds:
            return call
    raise GraphError([f"{sampler} takes nothing from {' or '.join(kinds)}. Use --variant and sizes instead."])


def _value(given: Any, graph: Graph) -> Any:
    """Return a plain value; of links only those to Size & Length can be followed without running the workflow."""
    if not isinstance(given, Link):
        return given
    call = graph.get(given.call)
    if call is None or call.type != "K5Size" or any(call.links()):
        raise GraphError([f"A value comes from {call or given.call}, which only a run can tell. Give it as an option."])
    return K5Size.execute(**call.inputs)[given.slot]


def _row_of(loader: Call) -> Variant:
    """Return the row a loader will recognise: as chosen, from the file where it is there, else from its usual name."""
    chosen, name = loader.inputs.get("variant", AUTO), str(loader.inputs.get("model_name", ""))
    if chosen != AUTO:
        return variant(chosen)
    file = Path(name).name
    if rows := [row for row in VARIANTS.values() if file in row.files]:
        return rows[0]
    return identify(open_checkpoint(files.locate(files.MODEL, name))).variant
