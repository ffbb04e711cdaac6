"""A small stand-in for the classes of `comfy_api.latest.io` that our nodes use, for runs without ComfyUI."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


class Input:
    """A socket of a node; `io_type` is the type's name on the wire."""

    io_type = "*"

    def __init__(
        self, id: str, display_name: str | None = None, optional: bool = False, tooltip: str | None = None
    ):
        self.id = id
        self.display_name = display_name
        self.optional = optional
        self.tooltip = tooltip


class WidgetInput(Input):
    """An input with a widget: a value that a workflow file stores."""

    def __init__(
        self,
        id: str,
        display_name: str | None = None,
        optional: bool = False,
        tooltip: str | None = None,
        default: Any = None,
        advanced: bool = False,
        **options: Any,
    ):
        super().__init__(id, display_name, optional, tooltip)
        self.default = default
        self.advanced = advanced
        self.min = options.get("min")
        self.max = options.get("max")
        self.step = options.get("step")
        self.multiline = options.get("multiline", False)
        self.control_after_generate = options.get("control_after_generate", False)
        self.force_input = options.get("force_input", False)


class ComboInput(WidgetInput):
    """A choice out of `options`."""

    io_type = "COMBO"

    def __init__(self, id: str, options: list[str], **rest: Any):
        super().__init__(id, **rest)
        self.options = options


class Output:
    """A result of a node."""

    io_type = "*"

    def __init__(self, id: str | None = None, display_name: str | None = None, tooltip: str | None = None):
        self.id = id
        self.display_name = display_name or id
        self.tooltip = tooltip


def _io_type(name: str, base: type[Input] = Input) -> SimpleNamespace:
    return SimpleNamespace(
        io_type=name,
        Input=type("Input", (base,), {"io_type": name}),
        Output=type("Output", (Output,), {"io_type": name}),
    )


@dataclass
class Schema:
    """Definition of a node: the same field names as core's."""

    node_id: str
    display_name: str | None = None
    category: str = ""
    inputs: list[Input] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    description: str = ""
    search_aliases: list[str] = field(default_factory=list)
    is_output_node: bool = False
    is_experimental: bool = False
    is_deprecated: bool = False
    not_idempotent: bool = False
    hidden: list[str] = field(default_factory=list)


class NodeOutput:
    """What `execute` returns: one value per declared output, optionally something to show."""

    def __init__(self, *args: Any, ui: dict[str, Any] | None = None):
        self.args = args
        self.ui = ui

    @property
    def result(self) -> tuple[Any, ...] | None:
        """Values of the outputs, None when there are none."""
        return self.args or None

    def __getitem__(self, index: int) -> Any:
        return self.args[index]


class ComfyNode:
    """Base of all nodes."""

    hidden: Any = None  # in ComfyUI: the values of the schema's hidden inputs

    @classmethod
    def define_schema(cls) -> Schema:
        """Return the node's definition."""
        raise NotImplementedError(f"{cls.__name__} has no schema")

    @classmethod
    def GET_SCHEMA(cls) -> Schema:
        """Return the definition under the name core's loader uses."""
        return cls.define_schema()


class ComfyExtension:
    """Base of the pack's entry."""


io = SimpleNamespace(
    Schema=Schema,
    Hidden=SimpleNamespace(prompt="PROMPT", extra_pnginfo="EXTRA_PNGINFO"),
    ComfyNode=ComfyNode,
    NodeOutput=NodeOutput,
    Int=_io_type("INT", WidgetInput),
    Float=_io_type("FLOAT", WidgetInput),
    String=_io_type("STRING", WidgetInput),
    Boolean=_io_type("BOOLEAN", WidgetInput),
    Combo=_io_type("COMBO", ComboInput),
    Model=_io_type("MODEL"),
    Clip=_io_type("CLIP"),
    Vae=_io_type("VAE"),
    Conditioning=_io_type("CONDITIONING"),
    Latent=_io_type("LATENT"),
    Image=_io_type("IMAGE"),
    Mask=_io_type("MASK"),
    Video=_io_type("VIDEO"),
    Custom=_io_type,
)
