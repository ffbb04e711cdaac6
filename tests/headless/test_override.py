"""Changing inputs of a workflow from the command line."""

from __future__ import annotations

import pytest
from comfyui_kandinsky5.headless.graph import GraphError
from comfyui_kandinsky5.headless.override import override
from comfyui_kandinsky5.headless.workflow import parse


@pytest.fixture
def graph(toys):
    return parse(
        {
            "1": {"class_type": "Number", "inputs": {"seed": 5, "mode": "plain"}, "_meta": {"title": "v1.5 first"}},
            "2": {"class_type": "Number", "inputs": {"seed": 6, "mode": "plain"}},
            "3": {"class_type": "Add", "inputs": {"a": ["1", 0], "b": ["2", 0]}},
        },
        toys,
    )


@pytest.mark.parametrize("node", ["1", "v1.5 first", "V1.5 FIRST"])
def test_a_node_is_found_by_id_and_title(graph, toys, node):
    override(graph, toys, [f"{node}.seed=8", f"{node}.mode=double"])
    assert graph["1"].inputs == {"seed": 8, "mode": "double"}


def test_a_type_is_enough_when_it_is_the_only_one(graph, toys):
    override(graph, toys, ["add.b=9"])
    assert graph["3"].inputs["b"] == 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Number.seed=1", r"several nodes are meant: node 1 .*; node 2 .*as in 1.seed=1"),
        ("1.speed=1", "has no input of that name. It has: seed, mode, scale"),
        ("9.seed=1", "no such node. The workflow has: node 1"),
        ("1.seed=x", "'x' is not of type INT"),
        ("3.a=1", "takes a link"),
        ("seed", "write node.input=value"),
        ("seed=1", "write node.input=value"),
    ],
)
def test_what_cannot_be_set_is_explained(graph, toys, text, message):
    with pytest.raises(GraphError, match=message):
        override(graph, toys, [text])
