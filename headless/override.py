"""Change inputs of a workflow from the command line: `node.input=value`, the node by id, title or type."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .catalogue import Catalogue
from .graph import Call, Graph, GraphError


def override(graph: Graph, types: Catalogue, assignments: Iterable[str]) -> None:
    """Apply all assignments; every one that names no input, or more than one, is in the one `GraphError` raised."""
    problems = [problem for text in assignments if (problem := _apply(graph, types, text))]
    if problems:
        raise GraphError(problems)


def _apply(graph: Graph, types: Catalogue, text: str) -> str | None:
    target, equals, value = text.partition("=")
    if not equals or "." not in target:
        return f"--set {text}: write node.input=value, for example --set 'Kandinsky 5 Sampler.seed=7'."
    targets = [(call, name) for node, name in _splits(target) for call in _named(graph, node)]
    fitting = [(call, name) for call, name in targets if call.type in types and types[call.type].port(name)]
    if len(fitting) > 1:
        several = "; ".join(str(call) for call, _ in fitting)
        example = f"{fitting[0][0].id}.{fitting[0][1]}={value}"
        return f"--set {text}: several nodes are meant: {several}. Use the id, as in {example}."
    if fitting:
        call, name = fitting[0]
        port = types[call.type].port(name)
        if not port.widget:
            return f"--set {text}: '{name}' of {call} takes a link, not a value."
        try:
            call.inputs[name] = port.parse(value)
        except ValueError:
            return f"--set {text}: {value!r} is not of type {port.type}."
        return None
    if targets and targets[0][0].type in types:
        names = ", ".join(port.name for port in types[targets[0][0].type].inputs if port.widget)
        return f"--set {text}: {targets[0][0]} has no input of that name. It has: {names or 'none'}."
    return f"--set {text}: no such node. The workflow has: {'; '.join(map(str, graph.values()))}."


def _splits(target: str) -> Iterator[tuple[str, str]]:
    """Yield all ways to read `a.b.c` as node and input, since both may hold dots."""
    parts = target.split(".")
    return ((".".join(parts[:cut]), ".".join(parts[cut:])) for cut in range(1, len(parts)))


def _named(graph: Graph, name: str) -> list[Call]:
    """Return the call of that id, else all calls of that title, else all of that type."""
    if name in graph:
        return [graph[name]]
    folded = name.casefold()
    titled = [call for call in graph.values() if call.title.casefold() == folded]
    return titled or [call for call in graph.values() if call.type.casefold() == folded]
