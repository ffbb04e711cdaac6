"""Our loaders' objects on core's nodes, and core's objects on ours, in the real ComfyUI."""

from __future__ import annotations

import tiny
import torch
from comfyui_kandinsky5.kandinsky_core.io import save_checkpoint
from tiny_graphs import (
    PICTURE,
    edit,
    image_to_video,
    loaders,
    node,
    sampler,
    save,
    text_to_image,
    text_to_video,
)
from torch.testing import assert_close

EVERYTHING = {"save": save(latent=["sample", 0], image=["decode", 0], conditioning=["text", 0])}


def core_sampler(latent: str = "empty", **changes):
    settings = {
        "seed": 7,
        "steps": 4,
        "cfg": 5.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
    }
    return node(
        "KSampler", model=["model", 0], positive=["text", 0], negative=["text", 1], latent_image=[latent, 0],
        **(settings | changes),
    )  # fmt: skip


def test_text_to_video_gives_a_clip(saved):
    result = saved(text_to_video() | EVERYTHING)
    assert result["latent"].shape == (1, 16, 3, 6, 8)
    assert result["image"].shape == (9, 48, 64, 3)
    assert result["features0"].ndim == 3 and result["features0"].shape[2] == 3584
    assert 0 <= result["image"].min() < result["image"].max() <= 1


def test_core_sampler_and_decoder_on_our_objects(saved):
    ours = saved(text_to_video(shift=10.0, cfg=5.0) | EVERYTHING)
    core = text_to_video() | EVERYTHING | {
        "sample": core_sampler(),
        "decode": node("VAEDecode", vae=["vae", 0], samples=["sample", 0]),
    }  # fmt: skip
    theirs = saved(core)
    # Core's 'simple' schedule is a table of 1000 entries: equal to ours for step counts that divide 1000.
    assert_close(theirs["latent"], ours["latent"], atol=1e-4, rtol=1e-4)
    both = text_to_video() | {"core": node("VAEDecode", vae=["vae", 0], samples=["sample", 0])}
    mine = saved(both | {"save": save(image=["decode", 0])})["image"]
    assert_close(saved(both | {"save": save(image=["core", 0])})["image"], mine)


def test_core_sampler_reads_our_start_image(saved):
    graph = image_to_video(["picture", 0], shift=10.0, cfg=5.0) | PICTURE
    ours = saved(graph | {"save": save(latent=["sample", 0], conditioning=["start", 0])})
    settings = graph["sample"]["inputs"]
    graph["sample"] = core_sampler() | {"inputs": core_sampler()["inputs"] | {
        "positive": settings["positive"], "negative": settings["negative"], "latent_image": settings["latent"],
    }}  # fmt: skip
    theirs = saved(graph | {"save": save(latent=["sample", 0])})
    # Beyond the frames that our sampler puts back and normalises, both are the same run.
    assert_close(theirs["latent"][:, :, 4:], ours["latent"][:, :, 4:], atol=1e-4, rtol=1e-4)


def test_core_sampler_reads_our_picture_to_edit(saved):
    graph = edit(["picture", 0], cfg=3.5) | PICTURE
    ours = saved(graph | {"save": save(latent=["sample", 0], conditioning=["edit", 1])})
    assert ours["concat_latent_image0"].shape == (1, 16, 6, 8)  # the negative prompt has it, too
    graph["sample"] = core_sampler() | {"inputs": core_sampler()["inputs"] | {
        "positive": ["edit", 0], "negative": ["edit", 1], "latent_image": ["edit", 2], "cfg": 3.5,
    }}  # fmt: skip
    assert_close(saved(graph | {"save": save(latent=["sample", 0])})["latent"], ours["latent"], atol=1e-4, rtol=1e-4)
    graph["picture"] = node("EmptyImage", **PICTURE["picture"]["inputs"] | {"color": 0x2060C0})
    other = saved(graph | {"save": save(latent=["sample", 0])})["latent"]
    assert (other - ours["latent"]).abs().max() > 1e-2


def test_start_frame_is_kept_and_normalisation_can_be_chosen(saved):
    graph = image_to_video(["picture", 0], first_frame="off") | PICTURE
    saving = {"save": save(latent=["sample", 0], conditioning=["start", 0])}
    plain = saved(graph | saving)
    assert_close(plain["latent"][:, :, :1], plain["time_dim_replace0"], atol=1e-5, rtol=1e-5)
    graph["sample"] = sampler("start", ("start", 2), first_frame="auto")
    normalised = saved(graph | saving)  # the variant was released with it
    assert_close(normalised["latent"][:, :, 4:], plain["latent"][:, :, 4:])
    assert (normalised["latent"][:, :, :4] - plain["latent"][:, :, :4]).abs().max() > 1e-3


def test_text_to_image_gives_a_picture(saved):
    result = saved(text_to_image() | EVERYTHING)
    assert result["latent"].shape == (1, 16, 6, 8)
    assert result["image"].shape == (1, 48, 64, 3)
    edit = saved(text_to_image(tiny.EDIT) | EVERYTHING)  # editing weights make pictures from text alone, too
    assert edit["image"].shape == (1, 48, 64, 3)


def test_our_sampler_on_cores_loader(saved):
    """Core's network rounds positions to 16 bits in half precision; here everything is float32."""
    graph = text_to_video(shift=5.0, steps=2, cfg=1.0)
    ours = saved(graph | {"save": save(latent=["sample", 0])})
    graph["model"] = node("UNETLoader", unet_name=tiny.VIDEO, weight_dtype="default")
    core = saved(graph | {"save": save(latent=["sample", 0])})
    assert_close(core["latent"], ours["latent"], atol=2e-3, rtol=2e-3)


def test_core_text_encode_on_our_clip(saved):
    graph = loaders() | {"core": node("CLIPTextEncode", clip=["clip", 0], text="a red circle moves right")}
    graph["save"] = save(conditioning=["text", 0])
    ours = saved(graph)
    graph["save"] = save(conditioning=["core", 0])
    theirs = saved(graph)
    assert_close(theirs["features0"], ours["features0"])
    assert_close(theirs["pooled_output0"], ours["pooled_output0"])


def test_shift_node_before_our_sampler_counts(saved, server):
    graph = text_to_video(shift=3.0) | {"save": save(latent=["sample", 0])}
    chosen = saved(graph)
    graph = text_to_video(shift=0.0) | {"save": save(latent=["sample", 0])}
    graph["shifted"] = node("ModelSamplingSD3", model=["model", 0], shift=3.0)
    graph["sample"]["inputs"]["model"] = ["shifted", 0]
    assert_close(saved(graph)["latent"], chosen["latent"])


def test_lora_loader_changes_the_result(saved, server):
    rank, width = 2, tiny.VIDEO_SPEC.model_dim
    name = "diffusion_model.visual_transformer_blocks.0.self_attention.to_value"
    tensors = {
        f"{name}.lora_A.weight": torch.ones(rank, width),
        f"{name}.lora_B.weight": torch.ones(width, rank) * 0.01,
        f"{name}.alpha": torch.tensor(float(rank)),
    }
    save_checkpoint(server.base / "models" / "loras" / "k5_tiny_lora.safetensors", tensors)
    graph = text_to_video() | {"save": save(latent=["sample", 0])}
    plain = saved(graph)["latent"]
    graph["lora"] = node(
        "LoraLoaderModelOnly", model=["model", 0], lora_name="k5_tiny_lora.safetensors", strength_model=1.0
    )
    graph["sample"]["inputs"]["model"] = ["lora", 0]
    changed = saved(graph)["latent"]
    assert (changed - plain).abs().max() > 1e-3
    assert "lora key not loaded" not in server.log
    graph["lora"]["inputs"]["strength_model"] = 0.0
    assert_close(saved(graph)["latent"], plain)


def test_tiled_decode_runs_on_our_vae(saved):
    graph = text_to_video() | {
        "decode": node(
            "VAEDecodeTiled", vae=["vae", 0], samples=["sample", 0], tile_size=64, overlap=16, temporal_size=16,
            temporal_overlap=4,
        ),
        "save": save(image=["decode", 0]),
    }  # fmt: skip
    assert saved(graph)["image"].shape == (9, 48, 64, 3)


def test_core_encode_and_ours_agree(saved):
    graph = loaders() | PICTURE | {
        "ours": node("K5VAEEncode", vae=["vae", 0], image=["picture", 0]),
        "core": node("VAEEncode", vae=["vae", 0], pixels=["picture", 0]),
    }  # fmt: skip
    first = saved(graph | {"save": save(latent=["ours", 0])})["latent"]
    second = saved(graph | {"save": save(latent=["core", 0])})["latent"]
    assert first.shape == (1, 16, 1, 6, 10)
    assert_close(first, second, atol=1e-4, rtol=0)  # ours encodes in pieces: other sums, same values


def test_batches_and_odd_sizes(saved):
    two = saved(text_to_video(batch=2) | EVERYTHING)
    assert two["latent"].shape == (2, 16, 3, 6, 8) and two["image"].shape == (18, 48, 64, 3)
    odd = text_to_video() | {
        "empty": node("EmptyHunyuanLatentVideo", width=72, height=56, length=5, batch_size=1),
        "sample": core_sampler(),
    } | EVERYTHING  # fmt: skip
    assert saved(odd)["latent"].shape == (1, 16, 2, 7, 9)


def test_core_trainer_trains_our_model(saved):
    """Gradients flow, and the LoRA's names fit: core's own trainer is a user of the MODEL contract."""
    graph = text_to_video(steps=2) | {"save": save(latent=["sample", 0])}
    plain = saved(graph)["latent"]
    graph["train"] = node(
        "TrainLoraNode", model=["model", 0], latents=["sample", 0], positive=["text", 0], batch_size=1,
        grad_accumulation_steps=1, steps=2, learning_rate=0.05, rank=2, optimizer="AdamW", loss_function="MSE", seed=0,
        training_dtype="fp32", lora_dtype="fp32", quantized_backward=False, algorithm="LoRA",
        gradient_checkpointing=False, checkpoint_depth=1, offloading=False, existing_lora="[None]", bucket_mode=False,
        bypass_mode=False,
    )  # fmt: skip
    graph["tuned"] = node(
        "LoraModelLoader", model=["model", 0], lora=["train", 0], strength_model=1.0, bypass=False
    )
    graph["second"] = {**graph["sample"], "inputs": {**graph["sample"]["inputs"], "model": ["tuned", 0]}}
    graph["save"] = save(latent=["second", 0])
    assert (saved(graph)["latent"] - plain).abs().max() > 1e-3
