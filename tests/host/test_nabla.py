"""Block-sparse attention in the real ComfyUI: our MODEL and core's, core's sampler, other patches around it."""

from __future__ import annotations

import json

import pytest
import tiny
from tiny_graphs import PICTURE, image_to_video, node, save, text_to_video
from torch.testing import assert_close

SETTINGS = {
    "attention": "on", "P": 0.4, "wT": 1, "wH": 1, "wW": 1, "kernel": "auto", "dense_first_steps": 0,
    "dense_last_steps": 0, "dense_first_blocks": 0, "dense_last_blocks": 0, "min_tokens": 0,
}  # fmt: skip
SIZE = {"width": 384, "height": 256}  # 16 x 24 tokens a frame: on 8 x 8 a wrong token order would not show
RAGGED = {"width": 304, "height": 208}
SAVE = {"save": save(latent=["sample", 0])}


def graph(size=SIZE, **changes):
    """A two-step run at a size of several tiles a frame."""
    return text_to_video(**size, steps=2, cfg=3.0, shift=5.0, **changes) | SAVE


def with_nabla(made, at: str = "model", name: str = "nabla", **changes):
    """The graph with a NABLA node on the output of node `at`, in front of the sampler."""
    made = dict(made)
    made[name] = node("K5Nabla", model=[at, 0], **(SETTINGS | changes))
    made["sample"] = {**made["sample"], "inputs": {**made["sample"]["inputs"], "model": [name, 0]}}
    return made


def core_loader(made):
    """The same graph on the MODEL that core's own loader gives."""
    return made | {"model": node("UNETLoader", unet_name=tiny.VIDEO, weight_dtype="default")}


@pytest.fixture
def sparse(saved):
    return saved(with_nabla(graph()))["latent"]


@pytest.mark.parametrize("size", [SIZE, RAGGED], ids=["whole", "ragged"])
def test_all_mass_is_dense_and_less_is_not(saved, size):
    dense = saved(graph(size))["latent"]
    assert_close(saved(with_nabla(graph(size), P=1.0))["latent"], dense, atol=1e-4, rtol=1e-4)
    assert (saved(with_nabla(graph(size)))["latent"] - dense).abs().max() > 1e-2


@pytest.mark.parametrize("size", [SIZE, RAGGED], ids=["whole", "ragged"])
def test_cores_model_gives_the_same(saved, size):
    ours = saved(with_nabla(graph(size)))["latent"]
    theirs = saved(with_nabla(core_loader(graph(size))))["latent"]
    # Core's positions differ in their last bits, which may move a block at the edge of the selection.
    assert (theirs - ours).norm() / ours.norm() < 5e-3
    dense = saved(core_loader(graph(size)))["latent"]
    assert (theirs - dense).norm() / dense.norm() > 2e-2


def test_cores_sampler_gives_the_same(saved, sparse):
    made = with_nabla(graph())
    given = made["sample"]["inputs"]
    made["shift"] = node("ModelSamplingSD3", model=given["model"], shift=5.0)
    made["sample"] = node(
        "KSampler", model=["shift", 0], positive=["text", 0], negative=["text", 1], latent_image=["empty", 0], seed=7,
        steps=2, cfg=3.0, sampler_name="euler", scheduler="simple", denoise=1.0,
    )  # fmt: skip
    assert_close(saved(made)["latent"], sparse, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("loader", ["ours", "core"])
@pytest.mark.parametrize("place", ["before", "after"])
def test_another_attention_override_before_or_after(server, saved, place, loader):
    start = graph() if loader == "ours" else core_loader(graph())
    alone = saved(with_nabla(start))["latent"]
    if place == "before":
        watch = node("K5TestWatch", model=["model", 0], blocks=loader == "ours")
        made = with_nabla(start | {"watch": watch}, at="watch")
    else:
        made = with_nabla(start)
        made["watch"] = node("K5TestWatch", model=["nabla", 0], blocks=loader == "ours")
        made["sample"]["inputs"]["model"] = ["watch", 0]
    made["seen"] = node("K5TestSeen", latent=["sample", 0])
    seen = json.loads(server.run(made)["seen"]["seen"][0])
    assert_close(saved(made)["latent"], alone, atol=1e-5, rtol=1e-5)
    # The other override sees what is not visual self-attention: on our model nothing, on core's text and cross.
    calls = [entry for entry in seen if "attention" in entry]
    assert bool(calls) == (loader == "core")


def test_the_given_model_stays_as_it_is(saved, sparse):
    made = with_nabla(graph())
    made["dense"] = {**made["sample"], "inputs": {**made["sample"]["inputs"], "model": ["model", 0]}}
    both = saved(made | {"save": save(latent=["dense", 0])})["latent"]
    assert_close(both, saved(graph())["latent"])
    assert_close(saved(made | SAVE)["latent"], sparse)


def test_the_last_node_counts(saved, sparse):
    made = with_nabla(graph(), P=0.9, name="first")
    assert_close(saved(with_nabla(made, at="first"))["latent"], sparse)


def test_off_and_short_clips_are_dense(saved):
    dense = saved(graph())["latent"]
    for changes in ({"attention": "off"}, {"attention": "auto"}, {"min_tokens": 10**6}, {"dense_last_blocks": 9}):
        assert_close(saved(with_nabla(graph(), **changes))["latent"], dense, atol=1e-4, rtol=1e-4)


def test_image_to_video_and_batches(saved):
    made = image_to_video(["picture", 0], **SIZE, length=9, steps=1, cfg=3.0) | PICTURE | SAVE
    dense = saved(made)["latent"]
    assert_close(saved(with_nabla(made, P=1.0))["latent"], dense, atol=1e-4, rtol=1e-4)
    two = saved(with_nabla(graph(batch=2)))["latent"]
    assert two.shape[0] == 2 and (two[0] - two[1]).abs().max() > 1e-2


def test_report(server):
    made = with_nabla(graph())
    made["report"] = node("K5NablaReport", model=["nabla", 0], latent=["sample", 0])
    made["picture"] = node("PreviewImage", images=["report", 1])
    outputs = server.run(made)
    [data] = outputs["report"]["kandinsky5_nabla"]
    assert data["tokens_thw"] == [3, 16, 24] and data["P"] == 0.4 and data["kernels"] == {"torch": 8}
    assert len(data["kept"]) == 2 and all(0.1 < share < 0.9 for step in data["kept"] for share in step)
    assert outputs["picture"]["images"]


@pytest.mark.parametrize("loader", ["ours", "core"])
def test_training_that_computes_blocks_again(server, saved, loader):
    """With a dense block behind a sparse one, a block that is computed again must know which one it is."""
    made = graph() if loader == "ours" else core_loader(graph())
    made = with_nabla(made, dense_last_blocks=1)
    tuned = []
    for again in (False, True):
        made["train"] = node(
            "TrainLoraNode", model=["nabla", 0], latents=["sample", 0], positive=["text", 0], batch_size=1,
            grad_accumulation_steps=1, steps=2, learning_rate=0.05, rank=2, optimizer="AdamW", loss_function="MSE",
            seed=0, training_dtype="fp32", lora_dtype="fp32", quantized_backward=False, algorithm="LoRA",
            gradient_checkpointing=again, checkpoint_depth=2, offloading=False, existing_lora="[None]",
            bucket_mode=False, bypass_mode=False,
        )  # fmt: skip
        made["tuned"] = node(
            "LoraModelLoader", model=["nabla", 0], lora=["train", 0], strength_model=1.0, bypass=False
        )
        made["second"] = {**made["sample"], "inputs": {**made["sample"]["inputs"], "model": ["tuned", 0]}}
        made["save"] = save(latent=["second", 0])
        tuned.append(saved(made)["latent"])
    assert_close(tuned[1], tuned[0], atol=1e-4, rtol=1e-4)
    assert (tuned[0] - saved(made | SAVE)["latent"]).abs().max() > 1e-3
