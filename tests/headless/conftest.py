"""Toy nodes for the graph machinery, and the standalone host over tiny models."""

from __future__ import annotations

import pytest
import tiny
from comfyui_kandinsky5.headless.catalogue import catalogue
from comfyui_kandinsky5.nodes import host as door
from comfyui_kandinsky5.nodes.host_standalone import StandaloneHost
from comfyui_kandinsky5.nodes.standalone_io import io


class Number(io.ComfyNode):
    """Gives its widget's value."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Number",
            display_name="A Number",
            inputs=[
                io.Int.Input("seed", default=7, min=0, max=100, control_after_generate=True),
                io.Combo.Input("mode", options=["plain", "double"]),
                io.Float.Input("scale", default=1.0, optional=True),
            ],
            outputs=[io.Int.Output(display_name="value"), io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(cls, seed, mode, scale=1.0):
        value = seed * (2 if mode == "double" else 1) * scale
        return io.NodeOutput(value, f"gave {value:g}")


class Add(io.ComfyNode):
    """Adds; `b` may be typed in or linked."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Add",
            inputs=[io.Int.Input("a", force_input=True), io.Int.Input("b", default=0, max=50)],
            outputs=[io.Int.Output(display_name="sum")],
        )

    @classmethod
    def validate_inputs(cls, b):
        return True if b is None or b < 40 else f"b is {b}. Use less than 40."

    @classmethod
    def execute(cls, a, b):
        if b == 13:
            raise RuntimeError("thirteen")
        return io.NodeOutput(a + b)


class Show(io.ComfyNode):
    """The end of a toy workflow."""

    shown: list = []

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Show", inputs=[io.Int.Input("value", force_input=True)], outputs=[], is_output_node=True
        )

    @classmethod
    def execute(cls, value):
        cls.shown.append(value)
        return io.NodeOutput(ui={"files": [{"path": f"{value:g}"}]})


@pytest.fixture
def toys():
    """Catalogue of the toy nodes."""
    Show.shown = []
    return catalogue([Number, Add, Show])


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A models folder with tiny random weights of every kind."""
    folder = tmp_path_factory.mktemp("models")
    tiny.write(folder)
    return folder


@pytest.fixture
def host(models, tmp_path, monkeypatch):
    """The standalone host on the tiny models, writing into the test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(door, "_current", [])
    made = StandaloneHost(models=models, output=tmp_path / "out", device="cpu")
    door.install(made)
    return made
