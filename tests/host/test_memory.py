"""The memory nodes in the real ComfyUI: estimate, plan, what core is told, what was measured."""

from __future__ import annotations

import re

import pytest
import tiny
from tiny_graphs import loaders, node, save, text_to_video
from torch.testing import assert_close

SIZES = {"width": 128, "height": 96, "length": 9, "batch_size": 1}
ATTENTION = {"attention": "auto", "kept": 0.25, "cfg": -1.0, "steps": 0}
ESTIMATE = SIZES | ATTENTION | {
    "variant": "lite_t2v_5s_sft", "precision": "bf16", "start_image": False, "budget": "12 GB", "custom_gb": 12.0,
}  # fmt: skip
PLAN = SIZES | ATTENTION | {
    "budget": "12 GB", "custom_gb": 12.0, "resident_blocks": -1, "prefetch": -1, "hidden_pieces": 0, "head_groups": 0,
    "stream_text": "auto", "decode_mode": "auto", "measure": False,
}  # fmt: skip


CORES = node("UNETLoader", unet_name=tiny.VIDEO, weight_dtype="default")


def shown(server, graph, at: str, slot: int) -> str:
    return server.run(graph | {"show": node("PreviewAny", source=[at, slot])})["show"]["text"][0]


def planned(graph, **changes):
    """The graph with a plan between its model and its sampler."""
    made = graph | {"plan": node("K5MemoryPlan", model=["model", 0], **(PLAN | changes))}
    made["sample"] = {**made["sample"], "inputs": {**made["sample"]["inputs"], "model": ["plan", 0]}}
    return made


def clip(**changes):
    return text_to_video(width=128, height=96, steps=2, cfg=3.0, shift=5.0, **changes)


def test_an_estimate_runs_without_weights_and_names_cores_mode(server):
    report = shown(server, {"estimate": node("K5MemoryEstimate", **ESTIMATE)}, "estimate", 0)
    assert "Video Lite 2B" in report and "12 GB: fits" in report
    assert re.search(r"Here weights are moved by: \w+ \(.+\)\.", report)


@pytest.mark.parametrize("loader", ["ours", "core's"])
def test_an_estimate_reads_a_connected_model(server, loader):
    graph = loaders() if loader == "ours" else {"model": CORES}
    graph |= {"estimate": node("K5MemoryEstimate", model=["model", 0], **ESTIMATE)}
    assert "weights, dense attention" in shown(server, graph, "estimate", 0)


def test_auto_is_what_core_calls_free(server):
    report = shown(server, {"estimate": node("K5MemoryEstimate", **(ESTIMATE | {"budget": "auto"}))}, "estimate", 0)
    assert float(re.search(r"With ([\d.]+) GB", report)[1]) > 0.5


def test_pieces_change_nothing_but_memory(saved):
    whole = saved(clip() | {"save": save(latent=["sample", 0])})["latent"]
    cut = saved(planned(clip(), hidden_pieces=3, head_groups=2) | {"save": save(latent=["sample", 0])})["latent"]
    assert_close(cut, whole, atol=1e-4, rtol=1e-4)


def test_the_sampler_reports_what_was_measured(server):
    graph = planned(clip(), measure=True)
    line = r"memory: [\d.]+ MB of live tensors at the peak; estimated [\d.]+ MB"
    assert re.search(line, shown(server, graph, "sample", 1))
    assert "memory:" not in shown(server, planned(clip()), "sample", 1)


def test_a_plan_works_on_the_model_of_cores_loader(server):
    graph = planned(clip() | {"model": CORES})
    assert "Weights are moved by" in shown(server, graph, "plan", 2)
    server.run(graph | {"save": save(latent=["sample", 0])})
