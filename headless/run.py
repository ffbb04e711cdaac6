"""Run a checked workflow: call after call, values kept only while someone still needs them."""

from __future__ import annotations

import inspect
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..nodes.host_standalone import Running, StandaloneHost
from .catalogue import Catalogue
from .check import check
from .graph import Call, Graph, Link, needed, to_api

logger = logging.getLogger("kandinsky5")

REPORT = "report"  # name of the text output in which our nodes say what they did


class RunError(RuntimeError):
    """A node that failed while running; the cause is the node's own error."""

    def __init__(self, call: Call, cause: Exception) -> None:
        reason = str(cause) or type(cause).__name__
        super().__init__(f"{call}: {reason}")
        self.call = call


@dataclass(slots=True)
class Result:
    """What a run left behind."""

    files: list[dict[str, Any]] = field(default_factory=list)  # saved files: node, path, kind, size and frames
    reports: dict[str, str] = field(default_factory=dict)  # what nodes had to say, by call id
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)  # what was loaded and sampled, by call id
    seconds: dict[str, float] = field(default_factory=dict)  # wall time, by call id


def run(
    graph: Graph,
    types: Catalogue,
    host: StandaloneHost,
    *,
    workflow: dict[str, Any] | None = None,
    on_call: Callable[[Call, int, int], None] | None = None,
) -> Result:
    """Check `graph`, then run it; `workflow` (the editor's document) is stored in what is saved.

    `on_call(call, index, total)` is told before each node. Wrong input raises `GraphError` before anything runs, a
    failing node raises `RunError`, and `KeyboardInterrupt` passes through.
    """
    calls = check(graph, types)
    uses = Counter(link.call for call in calls for _, link in call.links())
    values: dict[str, Sequence[Any]] = {}
    host.facts = {}  # of this run only: ids mean other nodes in the next one
    result = Result(facts=host.facts)
    for index, call in enumerate(calls):
        if on_call:
            on_call(call, index, len(calls))
        host.running = Running(node=call.id, metadata=_metadata(call, graph, host, workflow))
        inputs = {k: values[v.call][v.slot] if isinstance(v, Link) else v for k, v in call.inputs.items()}
        started = time.perf_counter()
        try:
            with torch.inference_mode():
                output = _execute(types[call.type].node, inputs)
        except Exception as error:
            raise RunError(call, error) from error
        result.seconds[call.id] = time.perf_counter() - started
        del inputs
        given = output.result or ()
        if uses[call.id]:
            values[call.id] = given
        for _, link in call.links():
            uses[link.call] -= 1
            if not uses[link.call]:
                values.pop(link.call, None)
        result.files += [{"node": call.id, **entry} for entry in (output.ui or {}).get("files", ())]
        reports = [v for v, name in zip(given, types[call.type].output_names, strict=False) if name == REPORT]
        if reports:
            result.reports[call.id] = reports[0]
        logger.info("%s: %.2f s", call, result.seconds[call.id])
    return result


def _execute(node: type, inputs: dict[str, Any]) -> Any:
    if inspect.iscoroutinefunction(node.execute):
        raise TypeError("asynchronous nodes run in ComfyUI only")
    return node.execute(**inputs)


def _metadata(
    call: Call, graph: Graph, host: StandaloneHost, workflow: dict[str, Any] | None
) -> dict[str, Any]:
    """Describe how the inputs of `call` came about, in the fields that ComfyUI reads back from a file."""
    sources = {source.id for source in needed(graph, [call.id])}
    facts = {name: found for name, found in host.facts.items() if name in sources}
    fields: dict[str, Any] = {"prompt": to_api(graph), "kandinsky5": {**host.versions(), "nodes": facts}}
    if workflow is not None and "nodes" in workflow:
        fields["workflow"] = workflow
    return fields
