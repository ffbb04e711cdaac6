"""Decoding in a real ComfyUI: the latent is on disk first, and core's own node reads it."""

from __future__ import annotations

import json
import time

import pytest
import tiny
import torch
from comfyui_kandinsky5.kandinsky_core.io import save_checkpoint
from comfyui_kandinsky5.kandinsky_core.io.latents import read_latent, saved_latents
from comfyui_kandinsky5.kandinsky_core.io.media import read_video
from comfyui_kandinsky5.nodes import host as door
from comfyui_kandinsky5.nodes.decode import Wanted, decode_images
from comfyui_kandinsky5.nodes.host_standalone import StandaloneHost
from compiler import can_compile
from safetensors.torch import load_file
from tiny_graphs import node, save, text_to_video
from torch.testing import assert_close


@pytest.fixture
def latents(server):
    """The latents that the server keeps, newest first; emptied before the test."""
    folder = server.base / "output" / "latents"
    for path in saved_latents(folder):
        path.unlink()
    return lambda: saved_latents(folder)


def test_a_decoded_latent_is_kept_and_loaded_by_both_nodes(server, saved, latents):
    graph = text_to_video(seed=21)
    first = saved(graph | {"save": save(latent=["sample", 0], image=["decode", 0])})
    (path,) = latents()
    kept = read_latent(path)
    assert torch.equal(kept.samples, first["latent"])
    assert kept.facts == {
        "variant": "lite_i2v_5s", "fps": 24, "seed": 21, "mode": "reference", "vae": tiny.VIDEO_VAE,
    }  # fmt: skip
    assert json.loads(kept.metadata["prompt"])["sample"]["inputs"]["seed"] == 21
    resumed = {
        "vae": graph["vae"],
        "decode": node("K5VAEDecode", vae=["vae", 0], latent=["load", 0]),
        "save": save(latent=["load", 0], image=["decode", 0]),
    }
    for load in (
        node("K5LoadLatent", latent_name=path.name),
        node("LoadLatent", latent=f"latents/{path.name} [output]"),
    ):
        again = saved(resumed | {"load": load})
        assert torch.equal(again["latent"], first["latent"]) and torch.equal(again["image"], first["image"])
    assert latents() == [path]


def test_a_failed_decode_names_the_latent(server, latents):
    graph = text_to_video(seed=22) | {"save": save(image=["decode", 0])}
    graph["vae"]["inputs"]["vae_name"] = tiny.IMAGE_VAE
    entry = server.finish(server.start(graph))
    (path,) = latents()
    assert f"The latent is safe: {path}. Resume from it with the node Kandinsky 5 Load Latent" in server.error(entry)


def test_a_name_outside_the_folder_is_refused(server):
    graph = {
        "load": node("K5LoadLatent", latent_name="../../models/vae/x.latent"),
        "save": save(latent=["load", 0]),
    }
    status, answer = server.post("/prompt", {"prompt": graph})
    assert status == 400 and "is not there any more" in json.dumps(answer["node_errors"])


def tiled(**changes):
    """Our tiled decode of the sampled latent."""
    settings = {"mode": "auto", "memory_gb": 0.0, "keep_latents": 8, "latent": ["sample", 0]} | changes
    return node("K5VAEDecodeTiled", vae=["vae", 0], **settings)


def report_of(server, graph, name="decode", slot=1):
    entry = server.finish(server.start(graph | {"told": node("PreviewAny", source=[name, slot])}))
    assert entry["status"]["status_str"] == "success", server.error(entry)
    return entry["outputs"]["told"]["text"][0]


def test_a_memory_plan_reaches_the_decoder(server):
    settings = {"budget": "12 GB", "custom_gb": 12.0, "attention": "auto", "kept": 0.25, "cfg": -1.0, "steps": 0}
    settings |= {"resident_blocks": -1, "prefetch": -1, "hidden_pieces": 0, "head_groups": 0, "stream_text": "auto"}
    settings |= {"decode_mode": "late-tile", "measure": False, "width": 64, "height": 64, "length": 1, "batch_size": 1}
    graph = text_to_video(seed=24, length=25)
    graph |= {"plan": node("K5MemoryPlan", model=["model", 0], latent=["empty", 0], **settings)}
    assert "25 frames of" in (report := report_of(server, graph | {"decode": tiled(plan=["plan", 1])}))
    assert ": late-tile: " in report.splitlines()[0]


@pytest.mark.parametrize("mode", ["reference", "stream", "late-tile", "single-pass"])
def test_every_mode_is_that_of_the_standalone_host(server, saved, mode, tmp_path, monkeypatch):
    graph = text_to_video(seed=23, length=25) | {"decode": tiled(mode=mode)}
    found = saved(graph | {"save": save(latent=["sample", 0], image=["decode", 0])})
    host = StandaloneHost(models=server.base / "models", output=tmp_path, device="cpu")
    monkeypatch.setattr(door, "_current", [host])
    vae = host.load_vae(server.base / "models" / "vae" / tiny.VIDEO_VAE, dtype="auto")
    image, _ = decode_images(vae, found["latent"], Wanted(mode=mode))
    assert_close(found["image"], image, atol=1e-4, rtol=1e-4)


@pytest.fixture
def scarce(server):
    """Run a graph whose decode runs out of memory so many times; afterwards memory is there again."""

    def run(seed, attempts):
        graph = text_to_video(seed=seed, length=21) | {
            "scarce": node("K5TestOutOfMemory", latent=["sample", 0], attempts=attempts, after=40),
            "decode": tiled(mode="late-tile", latent=["scarce", 0]),
            "save": save(image=["decode", 0]),
            "told": node("PreviewAny", source=["decode", 1]),
            "loaded": node("K5TestLoaded", after=["decode", 0]),
        }
        return server.finish(server.start(graph))

    yield run
    assert run(0, 0)["status"]["status_str"] == "success"


@pytest.mark.parametrize("attempts", [1, 2])
def test_running_out_of_memory_walks_the_ladder(server, saved, scarce, attempts):
    graph = text_to_video(seed=24, length=21) | {"decode": tiled(mode="late-tile")}
    calm = saved(graph | {"save": save(image=["decode", 0])})["image"]
    entry = scarce(24, attempts)
    assert entry["status"]["status_str"] == "success", server.error(entry)
    assert entry["outputs"]["told"]["text"][0].count("Out of memory after") == attempts
    assert entry["outputs"]["loaded"]["loaded"] == ["HostedVAE"]  # the transformer and the text encoder have left
    image = load_file(entry["outputs"]["save"]["path"][0])["image"]
    # Statistics are sampled in smaller pieces of the clip: those of random weights differ more than trained ones'.
    assert (image - calm).square().mean() < 1e-3


def test_when_nothing_helps_the_error_names_the_latent(server, scarce, latents):
    """The processor is the last rung; here the fault goes on there."""
    error = server.error(scarce(28, 1000))
    assert "out of memory" in error and f"The latent is safe: {latents()[0]}" in error
    assert "on the processor, which is slow" in server.log


def test_cores_own_vae_decodes_in_the_causal_graph(server, saved, tmp_path, monkeypatch):
    graph = text_to_video(seed=25, length=25) | {"vae": node("K5TestCoreVAE"), "decode": tiled(mode="stream")}
    found = saved(graph | {"save": save(latent=["sample", 0], image=["decode", 0])})
    weights = load_file(server.base / "temp" / "core_vae.safetensors")
    path = tmp_path / "core_vae.safetensors"
    save_checkpoint(path, weights, {"kandinsky5.vae": '{"norm_num_groups": 32}'})
    host = StandaloneHost(models=tmp_path, output=tmp_path, device="cpu")
    monkeypatch.setattr(door, "_current", [host])
    image, _ = decode_images(host.load_vae(path, dtype="fp32"), found["latent"], Wanted(mode="stream"))
    assert_close(found["image"], image, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("vae", ["ours", "core's"])
def test_compiled_norms_give_the_same_frames(server, saved, vae):
    """Under core's inference mode, over layers of core's."""
    graph = text_to_video(seed=31, length=25)
    if vae == "core's":
        graph["vae"] = node("K5TestCoreVAE")
    plain, fused = (
        saved(graph | {"decode": tiled(mode="stream", compile=compile), "save": save(image=["decode", 0])})["image"]
        for compile in (False, True)
    )
    assert_close(fused, plain, atol=1e-4, rtol=1e-4)
    report = report_of(server, graph | {"decode": tiled(mode="stream", compile=True)})
    assert ("torch.compile is left" in report) != can_compile()


def test_cores_own_vae_encodes_clips_as_ours(server, saved, tmp_path, monkeypatch):
    graph = text_to_video(seed=29, length=25) | {
        "core": node("K5TestCoreVAE"),
        "encode": node("K5VAEEncode", vae=["core", 0], image=["decode", 0]),
    }
    found = saved(graph | {"save": save(latent=["encode", 0], image=["decode", 0])})
    path = tmp_path / "core_vae.safetensors"
    weights = load_file(server.base / "temp" / "core_vae.safetensors")
    save_checkpoint(path, weights, {"kandinsky5.vae": '{"norm_num_groups": 32}'})
    host = StandaloneHost(models=tmp_path, output=tmp_path, device="cpu")
    monkeypatch.setattr(door, "_current", [host])
    latent = host.vae_encode(host.load_vae(path, dtype="fp32"), found["image"])
    assert_close(found["latent"], latent, atol=1e-4, rtol=1e-4)


def test_a_clip_goes_straight_into_a_file(server, saved):
    graph = text_to_video(seed=26, length=25) | {
        "decode": node(
            "K5DecodeVideo", vae=["vae", 0], latent=["sample", 0], fps=0.0, filename_prefix="k5/%width%", format="mkv",
            codec="lossless", crf=14.0, mode="late-tile", memory_gb=0.0, keep_latents=8,
        ),
        "frames": node("GetVideoComponents", video=["decode", 0]),
        "told": node("PreviewAny", source=["decode", 1]),
        "save": save(image=["frames", 0]),
    }  # fmt: skip
    outputs = server.run(graph)
    path = server.file(outputs["decode"]["images"][0])
    assert path.parent.name == "k5" and path.name.startswith("64_0000") and outputs["decode"]["animated"] == [True]
    clip = read_video(path)
    assert clip.fps == 24 and clip.frames_THW3.shape == (25, 48, 64, 3)
    assert json.loads(clip.metadata["PROMPT"])["sample"]["inputs"]["seed"] == 26
    frames = load_file(outputs["save"]["path"][0])["image"]
    assert (frames - clip.frames_THW3).abs().max() < 2 / 255  # core converts the colours itself
    assert "late-tile" in outputs["told"]["text"][0]


def test_a_prefix_outside_the_output_folder_is_refused(server):
    graph = text_to_video() | {
        "decode": node(
            "K5DecodeVideo", vae=["vae", 0], latent=["sample", 0], fps=0.0, filename_prefix="../x", format="mp4",
            codec="h264", crf=14.0, mode="auto", memory_gb=0.0, keep_latents=0,
        ),
    }  # fmt: skip
    status, answer = server.post("/prompt", {"prompt": graph})
    assert status == 400 and "leads out of the output folder" in json.dumps(answer["node_errors"])


def test_a_cancelled_decode_leaves_its_latent_and_no_half_file(server, latents):
    graph = text_to_video(seed=27, width=256, height=256, length=97, steps=1) | {
        "decode": node(
            "K5DecodeVideo", vae=["vae", 0], latent=["sample", 0], fps=0.0, filename_prefix="cancelled/x", format="mp4",
            codec="h264", crf=14.0, mode="stream", memory_gb=0.0, keep_latents=8,
        ),
    }  # fmt: skip
    prompt_id = server.start(graph)
    deadline = time.monotonic() + 120
    while not latents():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    server.post("/interrupt", {})
    entry = server.finish(prompt_id)
    assert "execution_interrupted" in [kind for kind, _ in entry["status"]["messages"]]
    assert len(latents()) == 1
    assert not [path for path in (server.base / "output" / "cancelled").rglob("*") if path.is_file()]
