"""What our nodes make of core's objects and folders that are not what they expect, in the real ComfyUI."""

from __future__ import annotations

import pytest
import tiny
from tiny_graphs import loaders, node, save, text_to_video


def test_vaes_of_other_models_are_not_taken_for_ours(server):
    kinds = server.run({"show": node("K5TestVAEs")})["show"]["kinds"][0]
    assert kinds == {"hunyuan": "hunyuan", "wan": None, "flux": "flux", "other image": None, "tiny image": None}


def test_model_of_cores_loader_is_said_to_be_assumed(server):
    graph = {"model": node("UNETLoader", unet_name=tiny.VIDEO, weight_dtype="default")}
    core = server.run(graph | {"show": node("K5TestModel", model=["model", 0])})["show"]
    assert "assumed (no published model has its width, 128)" in core["note"][0]
    ours = server.run(loaders() | {"show": node("K5TestModel", model=["model", 0])})["show"]
    assert ours == {"variant": ["lite_i2v_5s"], "note": [""]}


@pytest.mark.parametrize("shift", [0.0, 3.0])
@pytest.mark.parametrize(
    "patch",
    [
        node("ModelSamplingAuraFlow", model=["model", 0], shift=3.0),
        node("ModelSamplingFlux", model=["model", 0], max_shift=1.15, base_shift=0.5, width=64, height=48),
    ],
    ids=lambda patch: patch["class_type"],
)
def test_sampling_that_is_not_ours_is_refused(server, patch, shift):
    graph = text_to_video(shift=shift) | {"patch": patch, "save": save(latent=["sample", 0])}
    graph["sample"]["inputs"]["model"] = ["patch", 0]
    entry = server.finish(server.start(graph))
    assert entry["status"]["status_str"] == "error" and "use ModelSamplingSD3" in server.error(entry)


def test_picture_latent_decodes_as_a_clip_of_one_frame(saved):
    graph = loaders() | {
        "empty": node("EmptySD3LatentImage", width=64, height=48, batch_size=2),
        "whole": node("VAEDecode", vae=["vae", 0], samples=["empty", 0]),
        "tiled": node(
            "VAEDecodeTiled", vae=["vae", 0], samples=["empty", 0], tile_size=64, overlap=16, temporal_size=16,
            temporal_overlap=4,
        ),
    }  # fmt: skip
    for decoder in ("whole", "tiled"):
        assert saved(graph | {"save": save(image=[decoder, 0])})["image"].shape == (2, 48, 64, 3)


def test_report_tells_what_clip_leaves_out_also_from_the_cache(server):
    graph = loaders()
    graph["text"]["inputs"] |= {"prompt": "x" * 100}
    for seen in ("first", "cached"):  # another negative prompt: the node runs again
        graph["text"]["inputs"]["negative_prompt"] = seen
        report = server.run(graph | {"show": node("PreviewAny", source=["text", 2])})["show"]["text"][0]
        assert "CLIP keeps 77 tokens of the prompt and drops 25; Qwen reads the whole prompt" in report


def test_stray_configuration_hides_no_file(server):
    folder = server.base / "models" / "vae" / "mixed"
    folder.mkdir()
    (folder / "config.json").write_text('{"note": "mine"}', encoding="utf-8")
    (folder / "one.safetensors").write_bytes(
        (server.base / "models" / "vae" / tiny.VIDEO_VAE).read_bytes()
    )
    listed = server.get("/object_info/K5LoadVAE")["K5LoadVAE"]["input"]["required"]["vae_name"][1]["options"]
    assert "mixed/one.safetensors" in listed and "mixed" not in listed
    graph = text_to_video() | {"save": save(image=["decode", 0])}
    graph["vae"]["inputs"]["vae_name"] = "mixed/one.safetensors"
    server.run(graph)
    for name in ("mixed", "mixed/config.json", "../vae/mixed/one.safetensors", str(folder / "one.safetensors")):
        graph["vae"]["inputs"]["vae_name"] = name
        assert "not there" in str(server.post("/prompt", {"prompt": graph})[1]["node_errors"]), name
