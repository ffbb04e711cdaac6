"""The workflows of the released models run in ComfyUI, with tiny weights in their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from comfyui_kandinsky5.headless.catalogue import catalogue
from comfyui_kandinsky5.headless.core_nodes import core_nodes
from comfyui_kandinsky5.headless.graph import to_api
from comfyui_kandinsky5.headless.workflow import parse, read_document
from comfyui_kandinsky5.nodes import node_list
from PIL import Image

FOLDER = Path(__file__).parents[2] / "workflows"
RELEASED = sorted(path for path in FOLDER.glob("*.json") if "nano" not in path.stem)


def api(path: Path) -> dict[str, Any]:
    """The graph as the frontend would send it."""
    return to_api(parse(read_document(path), catalogue([*node_list(), *core_nodes()])))


def shrink(graph: dict[str, Any], is_image: bool) -> None:
    """Put the tiny models and a small size in place of the released ones."""
    small = {
        "K5LoadModel": {"model_name": tiny.IMAGE if is_image else tiny.VIDEO},
        "K5LoadTextEncoder": {"qwen_name": tiny.QWEN, "clip_name": tiny.CLIP},
        "K5LoadVAE": {"vae_name": tiny.IMAGE_VAE if is_image else tiny.VIDEO_VAE},
        "K5Size": {
            "size": "custom",
            "width": 64,
            "height": 48,
            "length": 1 if is_image else 9,
            "seconds": 0.0,
        },
        "K5Sample": {"steps": 2},
    }
    for entry in graph.values():
        entry["inputs"] |= small.get(entry["class_type"], {})


@pytest.mark.parametrize("path", RELEASED, ids=lambda path: path.stem)
def test_workflow_runs(server, path):
    graph = api(path)
    shrink(graph, path.stem.startswith("t2i"))
    for entry in graph.values():
        if entry["class_type"] == "LoadImage":
            Image.new("RGB", (96, 64), (200, 60, 30)).save(server.base / "input" / entry["inputs"]["image"])
    outputs = server.run(graph)
    saved = [file for entry in outputs.values() for file in entry.get("images", [])]
    assert saved and all(server.file(file).stat().st_size > 500 for file in saved)
