"""Every problem of a workflow is found before anything runs, and all of them together."""

from __future__ import annotations

import pytest
from comfyui_kandinsky5.headless.check import check
from comfyui_kandinsky5.headless.graph import GraphError
from comfyui_kandinsky5.headless.workflow import parse


def graph(toys, **changes):
    document = {
        "1": {"class_type": "Number", "inputs": {"seed": 5, "mode": "plain"}},
        "2": {"class_type": "Add", "inputs": {"a": ["1", 0], "b": 3}},
        "3": {"class_type": "Show", "inputs": {"value": ["2", 0]}},
    }
    for place, value in changes.items():
        number, name = place[1], place[3:]
        if value is None:
            del document[number]["inputs"][name]
        else:
            document[number]["inputs"][name] = value
    return parse(document, toys)


def test_a_good_graph_is_put_in_order(toys):
    assert [call.id for call in check(graph(toys), toys)] == ["1", "2", "3"]


def test_values_take_the_type_of_their_input(toys):
    checked = graph(toys, n1_seed="6", n1_scale=2)
    check(checked, toys)
    assert checked["1"].inputs["seed"] == 6
    assert isinstance(checked["1"].inputs["scale"], float)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n1_seed": -1}, "seed: -1 is below the smallest allowed value 0"),
        ({"n1_seed": 101}, "seed: 101 is above the largest allowed value 100"),
        ({"n1_seed": float("inf")}, "seed = inf is not of type INT"),
        ({"n1_scale": float("nan")}, "scale: nan is not a finite number"),
        ({"n1_scale": "-inf"}, "scale: -inf is not a finite number"),
        ({"n1_seed": "many"}, "seed = 'many' is not of type INT"),
        ({"n1_mode": "triple"}, "mode: 'triple' is not one of: plain, double"),
        ({"n1_speed": 1}, "has no input 'speed'. Its inputs: seed, mode, scale"),
        ({"n2_a": None}, r"input 'a' \(INT\) is missing"),
        ({"n2_a": ["9", 0]}, "linked to node 9, which does not exist"),
        ({"n2_a": ["1", 5]}, "takes output 5 of node 1"),
        ({"n2_a": ["1", 1]}, "takes INT, but node 1 .* gives STRING"),
        ({"n2_b": 40}, "b is 40. Use less than 40"),
        ({"n3_value": ["3", 0]}, "takes output 0 of node 3 .*which has 0"),
    ],
)
def test_each_problem_names_node_and_remedy(toys, changes, message):
    with pytest.raises(GraphError, match=message):
        check(graph(toys, **changes), toys)


def test_a_checked_input_loses_the_built_in_limits_as_in_comfyui(toys):
    with pytest.raises(GraphError) as caught:
        check(graph(toys, n2_b=60), toys)
    assert caught.value.problems == ("node 2 (Add): b is 60. Use less than 40.",)


def test_all_problems_come_at_once(toys):
    with pytest.raises(GraphError) as caught:
        check(graph(toys, n1_seed=-1, n1_mode="triple", n2_b=60), toys)
    assert len(caught.value.problems) == 3


def test_unknown_types_are_suggested(toys):
    document = {"1": {"class_type": "Nummber", "inputs": {}}}
    with pytest.raises(GraphError, match="unknown node type. Did you mean Number"):
        check(parse(document, toys), toys)


def test_what_no_output_needs_is_not_asked(toys):
    document = {
        "1": {"class_type": "Number", "inputs": {"seed": 1, "mode": "plain"}},
        "2": {"class_type": "Show", "inputs": {"value": ["1", 0]}},
        "3": {"class_type": "Add", "inputs": {"b": 999}},
    }
    assert [call.id for call in check(parse(document, toys), toys)] == ["1", "2"]
    document["3"]["class_type"] = "Nothing"
    with pytest.raises(GraphError, match="unknown node type"):
        check(parse(document, toys), toys)


def test_a_graph_without_an_output_is_refused(toys):
    document = {"1": {"class_type": "Number", "inputs": {"seed": 1, "mode": "plain"}}}
    with pytest.raises(GraphError, match="no output node"):
        check(parse(document, toys), toys)


def test_a_cycle_is_shown(toys):
    document = {
        "1": {"class_type": "Add", "inputs": {"a": ["2", 0], "b": 1}},
        "2": {"class_type": "Add", "inputs": {"a": ["1", 0], "b": 1}},
        "3": {"class_type": "Show", "inputs": {"value": ["2", 0]}},
    }
    with pytest.raises(GraphError, match="2 -> 1 -> 2"):
        check(parse(document, toys), toys)
