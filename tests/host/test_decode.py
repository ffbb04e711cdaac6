"""Decoding in a real ComfyUI: the latent is on disk first, and core's own node reads it."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from comfyui_kandinsky5.kandinsky_core.io.latents import read_latent, saved_latents
from tiny_graphs import node, save, text_to_video


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
    assert kept.facts == {"variant": "lite_i2v_5s", "fps": 24, "seed": 21, "vae": graph["vae"]["inputs"]["vae_name"]}
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
