"""The nano workflows in ComfyUI: the same file gives the same clip or picture as without ComfyUI."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from comfyui_kandinsky5.headless.cli import main, node_types
from comfyui_kandinsky5.headless.graph import to_api
from comfyui_kandinsky5.headless.workflow import parse, read_document
from comfyui_kandinsky5.kandinsky_core.io.media import read_image, read_video
from comfyui_kandinsky5.nodes import host as door
from comfyui_kandinsky5.nodes.host_standalone import StandaloneHost

FOLDER = Path(__file__).parents[2] / "workflows"
# What is left between equal computations is H.264, which the two savers set differently, or half a grey level, because
# core's savers cut off where ours round: a small part of what another seed or prompt changes.
LARGEST_PART = 0.25


@pytest.fixture
def standalone(monkeypatch, tmp_path):
    """A host of the tests' own, so that node types can be read and workflows run beside the server."""
    monkeypatch.setattr(door, "_current", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    door.install(StandaloneHost(device="cpu"))


@pytest.fixture
def both(server, standalone, tmp_path, capsys):
    """Run a bundled workflow inside and outside ComfyUI, outside with one input changed as well.

    Gives its document and the three saved files.
    """

    def outside(name, *options):
        assert main(["run", name, "--out", str(tmp_path), "--device", "cpu", "--quiet", *options]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if "preview_" not in line][-1]

    def call(name, saver, change):
        document = read_document(FOLDER / f"{name}.json")
        graph = parse(document, node_types())
        outputs = server.run(to_api(graph), extra_data={"extra_pnginfo": {"workflow": document}})
        node = next(call.id for call in graph.values() if call.type == saver)
        inside = server.file(outputs[node]["images"][0])
        return document, inside, outside(name), outside(name, "--set", change)

    return call


def difference(one, other):
    """Root of the mean squared difference of pixels: edges that moved count more than evenly spread codec noise."""
    return (one - other).square().mean().sqrt().item()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("t2v_nano", "K5Sample.seed=8"),
        ("t2v_nano_nabla", "K5Sample.seed=8"),
        ("i2v_nano", "Clip prompt.prompt=A blue square moves left on a beige background."),
    ],
)
def test_the_clip_is_the_same_with_and_without_comfyui(both, name, change):
    document, *files = both(name, "SaveVideo", change)
    inside, outside, other = map(read_video, files)
    assert inside.frames_THW3.shape == outside.frames_THW3.shape
    assert len(inside.frames_THW3) == 17
    assert inside.fps == outside.fps == 8
    frames = [video.frames_THW3 for video in (inside, outside, other)]
    assert difference(frames[0], frames[1]) < LARGEST_PART * difference(frames[1], frames[2])
    assert json.loads(inside.metadata["workflow"]) == json.loads(outside.metadata["workflow"]) == document


@pytest.mark.parametrize(
    ("name", "change"), [("t2i_nano", "K5Sample.seed=8"), ("edit_nano", "Picture sampler.seed=8")]
)
def test_the_picture_is_the_same_with_and_without_comfyui(both, name, change):
    _, *files = both(name, "SaveImage", change)
    inside, outside, other = (read_image(file).pixels_1HW3 for file in files)
    assert inside.shape == outside.shape == (1, 128, 128, 3)
    assert difference(inside, outside) < LARGEST_PART * difference(outside, other)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_core_nodes_in_the_files_are_as_comfyui_has_them(server, path):
    for node in read_document(path)["nodes"]:
        if node["type"].startswith("K5") or node["type"] == "MarkdownNote":
            continue
        info = server.get(f"/object_info/{node['type']}")[node["type"]]
        known = info["input"].get("required", {}) | info["input"].get("optional", {})
        # An upload button is the editor's own and has no entry in the node's definition.
        linked = [socket["name"] for socket in node["inputs"] if socket["name"] != "upload"]
        assert set(linked) <= known.keys()
        assert [socket["type"] for socket in node["outputs"]] == info["output"]
