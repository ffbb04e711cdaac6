"""Read workflow files in both of ComfyUI's formats: the editor's (nodes, links, widget values) and the API's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .catalogue import Catalogue, NodeType
from .graph import Call, Graph, GraphError, Link

ANNOTATIONS = ("Note", "MarkdownNote")  # text on the canvas; nothing runs
PRIMITIVE = "PrimitiveNode"  # a widget of its own, linked into other nodes' widgets
REROUTE = "Reroute"
MUTED, BYPASSED = 2, 4  # values of a node's `mode`
SUBGRAPH_INPUT, SUBGRAPH_OUTPUT = -10, -20  # ids of a subgraph's two boundary nodes


def read_document(path: Path) -> dict[str, Any]:
    """Read a workflow file as JSON, or raise `GraphError` saying why it cannot be one."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GraphError([f"Cannot read {path}: {error.strerror}."]) from error
    except ValueError as error:
        raise GraphError([f"{path} is not a workflow file: it holds no valid JSON ({error})."]) from error
    if not isinstance(document, dict):
        raise GraphError([f"{path} is not a workflow file: its top level is not a JSON object."])
    return document


def parse(document: dict[str, Any], types: Catalogue) -> Graph:
    """Read a workflow document of either format."""
    try:
        return _parse(document, types)
    except GraphError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__} {error}"
        raise GraphError([f"The workflow is damaged: its nodes or links are incomplete ({reason})."]) from error


def _parse(document: dict[str, Any], types: Catalogue) -> Graph:
    if isinstance(document.get("nodes"), list):
        return _Editor(document, types).graph()
    if document and all(isinstance(entry, dict) and "class_type" in entry for entry in document.values()):
        return _parse_api(document, types)
    raise GraphError(
        ["This JSON is neither a workflow saved by the editor (it has 'nodes') nor one in API format ('class_type')."]
    )


def _parse_api(document: dict[str, Any], types: Catalogue) -> Graph:
    graph: Graph = {}
    for name, entry in document.items():
        inputs = {
            key: Link(str(value[0]), value[1]) if _is_api_link(value) else value
            for key, value in entry.get("inputs", {}).items()
        }
        kind = entry["class_type"]
        title = entry.get("_meta", {}).get("title") or _title(kind, types)
        graph[str(name)] = Call(id=str(name), type=kind, title=title, inputs=inputs)
    return graph


def _title(kind: str, types: Catalogue) -> str:
    return types[kind].title if kind in types else kind


def _is_api_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[1], int) and isinstance(value[0], str)


class _Scope:
    """One level of the canvas: the workflow itself, or a subgraph seen from the node that stands for it."""

    def __init__(self, level: dict[str, Any], prefix: str = "", outer: tuple[_Scope, dict] | None = None) -> None:
        self.level = level
        self.prefix = prefix
        self.outer = outer
        self.nodes = {node["id"]: node for node in level["nodes"]}
        self.links = {link[0]: link for link in map(_link_fields, level.get("links", ()))}


def _link_fields(link: Any) -> tuple[int, int, int, int, int]:
    """Return (id, source node, source slot, target node, target slot); links are lists at the top, objects below."""
    if isinstance(link, dict):
        return (link["id"], link["origin_id"], link["origin_slot"], link["target_id"], link["target_slot"])
    return tuple(link[:5])


class _Editor:
    """Reads the editor's format; subgraphs are opened, reroutes, muted and bypassed nodes resolved."""

    def __init__(self, document: dict[str, Any], types: Catalogue) -> None:
        self.types = types
        self.top = _Scope(document)
        self.subgraphs = {s["id"]: s for s in document.get("definitions", {}).get("subgraphs", ())}
        self.problems: list[str] = []

    def graph(self) -> Graph:
        graph = {call.id: call for scope, node in self._nodes(self.top) for call in [self._call(scope, node)]}
        if self.problems:
            raise GraphError(self.problems)
        return graph

    def _nodes(self, scope: _Scope) -> Iterator[tuple[_Scope, dict]]:
        """Yield the nodes that run, with the scope they lie in."""
        for node in scope.nodes.values():
            if node.get("mode", 0) in (MUTED, BYPASSED) or node["type"] in (*ANNOTATIONS, PRIMITIVE, REROUTE):
                continue
            if node["type"] in self.subgraphs:
                yield from self._nodes(self._inside(scope, node))
            else:
                yield scope, node

    def _inside(self, scope: _Scope, node: dict) -> _Scope:
        return _Scope(self.subgraphs[node["type"]], f"{scope.prefix}{node['id']}:", (scope, node))

    def _call(self, scope: _Scope, node: dict) -> Call:
        known = self.types.get(node["type"])
        title = node.get("title") or _title(node["type"], self.types)
        call = Call(id=f"{scope.prefix}{node['id']}", type=node["type"], title=title)
        if known:  # an unknown type is reported, with all others, when the graph is checked
            call.inputs |= self._widget_values(call, known, node.get("widgets_values") or [])
        for socket in node.get("inputs", ()):
            if socket.get("link") is not None:
                source = self._source(scope, socket["link"])
                if source is not None:
                    call.inputs[socket["name"]] = source
        return call

    def _widget_values(self, call: Call, known: NodeType, values: list | dict) -> dict[str, Any]:
        """Name the values, which the file lists in the schema's order; missing ones at the end take the default."""
        widgets = [port for port in known.inputs if port.widget]
        if isinstance(values, dict):
            return {port.name: values.get(port.name, port.default) for port in widgets}
        rest = list(values)
        named = {}
        for port in widgets:
            if rest or port.required:
                named[port.name] = rest.pop(0) if rest else port.default
            if port.companion and rest:
                rest.pop(0)
        if rest:
            names = ", ".join(port.name for port in widgets)
            self.problems.append(
                f"{call}: the file holds {len(values)} widget values, {len(rest)} more than its widgets take "
                f"({names}). It was saved by another version of this node: load it in ComfyUI and save it again."
            )
        return named

    def _source(self, scope: _Scope, link: int) -> Any:
        """Follow a link back to what feeds it: a `Link` to a node that runs, a plain value, or None for nothing."""
        if link not in scope.links:
            self.problems.append(f"Link {link} is used by a node but not listed in the file's links.")
            return None
        _, source, slot, *_ = scope.links[link]
        if source == SUBGRAPH_INPUT:
            outer, node = scope.outer
            name = scope.level["inputs"][slot]["name"]
            return self._socket(outer, next((s for s in node.get("inputs", ()) if s["name"] == name), {}))
        node = scope.nodes[source]
        if node.get("mode", 0) == MUTED:
            return None
        if node.get("mode", 0) == BYPASSED:
            return self._socket(scope, _bypass(node, slot))
        if node["type"] == REROUTE:
            return self._socket(scope, node["inputs"][0])
        if node["type"] == PRIMITIVE:
            return node["widgets_values"][0]
        if node["type"] in self.subgraphs:
            inside = self._inside(scope, node)
            end = (SUBGRAPH_OUTPUT, slot)
            found = next((link for link, _, _, *target in inside.links.values() if tuple(target) == end), None)
            return None if found is None else self._source(inside, found)
        return Link(f"{scope.prefix}{source}", slot)

    def _socket(self, scope: _Scope, socket: dict) -> Any:
        return None if socket.get("link") is None else self._source(scope, socket["link"])


def _bypass(node: dict, slot: int) -> dict:
    """Return the input that stands in for output `slot` of a bypassed node: the one beside it, else the first alike."""
    wanted = node["outputs"][slot]["type"]
    sockets = node.get("inputs", [])
    beside = sockets[slot : slot + 1]
    return next((socket for socket in beside + sockets if socket["type"] == wanted), {})
