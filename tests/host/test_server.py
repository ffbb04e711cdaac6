"""The pack as ComfyUI's server shows it: loading, node list, templates, help, errors, cancel, cache."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import tiny
from comfyui_kandinsky5.nodes import node_list
from tiny_graphs import node, save, text_to_video

PACK = Path(__file__).parents[2]
NODE_IDS = [cls.define_schema().node_id for cls in node_list()]


def test_pack_loads_without_a_word(server):
    log = server.log[: server.log.index("Import times for custom nodes") + 1000]
    outcome = re.findall(rf"[\d.]+ seconds(.*): .*{server.folder}", log)
    assert outcome and "FAILED" not in outcome[0], outcome
    ours = [line for line in log.splitlines() if "kandinsky" in line.lower()]
    assert not [line for line in ours if re.search(r"warn|error|traceback", line, re.IGNORECASE)], ours


def test_nodes_show_what_the_contract_says(server):
    """The golden file holds ids, inputs in order, types, defaults and outputs; ComfyUI reports the same."""
    golden = json.loads((PACK / "tests" / "golden" / "nodes.json").read_text(encoding="utf-8"))
    for name, expected in golden.items():
        info = server.get(f"/object_info/{name}")[name]
        assert info["python_module"] == f"custom_nodes.{server.folder}"
        assert info["display_name"] == expected["display_name"]
        order = [*info["input_order"].get("required", []), *info["input_order"].get("optional", [])]
        assert order == [entry["id"] for entry in expected["inputs"]]
        inputs = info["input"].get("required", {}) | info["input"].get("optional", {})
        assert [inputs[entry["id"]][0] for entry in expected["inputs"]] == [
            e["type"] for e in expected["inputs"]
        ]
        widgets = [key for key in order if inputs[key][0] in ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN")]
        assert [key for key in widgets if not inputs[key][1].get("tooltip")] == []
        assert info["output"] == [entry["type"] for entry in expected["outputs"]]


@pytest.mark.parametrize("name", NODE_IDS)
def test_help_page_is_served(server, name):
    page = server.text(f"/extensions/{server.folder}/docs/{name}.md")
    assert page.startswith("# Kandinsky 5")


def test_template_browser_lists_the_workflows(server):
    expected = sorted(path.stem for path in (PACK / "workflows").glob("*.json"))
    assert sorted(server.get("/workflow_templates")[server.folder]) == expected
    for name in expected:
        assert server.get(f"/api/workflow_templates/{server.folder}/{name}.json")["nodes"]


def broken(**changes):
    """Text-to-video with inputs changed: `model__variant="x"` changes `variant` of the node `model`."""
    graph = text_to_video() | {"save": save(image=["decode", 0])}
    for key, value in changes.items():
        name, _, field = key.partition("__")
        graph[name]["inputs"][field] = value
    return graph


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model__model_name": "gone.safetensors"}, "not there"),
        ({"model__model_name": tiny.VIDEO + "/../../../x.safetensors"}, "not there"),
        ({"model__model_name": "broken.safetensors"}, "broken.safetensors"),
        ({"vae__vae_name": "foreign.safetensors"}, "foreign.safetensors"),
        ({"empty__width": 70}, "not a positive multiple of 16. Use 64"),
        ({"empty__length": 0}, "must be 4k+1"),
        ({"empty__length": 6}, "Use 5"),
        ({"sample__steps": 5000}, "steps"),
        ({"model__variant": "no such"}, "variant"),
        ({"model__variant": "pro_t2v_5s_sd"}, "another model"),
        ({"clip__clip_name": tiny.QWEN}, "is not CLIP's text encoder"),
        ({"clip__qwen_name": tiny.CLIP}, "is not Qwen2.5-VL"),
        ({"clip__qwen_name": f"{tiny.QWEN}/config.json"}, "not there"),
    ],
)
def test_broken_input_is_refused_in_words_before_running(server, change, words):
    models = server.base / "models"
    (models / "diffusion_models" / "broken.safetensors").write_bytes(b"\x10" * 100)
    (models / "vae" / "foreign.safetensors").write_bytes(
        (models / "diffusion_models" / tiny.VIDEO).read_bytes()
    )
    status, answer = server.post("/prompt", {"prompt": broken(**change)})
    assert status == 400
    errors = [error for entry in answer["node_errors"].values() for error in entry["errors"]]
    assert any(words in f"{error['message']} {error['details']}" for error in errors), errors
    assert server.get("/system_stats")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vae__vae_name": tiny.IMAGE_VAE}, "HunyuanVideo VAE"),
    ],
)
def test_error_while_running_names_the_remedy(server, change, words):
    entry = server.finish(server.start(broken(**change)))
    assert entry["status"]["status_str"] == "error" and words in server.error(entry)
    assert server.run(text_to_video() | {"save": save(latent=["sample", 0])})


def test_cancel_stops_sampling_and_the_server_lives_on(server):
    graph = text_to_video(width=256, height=256, length=41, steps=500) | {"save": save(latent=["sample", 0])}
    prompt_id = server.start(graph)
    deadline = time.monotonic() + 120
    while (
        "sample" not in json.dumps(server.get("/queue")["queue_running"]) or "it/s" not in server.log[-300:]
    ):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    server.post("/interrupt", {})
    entry = server.finish(prompt_id)
    kinds = [kind for kind, _ in entry["status"]["messages"]]
    assert "execution_interrupted" in kinds and "execution_error" not in kinds
    assert server.run(text_to_video() | {"save": save(latent=["sample", 0])})


def test_same_graph_again_runs_nothing_twice(server):
    graph = text_to_video(seed=11) | {"show": node("PreviewAny", source=["sample", 1])}
    first = server.finish(server.start(graph))
    again = server.finish(server.start(graph))
    cached = next(
        content["nodes"] for kind, content in again["status"]["messages"] if kind == "execution_cached"
    )
    assert set(graph) - {"vae", "decode"} <= set(cached)
    assert first["outputs"] == again["outputs"]


def test_reports_say_what_was_used(server):
    graph = text_to_video(cfg=-1.0, steps=2) | {
        "a": node("PreviewAny", source=["model", 1]),
        "b": node("PreviewAny", source=["text", 2]),
        "c": node("PreviewAny", source=["sample", 1]),
    }
    graph["text"]["inputs"]["prompt"] = "word " * 400
    outputs = server.run(graph)
    assert "lite_i2v_5s" in outputs["a"]["text"][0]
    assert "cut off (limit 256)" in outputs["b"]["text"][0]
    assert "2 steps, guidance 5, shift 10, euler, seed 7" in outputs["c"]["text"][0]


def test_no_node_of_core_has_our_ids(server):
    """A node id that core has would be refused silently; every id of ours must answer from this pack."""
    modules = {name: info["python_module"] for name, info in server.get("/object_info").items()}
    ours = {name for name, module in modules.items() if module == f"custom_nodes.{server.folder}"}
    assert ours == set(NODE_IDS)
