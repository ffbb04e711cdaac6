"""Check a whole workflow before anything runs, with ComfyUI's rules, and gather every problem in one report."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

from .catalogue import Catalogue, NodeType, Port
from .graph import Call, Graph, GraphError, Link, needed, order


def check(graph: Graph, types: Catalogue) -> list[Call]:
    """Bring all values to their types and return the calls to run in order; every problem found is in the error.

    Unknown types are refused everywhere, all else is asked only of nodes that an output needs, as in ComfyUI.
    """
    problems = [f"{call}: unknown node type. {_suggest(call.type, types)}" for call in _unknown(graph, types)]
    targets = [call.id for call in graph.values() if call.type in types and types[call.type].is_output]
    for call in needed(graph, targets):
        if call.type in types:
            problems += _problems(call, graph, types)
    if not targets and not problems:
        problems.append("The workflow has no output node (for example Save Video), so there is nothing to run.")
    if problems:
        raise GraphError(problems)
    return order(graph, targets)


def _unknown(graph: Graph, types: Catalogue) -> Iterable[Call]:
    return (call for call in graph.values() if call.type not in types)


def _problems(call: Call, graph: Graph, types: Catalogue) -> list[str]:
    """Check a call by its schema and, if that finds nothing, let the node check the values."""
    return list(_check_call(call, graph, types)) or list(_ask_node(call, types[call.type]))


def _check_call(call: Call, graph: Graph, types: Catalogue) -> Iterable[str]:
    known = types[call.type]
    own_check = _asked_names(known)
    for name, value in call.inputs.items():
        port = known.port(name)
        if port is None:
            yield f"{call}: has no input '{name}'. Its inputs: {', '.join(p.name for p in known.inputs) or 'none'}."
        elif isinstance(value, Link):
            yield from _check_link(call, port, value, graph, types)
        else:
            yield from _check_value(call, port, name not in own_check)
    for port in known.inputs:
        if port.required and port.name not in call.inputs:
            yield f"{call}: input '{port.name}' ({port.type}) is missing. Link something to it."


def _check_link(call: Call, port: Port, link: Link, graph: Graph, types: Catalogue) -> Iterable[str]:
    source = graph.get(link.call)
    if source is None:
        yield f"{call}: input '{port.name}' is linked to node {link.call}, which does not exist."
    elif source.type in types:  # else: reported at the source
        outputs = types[source.type].outputs
        if not 0 <= link.slot < len(outputs):
            yield f"{call}: input '{port.name}' takes output {link.slot} of {source}, which has {len(outputs)}."
        elif not port.accepts(outputs[link.slot]):
            yield f"{call}: input '{port.name}' takes {port.type}, but {source} gives {outputs[link.slot]}."


def _check_value(call: Call, port: Port, with_limits: bool) -> Iterable[str]:
    value = call.inputs[port.name]
    if not port.widget:
        yield f"{call}: input '{port.name}' takes a link ({port.type}), not the value {value!r}."
        return
    try:
        call.inputs[port.name] = value = port.parse(value)
    except (OverflowError, TypeError, ValueError):  # JSON may hold Infinity
        yield f"{call}: {port.name} = {value!r} is not of type {port.type}."
        return
    complaint = port.complaint(value) if with_limits else None
    if complaint:
        yield f"{call}: {port.name}: {complaint}."


def _asked_names(known: NodeType) -> tuple[str, ...]:
    """Return the inputs that the node checks itself, which takes the built-in checks of these off, as in ComfyUI."""
    validate = getattr(known.node, "validate_inputs", None)
    return tuple(inspect.signature(validate).parameters) if validate else ()


def _ask_node(call: Call, known: NodeType) -> Iterable[str]:
    """Let the node check its own inputs; linked ones are None, as in ComfyUI."""
    names = _asked_names(known)
    values: dict[str, Any] = {
        name: None if isinstance(value, Link) else value for name, value in call.inputs.items() if name in names
    }
    if names:
        verdict = known.node.validate_inputs(**values)
        if verdict is not True:
            yield f"{call}: {verdict}"


def _suggest(name: str, types: Catalogue) -> str:
    close = difflib.get_close_matches(name, types, n=3)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return (
        "Outside ComfyUI only this pack's nodes and a few core nodes run ('kandinsky5 nodes' lists them); "
        "mute the node, or run the workflow in ComfyUI."
    )
