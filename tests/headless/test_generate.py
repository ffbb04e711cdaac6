"""The graph for one wish: which built-in files go together, and which nodes a picture calls for."""

from __future__ import annotations

import pytest
from comfyui_kandinsky5.headless.generate import Wish, build
from comfyui_kandinsky5.headless.graph import Link
from comfyui_kandinsky5.kandinsky_core import nano
from comfyui_kandinsky5.kandinsky_core.errors import CheckpointError
from comfyui_kandinsky5.nodes.files import built_in


def calls(host, **wish):
    """Inputs of the graph's nodes by type."""
    graph = build(Wish(prompt="a red circle", **wish), host)
    return {call.type: call.inputs for call in graph.values()}


@pytest.mark.parametrize("frames", [1, 25])
def test_a_budget_reaches_the_sampler_the_text_encoder_and_the_decoder(host, frames):
    model = "nano-image" if frames == 1 else "nano"
    free, bound = (calls(host, model=model, frames=frames, budget=budget) for budget in (None, "12"))
    assert "K5MemoryPlan" not in free and bound["K5MemoryPlan"]["budget"] == "12 GB"
    plan = bound["K5VAEDecodeTiled"].pop("plan")
    assert (bound["K5Sample"]["model"].slot, bound["K5EncodeText"]["clip"].slot, plan.slot) == (0, 3, 1)
    assert bound["K5Sample"]["model"].call == bound["K5EncodeText"]["clip"].call == plan.call
    assert bound["K5VAEDecodeTiled"]["mode"] == free["K5VAEDecodeTiled"]["mode"] == "auto"


@pytest.mark.parametrize(
    ("model", "key", "vae"),
    [("nano-image", "image_model", "image_vae"), ("nano-edit", "edit_model", "image_vae")],
)
def test_built_in_models_bring_their_companions(host, model, key, vae):
    made = calls(host, model=model)
    assert made["K5LoadModel"]["model_name"] == built_in(key)
    assert made["K5LoadVAE"]["vae_name"] == built_in(vae)
    assert made["K5LoadTextEncoder"]["qwen_name"] == built_in("text_encoder")
    assert made["K5EmptyLatent"]["length"] == 1 and "SaveImage" in made
    assert made == calls(host, model=built_in(key))


def test_a_picture_for_an_editing_model_is_edited_at_its_own_shape(host, tmp_path):
    made = calls(host, model="nano-edit", image=tmp_path / "picture.png")
    assert made["K5ImageEdit"]["size"] == "as the image"
    assert isinstance(made["K5ImageEdit"]["model"], Link)
    assert made["K5Sample"]["latent"].slot == 2
    assert not {"K5EncodeText", "K5EmptyLatent", "K5ImageToVideo"} & made.keys()
    chosen = calls(host, model="nano-edit", image=tmp_path / "picture.png", width=64)["K5ImageEdit"]
    assert (chosen["size"], chosen["width"], chosen["height"]) == ("custom", 64, 128)


def test_a_missing_built_in_file_is_named(host, tmp_path, monkeypatch):
    paths = nano.files(tmp_path)
    monkeypatch.setattr(nano, "files", lambda: paths)
    with pytest.raises(CheckpointError, match="k5_nano_edit.* is missing from this installation"):
        calls(host, model="nano-edit")
