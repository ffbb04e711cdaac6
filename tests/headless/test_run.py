"""Running a graph: values, order, what is kept, and how it ends."""

from __future__ import annotations

import gc
import weakref

import pytest
from comfyui_kandinsky5.headless.catalogue import catalogue
from comfyui_kandinsky5.headless.graph import GraphError
from comfyui_kandinsky5.headless.run import RunError, run
from comfyui_kandinsky5.headless.workflow import parse
from comfyui_kandinsky5.nodes.standalone_io import io


def chain(b=3):
    return {
        "1": {"class_type": "Number", "inputs": {"seed": 5, "mode": "double"}},
        "2": {"class_type": "Add", "inputs": {"a": ["1", 0], "b": b}},
        "3": {"class_type": "Show", "inputs": {"value": ["2", 0]}},
        "4": {"class_type": "Number", "inputs": {"seed": 1, "mode": "plain"}},
    }


def test_values_flow_and_only_what_is_needed_runs(toys, host):
    started = []
    result = run(parse(chain(), toys), toys, host, on_call=lambda call, *_: started.append(call.id))
    assert toys["Show"].node.shown == [13]
    assert started == ["1", "2", "3"]
    assert result.reports == {"1": "gave 10"}
    assert result.files == [{"node": "3", "path": "13"}]
    assert set(result.seconds) == {"1", "2", "3"}


def test_facts_are_those_of_one_run(toys, host):
    host.facts["1"] = {"prompts": ["of the run before"]}
    assert run(parse(chain(), toys), toys, host).facts == {}


def test_a_failing_node_is_named_and_stops_the_run(toys, host):
    with pytest.raises(RunError, match=r"node 2 \(Add\): thirteen") as caught:
        run(parse(chain(b=13), toys), toys, host)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert toys["Show"].node.shown == []


def test_nothing_runs_when_the_last_node_is_wrong(toys, host):
    document = chain()
    document["3"]["inputs"] = {}
    started = []
    with pytest.raises(GraphError):
        run(parse(document, toys), toys, host, on_call=lambda call, *_: started.append(call.id))
    assert started == []


class Big:
    """A value whose life can be watched."""


class Make(io.ComfyNode):
    """Gives a `Big`."""

    made: list = []

    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="Make", inputs=[], outputs=[io.Int.Output()])

    @classmethod
    def execute(cls):
        big = Big()
        cls.made.append(weakref.ref(big))
        return io.NodeOutput(big)


class Use(io.ComfyNode):
    """Turns a `Big` into a number."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Use", inputs=[io.Int.Input("big", force_input=True)], outputs=[io.Int.Output()]
        )

    @classmethod
    def execute(cls, big):
        return io.NodeOutput(1)


def test_a_value_is_dropped_after_its_last_use(toys, host):
    types = {**toys, **catalogue([Make, Use])}
    alive = {}

    def watch(call, *_):
        gc.collect()
        alive[call.id] = [ref() is not None for ref in Make.made]

    document = {
        "1": {"class_type": "Make", "inputs": {}},
        "2": {"class_type": "Use", "inputs": {"big": ["1", 0]}},
        "3": {"class_type": "Show", "inputs": {"value": ["2", 0]}},
    }
    Make.made = []
    run(parse(document, types), types, host, on_call=watch)
    assert alive == {"1": [], "2": [True], "3": [False]}


def test_cancelling_passes_through(toys, host):
    def cancel(call, *_):
        if call.id == "2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(parse(chain(), toys), toys, host, on_call=cancel)
    assert toys["Show"].node.shown == []
