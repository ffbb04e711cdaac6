"""The public contract of the nodes: ids, order of inputs and widgets, defaults, outputs. It only ever grows.

To add a node or append an input: `python tests/nodes/test_contract.py` rewrites the golden file; review its diff.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from comfyui_kandinsky5.nodes import comfy_entrypoint, node_list

PACK = Path(__file__).parents[2]
GOLDEN = PACK / "tests" / "golden" / "nodes.json"
LISTS_OF_THE_HOST = {"model_name", "qwen_name", "clip_name", "vae_name", "sampler_name", "latent_name"}
SHOWN = ("optional", "default", "min", "max", "step", "advanced", "multiline", "control_after_generate")


def contract(node: Any) -> dict[str, Any]:
    """What a saved workflow depends on."""
    schema = node.define_schema()
    return {
        "display_name": schema.display_name,
        "category": schema.category,
        "inputs": [_input(entry) for entry in schema.inputs],
        "outputs": [{"type": entry.io_type, "name": entry.display_name} for entry in schema.outputs],
    }


def _input(entry: Any) -> dict[str, Any]:
    shown = {key: getattr(entry, key, None) for key in SHOWN}
    if entry.id not in LISTS_OF_THE_HOST:
        shown["options"] = getattr(entry, "options", None)
    return {"id": entry.id, "type": entry.io_type} | {
        key: value for key, value in shown.items() if value not in (None, False)
    }


def contracts() -> dict[str, Any]:
    """Contracts of all nodes by id."""
    return {node.define_schema().node_id: contract(node) for node in node_list()}


def test_contract_is_the_golden_one():
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert contracts() == golden


@pytest.mark.parametrize("node", node_list(), ids=lambda node: node.__name__)
def test_schema_is_complete(node):
    schema = node.define_schema()
    assert schema.node_id == node.__name__ and schema.node_id.startswith("K5")
    assert schema.display_name.startswith("Kandinsky 5 ") and schema.category.startswith("Kandinsky 5/")
    assert schema.description and "kandinsky" in schema.search_aliases
    names = [entry.id for entry in schema.inputs]
    assert len(set(names)) == len(names)
    for entry in schema.inputs:
        is_widget = hasattr(entry, "default")
        assert entry.tooltip or not is_widget, f"{entry.id} has no tooltip"
        if entry.io_type in ("INT", "FLOAT"):
            assert entry.min <= entry.default <= entry.max
            assert entry.io_type != "FLOAT" or entry.step
        if entry.io_type == "COMBO" and entry.id not in LISTS_OF_THE_HOST:
            assert entry.default in entry.options
    widgets = [entry for entry in schema.inputs if hasattr(entry, "default") and not entry.advanced]
    assert len(widgets) <= 12


@pytest.mark.parametrize(
    "name", list(json.loads(GOLDEN.read_text(encoding="utf-8"))) if GOLDEN.exists() else []
)
def test_help_page_names_every_input_and_output(name):
    page = (PACK / "js" / "docs" / f"{name}.md").read_text(encoding="utf-8")
    golden = contracts()[name]
    assert page.startswith(f"# {golden['display_name']}\n")
    for entry in golden["inputs"] + golden["outputs"]:
        word = entry.get("id", entry.get("name"))
        assert f"`{word}`" in page, f"{word} is not explained"


async def _nodes_of_the_entry() -> list[type]:
    return await (await comfy_entrypoint()).get_node_list()


def test_entry_gives_all_nodes():
    import asyncio

    assert asyncio.run(_nodes_of_the_entry()) == node_list()


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(contracts(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
