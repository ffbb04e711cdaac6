"""What other packs and core's nodes patch into our MODEL takes effect, and changes nothing when it should not."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
import torch
from comfyui_kandinsky5.kandinsky_core.io import save_checkpoint, spec_metadata
from comfyui_kandinsky5.kandinsky_core.variants import VARIANTS
from safetensors.torch import load_file
from tiny_graphs import PICTURE, image_to_video, node, save, text_to_video
from torch.testing import assert_close

STEPS = 2


def watched(graph):
    """The graph with a watching patch on the model, and what it saw."""
    graph["watch"] = node("K5TestWatch", model=graph["sample"]["inputs"]["model"])
    graph["sample"]["inputs"]["model"] = ["watch", 0]
    return graph | {"seen": node("K5TestSeen", latent=["sample", 0]), "save": save(latent=["sample", 0])}


def test_wrappers_blocks_and_attention_are_called_and_neutral(server, saved):
    plain = saved(text_to_video(steps=STEPS) | {"save": save(latent=["sample", 0])})
    graph = watched(text_to_video(steps=STEPS, seed=7))
    outputs = server.run(graph)
    seen = json.loads(outputs["seen"]["seen"][0])
    calls = [entry for entry in seen if "call" in entry]
    # Prompts of different length run one after the other: two calls a step, two visual blocks a call.
    assert len(calls) == 2 * STEPS and calls[0]["call"] == [1, 33, 3, 6, 8] and calls[0]["patch"] == [1, 2, 2]
    assert [entry["block"] for entry in seen if "block" in entry] == [1] * len(calls)
    assert {entry["tokens"] for entry in seen if "block" in entry} == {3 * 3 * 4}
    assert [entry["attention"] for entry in seen if "attention" in entry] == [0, 1] * len(calls)
    assert_close(saved(graph)["latent"], plain["latent"])


def test_context_windows_pin_the_start_image_in_its_own_window_only(server):
    graph = image_to_video(["picture", 0], length=41, steps=1, cfg=1.0) | PICTURE
    graph["windows"] = node(
        "ContextWindowsManual", model=["model", 0], context_length=5, context_overlap=1,
        context_schedule="standard_static", context_stride=1, closed_loop=False, fuse_method="pyramid", dim=2,
        freenoise=False, latent_retain_index_list="", cond_retain_index_list="", split_conds_to_windows=False,
        causal_window_fix=False,
    )  # fmt: skip
    graph["sample"]["inputs"]["model"] = ["windows", 0]
    outputs = server.run(watched(graph))
    known = [entry["known"] for entry in json.loads(outputs["seen"]["seen"][0]) if "call" in entry]
    assert len(known) > 1 and sorted(known, reverse=True) == [1] + [0] * (len(known) - 1)


@pytest.mark.parametrize("dtype", ["bf16", "fp8_e4m3fn"])
def test_narrow_weights_give_nearly_the_same(saved, dtype):
    graph = text_to_video(steps=1, cfg=1.0) | {"save": save(latent=["sample", 0])}
    exact = saved(graph)["latent"]
    graph["model"]["inputs"]["dtype"] = dtype
    narrow = saved(graph)["latent"]
    error = ((narrow - exact).norm() / exact.norm()).item()
    assert 1e-5 < error < (0.02 if dtype == "bf16" else 0.2), error


@pytest.mark.parametrize("layout", ["scale_weight", "comfy_quant"])
def test_scaled_fp8_files_give_nearly_the_same(server, saved, layout):
    """ComfyUI's older and newer form of fp8 weights with a scale each."""
    graph = text_to_video(steps=1, cfg=1.0) | {"save": save(latent=["sample", 0])}
    exact = saved(graph)["latent"]
    folder = server.base / "models" / "diffusion_models"
    tensors = {}
    for name, value in load_file(folder / tiny.VIDEO).items():
        if "visual_transformer_blocks" not in name or value.ndim < 2:
            tensors[name] = value
            continue
        scale, layer = value.abs().max() / 448, name.removesuffix(".weight")
        tensors[name] = (value / scale).to(torch.float8_e4m3fn)
        if layout == "scale_weight":
            tensors[f"{layer}.scale_weight"] = scale
        else:
            tensors[f"{layer}.weight_scale"] = scale
            settings = json.dumps({"format": "float8_e4m3fn"}).encode()
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(settings), dtype=torch.uint8)
    if layout == "scale_weight":
        tensors["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    metadata = spec_metadata(replace(VARIANTS["lite_i2v_5s"], spec=tiny.VIDEO_SPEC))
    save_checkpoint(folder / f"k5_tiny_{layout}.safetensors", tensors, metadata)
    graph["model"]["inputs"]["model_name"] = f"k5_tiny_{layout}.safetensors"
    scaled = saved(graph)["latent"]
    error = ((scaled - exact).norm() / exact.norm()).item()
    assert 1e-5 < error < 0.1, error


def test_cache_and_rope_nodes_run_on_our_model(server):
    graph = text_to_video(steps=6) | {"save": save(latent=["sample", 0])}
    graph["cache"] = node(
        "EasyCache",
        model=["model", 0],
        reuse_threshold=0.9,
        start_percent=0.0,
        end_percent=1.0,
        verbose=False,
    )
    graph["rope"] = node(
        "ScaleROPE",
        model=["cache", 0],
        scale_x=0.5,
        shift_x=3.0,
        scale_y=0.5,
        shift_y=0.0,
        scale_t=1.0,
        shift_t=0.0,
    )
    graph["sample"]["inputs"]["model"] = ["rope", 0]
    server.run(graph)
    assert "EasyCache - skipped" in server.log


def test_preset_positions_equal_the_scale_node(saved):
    """The variant's position scale is (1, 2, 2); core's node multiplies positions instead of dividing them."""
    graph = text_to_video(steps=1, cfg=1.0) | {"save": save(latent=["sample", 0])}
    preset = saved(graph)["latent"]
    graph["rope"] = node(
        "ScaleROPE",
        model=["model", 0],
        scale_x=0.5,
        shift_x=0.0,
        scale_y=0.5,
        shift_y=0.0,
        scale_t=1.0,
        shift_t=0.0,
    )
    graph["sample"]["inputs"]["model"] = ["rope", 0]
    assert_close(saved(graph)["latent"], preset)
    graph["rope"]["inputs"]["scale_x"] = 1.0
    assert (saved(graph)["latent"] - preset).abs().max() > 1e-4


def test_part_of_a_latent_is_kept_by_denoise_and_mask(saved):
    graph = text_to_video(steps=4) | {"save": save(latent=["again", 0])}
    graph["again"] = {
        **graph["sample"],
        "inputs": {**graph["sample"]["inputs"], "latent": ["sample", 0], "seed": 1},
    }
    graph["again"]["inputs"] |= {"denoise": 0.2, "cfg": 1.0}
    first = saved(graph | {"save": save(latent=["sample", 0])})["latent"]
    near = saved(graph)["latent"]
    graph["again"]["inputs"]["denoise"] = 1.0
    far = saved(graph)["latent"]
    assert 0 < (near - first).norm() < 0.8 * (far - first).norm()
