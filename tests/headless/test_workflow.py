"""Reading both file formats into the same graph."""

from __future__ import annotations

import copy

import pytest
from comfyui_kandinsky5.headless.graph import GraphError, Link
from comfyui_kandinsky5.headless.workflow import parse, read_document


def socket(name, link=None, kind="INT"):
    return {"name": name, "type": kind, "link": link}


def node(number, kind, inputs=(), widgets=(), outputs=("INT",), **rest):
    sockets = {"inputs": list(inputs), "outputs": [{"name": name, "type": name, "links": []} for name in outputs]}
    return {"id": number, "type": kind, "widgets_values": list(widgets), **sockets, **rest}


def editor(nodes, links, **rest):
    return {"version": 0.4, "nodes": nodes, "links": links, **rest}


PLAIN = editor(
    [
        node(1, "Number", widgets=[5, "randomize", "double", 1.0]),
        node(2, "Add", [socket("a", 1), socket("b")], [3]),
        node(3, "Show", [socket("value", 2)], title="The end"),
        node(4, "MarkdownNote", widgets=["# words"], outputs=()),
    ],
    [[1, 1, 0, 2, 0, "INT"], [2, 2, 0, 3, 0, "INT"]],
)
API = {
    "1": {"class_type": "Number", "inputs": {"seed": 5, "mode": "double", "scale": 1.0}},
    "2": {"class_type": "Add", "inputs": {"a": ["1", 0], "b": 3}},
    "3": {"class_type": "Show", "inputs": {"value": ["2", 0]}, "_meta": {"title": "The end"}},
}


def test_both_formats_give_the_same_graph(toys):
    assert parse(PLAIN, toys) == parse(API, toys)


def test_control_after_generate_takes_a_place_of_its_own(toys):
    assert parse(PLAIN, toys)["1"].inputs == {"seed": 5, "mode": "double", "scale": 1.0}


def test_values_missing_at_the_end_take_the_default(toys):
    document = copy.deepcopy(PLAIN)
    document["nodes"][0]["widgets_values"] = [5, "fixed"]
    assert parse(document, toys)["1"].inputs == {"seed": 5, "mode": "plain"}


def test_too_many_values_are_refused_rather_than_shifted(toys):
    document = copy.deepcopy(PLAIN)
    document["nodes"][0]["widgets_values"] = [5, "fixed", "double", 1.0, "new"]
    with pytest.raises(GraphError, match=r"node 1 'A Number' \(Number\).*5 widget values, 1 more.*seed, mode, scale"):
        parse(document, toys)


def test_values_saved_by_name_are_read_by_name(toys):
    document = copy.deepcopy(PLAIN)
    document["nodes"][0]["widgets_values"] = {"mode": "double", "seed": 9}
    assert parse(document, toys)["1"].inputs["seed"] == 9


def test_reroutes_and_primitives_are_followed(toys):
    document = editor(
        [
            node(1, "Number", widgets=[5, "fixed", "plain"]),
            node(2, "Reroute", [socket("", 1)], outputs=("*",)),
            node(3, "Reroute", [socket("", 2)], outputs=("*",)),
            node(4, "PrimitiveNode", widgets=[11, "fixed"]),
            node(5, "Add", [socket("a", 3), socket("b", 4)], [0]),
        ],
        [[1, 1, 0, 2, 0, "*"], [2, 2, 0, 3, 0, "*"], [3, 3, 0, 5, 0, "*"], [4, 4, 0, 5, 1, "INT"]],
    )
    graph = parse(document, toys)
    assert set(graph) == {"1", "5"}
    assert graph["5"].inputs == {"a": Link("1", 0), "b": 11}


def test_muted_nodes_and_their_links_vanish(toys):
    document = copy.deepcopy(PLAIN)
    document["nodes"][1]["mode"] = 2
    graph = parse(document, toys)
    assert set(graph) == {"1", "3"}
    assert graph["3"].inputs == {}


def test_bypassed_nodes_pass_on_an_input_of_the_same_type(toys):
    document = copy.deepcopy(PLAIN)
    document["nodes"][1]["mode"] = 4
    document["nodes"][1]["inputs"].insert(0, socket("name", kind="STRING"))
    assert parse(document, toys)["3"].inputs == {"value": Link("1", 0)}


def test_subgraphs_are_opened_however_deep(toys):
    inner = {
        "id": "inner",
        "nodes": [node(1, "Add", [socket("a", 1), socket("b")], [4])],
        "links": [
            {"id": 1, "origin_id": -10, "origin_slot": 0, "target_id": 1, "target_slot": 0},
            {"id": 2, "origin_id": 1, "origin_slot": 0, "target_id": -20, "target_slot": 0},
        ],
        "inputs": [{"name": "x"}],
        "outputs": [{"name": "y"}],
    }
    outer = {
        "id": "outer",
        "nodes": [node(7, "inner", [socket("x", 1)])],
        "links": [
            {"id": 1, "origin_id": -10, "origin_slot": 0, "target_id": 7, "target_slot": 0},
            {"id": 2, "origin_id": 7, "origin_slot": 0, "target_id": -20, "target_slot": 0},
        ],
        "inputs": [{"name": "in"}],
        "outputs": [{"name": "out"}],
    }
    document = editor(
        [
            node(1, "Number", widgets=[5, "fixed", "plain"]),
            node(2, "outer", [socket("in", 1)]),
            node(3, "Show", [socket("value", 2)]),
        ],
        [[1, 1, 0, 2, 0, "INT"], [2, 2, 0, 3, 0, "INT"]],
        definitions={"subgraphs": [inner, outer]},
    )
    graph = parse(document, toys)
    assert set(graph) == {"1", "2:7:1", "3"}
    assert graph["2:7:1"].inputs == {"a": Link("1", 0), "b": 4}
    assert graph["3"].inputs == {"value": Link("2:7:1", 0)}


def test_a_link_that_is_not_listed_is_named(toys):
    document = copy.deepcopy(PLAIN)
    document["links"] = document["links"][:1]
    with pytest.raises(GraphError, match="Link 2 is used"):
        parse(document, toys)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "no valid JSON"), ("[1]", "not a JSON object"), ('{"a": 1}', "neither"), ("{}", "neither")],
)
def test_other_files_are_refused(tmp_path, toys, text, message):
    path = tmp_path / "w.json"
    path.write_text(text)
    with pytest.raises(GraphError, match=message):
        parse(read_document(path), toys)


@pytest.mark.parametrize(
    "document",
    [
        {"nodes": [{"id": 1}], "links": []},
        {"nodes": [3], "links": []},
        {"1": {"class_type": "Number", "inputs": 3}},
    ],
)
def test_damaged_files_are_named_as_such(toys, document):
    with pytest.raises(GraphError, match="damaged"):
        parse(document, toys)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(GraphError, match="nothing.json: No such file"):
        read_document(tmp_path / "nothing.json")
