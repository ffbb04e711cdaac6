"""What the node types take and give, read from their schemas: the facts that reading and checking a workflow need."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

WIDGETS = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool, "COMBO": str}
SEED_NAMES = ("seed", "noise_seed")  # the frontend gives these a control widget even when the schema does not ask
TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


@dataclass(frozen=True, slots=True)
class Port:
    """One input of a node type."""

    name: str
    type: str  # ComfyUI's io type; several joined by commas for an input that takes any of them
    required: bool
    widget: bool  # typed in by the user, so it has a place in `widgets_values`
    companion: bool = False  # the frontend's "control after generate" follows and has a value of its own
    default: Any = None
    minimum: float | None = None
    maximum: float | None = None
    options: tuple[Any, ...] | None = None

    def accepts(self, output: str) -> bool:
        """Whether an output of type `output` may be linked here."""
        return "*" in (self.type, output) or not set(self.type.split(",")).isdisjoint(output.split(","))

    def parse(self, value: Any) -> Any:
        """Turn a value as it stands in a file or on a command line into this port's type, or raise ValueError."""
        if self.type == "BOOLEAN" and isinstance(value, str):
            if value.lower() not in TRUE + FALSE:
                raise ValueError(f"{value!r} is neither true nor false")
            return value.lower() in TRUE
        if self.type == "COMBO" or self.type not in WIDGETS:
            return next((option for option in self.options or () if str(option) == str(value)), value)
        return WIDGETS[self.type](value)

    def complaint(self, value: Any) -> str | None:
        """Say what is wrong with the parsed value, or None."""
        if self.options is not None and value not in self.options:
            known = ", ".join(map(str, self.options)) or "nothing (no files found)"
            return f"{value!r} is not one of: {known}"
        if isinstance(value, float) and not math.isfinite(value):  # NaN would pass both limits
            return f"{value} is not a finite number"
        if self.minimum is not None and value < self.minimum:
            return f"{value} is below the smallest allowed value {self.minimum}"
        if self.maximum is not None and value > self.maximum:
            return f"{value} is above the largest allowed value {self.maximum}"
        return None


@dataclass(frozen=True, slots=True)
class NodeType:
    """One node class with its ports."""

    node: type
    name: str
    title: str
    inputs: tuple[Port, ...]
    outputs: tuple[str, ...]  # io types
    output_names: tuple[str, ...]
    is_output: bool

    def port(self, name: str) -> Port | None:
        """Return the input called `name`, or None."""
        return next((port for port in self.inputs if port.name == name), None)


Catalogue = Mapping[str, NodeType]


def _port(declared: Any) -> Port:
    kind = declared.io_type
    options = getattr(declared, "options", None)
    default = getattr(declared, "default", None)
    control = getattr(declared, "control_after_generate", None)
    return Port(
        name=declared.id,
        type=kind,
        required=not declared.optional,
        widget=kind in WIDGETS and not getattr(declared, "force_input", None),
        companion=bool(control or (kind == "INT" and declared.id in SEED_NAMES)),
        default=options[0] if default is None and options else default,
        minimum=getattr(declared, "min", None),
        maximum=getattr(declared, "max", None),
        options=None if options is None else tuple(options),
    )


def node_type(node: type) -> NodeType:
    """Read one node class (ComfyUI's V3 form)."""
    schema = node.define_schema()
    return NodeType(
        node=node,
        name=schema.node_id,
        title=schema.display_name or schema.node_id,
        inputs=tuple(_port(declared) for declared in schema.inputs or ()),
        outputs=tuple(output.io_type for output in schema.outputs or ()),
        output_names=tuple(output.display_name or output.io_type for output in schema.outputs or ()),
        is_output=bool(schema.is_output_node),
    )


def catalogue(nodes: Iterable[type]) -> dict[str, NodeType]:
    """Read node classes by their id."""
    return {read.name: read for read in map(node_type, nodes)}
