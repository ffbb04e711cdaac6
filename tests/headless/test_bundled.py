"""The bundled workflows: they fit the nodes, explain themselves, and run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from comfyui_kandinsky5.headless.cli import main, node_types
from comfyui_kandinsky5.headless.workflow import ANNOTATIONS, parse
from comfyui_kandinsky5.kandinsky_core.io.media import read_image, read_video, write_png
from comfyui_kandinsky5.kandinsky_core.nano.grade import Grade, grade
from comfyui_kandinsky5.kandinsky_core.variants import VARIANTS
from comfyui_kandinsky5.nodes import host as door

FOLDER = Path(__file__).parents[2] / "workflows"
FILES = sorted(FOLDER.glob("*.json"))
PUBLISHED = {name: row for row in VARIANTS.values() for name in row.files}

every_workflow = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_promised_workflows_are_there():
    nano = {"t2v_nano", "i2v_nano", "t2i_nano", "edit_nano", "t2v_nano_nabla"}
    assert {path.stem for path in FILES} >= nano | {"t2v_lite_5s", "i2v_lite_5s", "t2i_lite"}


@every_workflow
def test_nodes_fit_their_schemas(path, host):
    types = node_types()
    for node in load(path)["nodes"]:
        if node["type"] in ANNOTATIONS:
            continue
        known = types[node["type"]]
        if not node["type"].startswith("K5"):
            continue
        slots = sum(1 + port.companion for port in known.inputs if port.widget)
        assert len(node["widgets_values"]) == slots, f"{node['type']}: widgets"
        assert [(s["name"], s["type"]) for s in node["inputs"]] == [(p.name, p.type) for p in known.inputs]
        assert [(s["name"], s["type"]) for s in node["outputs"]] == list(
            zip(known.output_names, known.outputs, strict=True)
        )


def test_a_workflow_saved_before_a_widget_was_added_still_runs(host):
    graph = load(next(path for path in FILES if path.stem == "t2v_lite_5s"))
    (node,) = (node for node in graph["nodes"] if node["type"] == "K5VAEDecodeTiled")
    node["inputs"] = [slot for slot in node["inputs"] if slot["name"] not in ("plan", "compile")]
    node["widgets_values"] = node["widgets_values"][:3]
    types = node_types()
    (call,) = (call for call in parse(graph, types).values() if call.type == "K5VAEDecodeTiled")
    assert call.inputs["keep_latents"] == 8
    for port in types[call.type].inputs:  # what is missing has a default, or need not be there
        assert port.name in call.inputs or not port.required


@every_workflow
def test_values_are_legal(path, host):
    types = node_types()
    for call in parse(load(path), types).values():
        for port in types[call.type].inputs:
            if port.widget and isinstance(call.inputs.get(port.name), str | int | float) and not is_file(port):
                value = port.parse(call.inputs[port.name])
                assert value == call.inputs[port.name]
                assert port.complaint(value) is None, f"{call}.{port.name}"


def is_file(port):
    return port.name.endswith("_name") and port.name != "sampler_name"


@every_workflow
def test_links_join_what_they_say(path):
    document = load(path)
    nodes = {node["id"]: node for node in document["nodes"]}
    assert len(nodes) == len(document["nodes"])
    for link, source, slot, target, place, kind in document["links"]:
        assert link in nodes[source]["outputs"][slot]["links"]
        assert nodes[source]["outputs"][slot]["type"] == kind
        assert nodes[target]["inputs"][place]["link"] == link
        assert nodes[target]["inputs"][place]["type"] == kind
    used = [s["link"] for node in nodes.values() for s in node["inputs"] if s["link"] is not None]
    assert sorted(used) == [link[0] for link in document["links"]]
    assert document["last_node_id"] == max(nodes)
    assert document["last_link_id"] == len(document["links"])


@every_workflow
def test_nodes_do_not_lie_on_each_other(path):
    boxes = [(*node["pos"], *node["size"], node["id"]) for node in load(path)["nodes"]]
    for x, y, w, h, first in boxes:
        for other_x, other_y, other_w, other_h, second in boxes:
            apart = x + w <= other_x or other_x + other_w <= x or y + h <= other_y or other_y + other_h <= y
            assert first == second or apart, f"nodes {first} and {second} overlap"


@every_workflow
def test_a_note_explains_and_nothing_is_private(path):
    document = load(path)
    notes = [node["widgets_values"][0] for node in document["nodes"] if node["type"] == "MarkdownNote"]
    assert notes and all(len(note) > 200 for note in notes)
    assert not re.search(r'"(/|[A-Za-z]:\\\\|~/)', path.read_text(encoding="utf-8"))


@every_workflow
def test_weights_to_download_are_the_ones_used(path):
    document = load(path)
    for node in document["nodes"]:
        offered = node["properties"].get("models", [])
        loads_files = [value for value in node["widgets_values"] if str(value).endswith(".safetensors")]
        assert [model["name"] for model in offered] == loads_files
        for model in offered:
            assert model["url"].startswith("https://huggingface.co/")
            assert model["url"].endswith("/" + model["name"])
            assert model["directory"] in ("diffusion_models", "text_encoders", "vae")
            if model["directory"] == "diffusion_models":
                assert f"/{PUBLISHED[model['name']].repo}/" in model["url"]


@pytest.fixture
def published(models, tmp_path):
    """A models folder in which the tiny weights bear the published names."""
    names = {
        f"diffusion_models/{tiny.VIDEO}": [
            "diffusion_models/kandinsky5lite_t2v_sft_5s.safetensors",
            "diffusion_models/kandinsky5lite_i2v_5s.safetensors",
        ],
        f"diffusion_models/{tiny.IMAGE}": ["diffusion_models/kandinsky5lite_t2i.safetensors"],
        f"vae/{tiny.VIDEO_VAE}": ["vae/hunyuan_video_vae_bf16.safetensors"],
        f"vae/{tiny.IMAGE_VAE}": ["vae/ae.safetensors"],
        f"text_encoders/{tiny.QWEN}": ["text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors"],
        f"text_encoders/{tiny.CLIP}": ["text_encoders/clip_l.safetensors"],
    }
    for source, targets in names.items():
        for target in targets:
            (tmp_path / "models" / target).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "models" / target).symlink_to(models / source)
    return tmp_path / "models"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a bundled workflow by name; gives the one file it saved last."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(door, "_current", [])
    monkeypatch.chdir(tmp_path)

    def call(name, *arguments):
        code = main(["run", name, "--device", "cpu", *map(str, arguments)])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return [line for line in captured.out.splitlines() if "preview_" not in line][-1]

    return call


SETTINGS = ("K5Size.size=custom", "K5Size.width=64", "K5Size.height=48", "K5Sample.steps=1")
SMALL = [word for setting in SETTINGS for word in ("--set", setting)]


@pytest.mark.parametrize("name", ["t2v_lite_5s", "i2v_lite_5s"])
def test_lite_video_workflows_run(run, published, tmp_path, name):
    (tmp_path / "input").mkdir()
    write_png(tmp_path / "input/example.png", torch.rand(40, 80, 3))
    saved = run(name, "--models", published, *SMALL, "--set", "K5Size.length=5")
    assert read_video(saved).frames_THW3.shape == (5, 48, 64, 3)


def test_the_lite_image_workflow_runs(run, published):
    saved = run("t2i_lite", "--models", published, *SMALL)
    assert read_image(saved).pixels_1HW3.shape == (1, 48, 64, 3)


@pytest.mark.parametrize(
    ("name", "side", "shows"),
    [
        ("t2v_nano", 64, Grade("red", "circle", "right", "black")),
        ("i2v_nano", 64, Grade("blue", "square", "right", "beige")),
        ("t2v_nano_nabla", 256, Grade("red", "circle", "right", "black")),
    ],
)
def test_nano_clips_show_what_the_workflow_asks_for(run, name, side, shows):
    video = read_video(run(name))
    assert video.frames_THW3.shape == (17, side, side, 3)
    assert video.fps == 8
    assert {"workflow", "prompt", "kandinsky5"} <= video.metadata.keys()
    assert grade(video.frames_THW3) == shows


@pytest.mark.parametrize(
    ("name", "shows"),
    [
        ("t2i_nano", Grade("green", "triangle", "none", "beige")),
        ("edit_nano", Grade("red", "square", "none", "navy")),
    ],
)
def test_nano_pictures_show_what_the_workflow_asks_for(run, name, shows):
    picture = read_image(run(name)).pixels_1HW3
    assert picture.shape == (1, 128, 128, 3)
    assert grade(picture) == shows


def test_an_edit_keeps_what_the_given_picture_shows(run):
    saved = run("edit_nano", "--set", "Picture prompt.prompt=A green circle on a pink background.")
    assert grade(read_image(saved).pixels_1HW3) == Grade("green", "square", "none", "pink")
