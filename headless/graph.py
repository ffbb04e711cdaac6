"""A workflow as calls of nodes: what both file formats are read into, and the order in which the calls run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..kandinsky_core.errors import KandinskyError


@dataclass(frozen=True, slots=True)
class Link:
    """An input that takes output number `slot` of another call."""

    call: str
    slot: int


@dataclass(slots=True)
class Call:
    """One node of the workflow: its type and its inputs, each a plain value or a `Link`."""

    id: str
    type: str
    title: str
    inputs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Name the node the way a user finds it on the canvas."""
        named = f" '{self.title}'" if self.title != self.type else ""
        return f"node {self.id}{named} ({self.type})"

    def links(self) -> Iterable[tuple[str, Link]]:
        """Yield the linked inputs with their names."""
        return ((name, value) for name, value in self.inputs.items() if isinstance(value, Link))


Graph = dict[str, Call]


class GraphError(KandinskyError):
    """A workflow that cannot be run; `problems` holds one line for each thing that is wrong."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


def order(graph: Graph, targets: Iterable[str]) -> list[Call]:
    """Return the calls that `targets` need, each after those it takes values from; a cycle raises `GraphError`."""
    done: dict[str, Call] = {}
    waiting: list[str] = []

    def visit(name: str) -> None:
        if name in done:
            return
        if name in waiting:
            ring = " -> ".join([*waiting[waiting.index(name) :], name])
            raise GraphError([f"The nodes {ring} form a cycle. Remove one of these links."])
        waiting.append(name)
        for _, link in graph[name].links():
            visit(link.call)
        done[waiting.pop()] = graph[name]

    for target in targets:
        visit(target)
    return list(done.values())


def needed(graph: Graph, targets: Iterable[str]) -> list[Call]:
    """Return the targets and all calls that feed them, as far as they exist, in the graph's order."""
    found: set[str] = set()
    waiting = list(targets)
    while waiting:
        name = waiting.pop()
        if name in graph and name not in found:
            found.add(name)
            waiting += [link.call for _, link in graph[name].links()]
    return [call for call in graph.values() if call.id in found]


def to_api(graph: Graph) -> dict[str, Any]:
    """Write the graph in ComfyUI's API format, as it is stored in a clip's metadata."""
    return {
        call.id: {
            "class_type": call.type,
            "inputs": {k: [v.call, v.slot] if isinstance(v, Link) else v for k, v in call.inputs.items()},
            "_meta": {"title": call.title},
        }
        for call in graph.values()
    }
