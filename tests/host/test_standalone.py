"""The same graph in ComfyUI and headless gives the same latents and pictures: one set of nodes, two hosts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comfyui_kandinsky5.headless.catalogue import catalogue
from comfyui_kandinsky5.headless.core_nodes import core_nodes
from comfyui_kandinsky5.headless.run import run
from comfyui_kandinsky5.headless.workflow import parse
from comfyui_kandinsky5.nodes import host as door
from comfyui_kandinsky5.nodes import node_list
from comfyui_kandinsky5.nodes.host_standalone import StandaloneHost
from comfyui_kandinsky5.nodes.standalone_io import io
from PIL import Image
from tiny_graphs import edit, image_to_video, node, save, text_to_image, text_to_video
from torch.testing import assert_close

# Different torch releases on both sides; four steps of a random network amplify their rounding.
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


class K5TestSave(io.ComfyNode):
    """Keeps the values it is given."""

    kept: dict[str, torch.Tensor] = {}

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5TestSave",
            inputs=[io.Latent.Input("latent"), io.Image.Input("image")],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, latent: dict[str, Any], image: torch.Tensor) -> io.NodeOutput:
        cls.kept.update(latent=latent["samples"], image=image)
        return io.NodeOutput()


@pytest.fixture
def headless(server, tmp_path, monkeypatch) -> Iterator[Any]:
    """Run a graph without ComfyUI over the server's models; returns the saved tensors."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    host = StandaloneHost(models=server.base / "models", output=tmp_path, device="cpu")
    before = list(door._current)
    door.install(host)
    types = catalogue([*node_list(), *core_nodes(), K5TestSave])

    def run_headless(graph: dict[str, Any]) -> dict[str, torch.Tensor]:
        K5TestSave.kept.clear()
        run(parse(graph, types), types, host)
        return dict(K5TestSave.kept)

    yield run_headless
    door._current[:] = before


SAVE = {"save": save(latent=["sample", 0], image=["decode", 0])}


@pytest.mark.parametrize(
    "graph",
    [
        text_to_video(),
        text_to_video(batch=2, cfg=1.0, shift=3.0),
        text_to_image(),
    ],
    ids=["text to video", "two clips without guidance", "text to image"],
)
def test_both_hosts_agree(saved, headless, graph):
    ours, theirs = headless(graph | SAVE), saved(graph | SAVE)
    assert_close(theirs["latent"], ours["latent"], **TOLERANCE)
    assert_close(theirs["image"], ours["image"], **TOLERANCE)


@pytest.mark.parametrize("task", [image_to_video, edit])
def test_both_hosts_agree_on_a_given_picture(server, saved, headless, task):
    picture = (torch.arange(96 * 64 * 3) * 7919 % 256).byte().reshape(64, 96, 3)
    path = server.base / "input" / "given.png"
    Image.fromarray(picture.numpy()).save(path)
    graph = task(["picture", 0]) | SAVE
    theirs = saved(graph | {"picture": node("LoadImage", image="given.png")})
    ours = headless(graph | {"picture": node("LoadImage", image=str(path))})
    assert_close(theirs["latent"], ours["latent"], **TOLERANCE)
    assert_close(theirs["image"], ours["image"], **TOLERANCE)
