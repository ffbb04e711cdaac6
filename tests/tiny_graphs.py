"""API-format graphs over the tiny models of `tiny.py`, for the real ComfyUI and for headless runs."""

from __future__ import annotations

from typing import Any

import tiny

Graph = dict[str, dict[str, Any]]


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """One entry of a graph."""
    return {"class_type": class_type, "inputs": inputs}


PICTURE: Graph = {"picture": {"class_type": "EmptyImage", "inputs": {
    "width": 80, "height": 48, "batch_size": 1, "color": 0xC04020,
}}}  # fmt: skip


def loaders(model: str = tiny.VIDEO, vae: str = tiny.VIDEO_VAE) -> Graph:
    """Model, text encoder and VAE loaders, and the encoded prompts."""
    return {
        "model": node("K5LoadModel", model_name=model, variant="auto", dtype="auto"),
        "clip": node("K5LoadTextEncoder", qwen_name=tiny.QWEN, clip_name=tiny.CLIP, dtype="fp32"),
        "vae": node("K5LoadVAE", vae_name=vae, dtype="auto"),
        "text": node(
            "K5EncodeText", clip=["clip", 0], prompt="a red circle moves right", negative_prompt="blurry",
            template="auto", max_tokens=0, model=["model", 0],
        ),
    }  # fmt: skip


def sampler(start: str = "text", latent: tuple[str, int] = ("empty", 0), **changes: Any) -> dict[str, Any]:
    """Our sampler on the conditioning of node `start`."""
    settings = {
        "seed": 7, "steps": 4, "cfg": -1.0, "shift": 0.0, "sampler_name": "euler", "first_frame": "auto",
        "denoise": 1.0,
    }  # fmt: skip
    return node(
        "K5Sample", model=["model", 0], positive=[start, 0], negative=[start, 1], latent=list(latent),
        **(settings | changes),
    )  # fmt: skip


def text_to_video(
    width: int = 64, height: int = 48, length: int = 9, batch: int = 1, **changes: Any
) -> Graph:
    """Text to a decoded clip; node ids: model, clip, vae, text, empty, sample, decode."""
    return loaders() | {
        "empty": node("K5EmptyLatent", width=width, height=height, length=length, batch_size=batch),
        "sample": sampler(**changes),
        "decode": node("K5VAEDecode", vae=["vae", 0], latent=["sample", 0]),
    }


def image_to_video(
    image: list[Any], width: int = 64, height: int = 48, length: int = 25, **changes: Any
) -> Graph:
    """Image (a link) to a decoded clip; seven latent frames, so that normalisation has its reference frames."""
    return loaders() | {
        "start": node(
            "K5ImageToVideo", positive=["text", 0], negative=["text", 1], vae=["vae", 0], start_image=image,
            width=width, height=height, length=length, batch_size=1, fit="crop",
        ),
        "sample": sampler("start", ("start", 2), **changes),
        "decode": node("K5VAEDecode", vae=["vae", 0], latent=["sample", 0]),
    }  # fmt: skip


def text_to_image(model: str = tiny.IMAGE, width: int = 64, height: int = 48, **changes: Any) -> Graph:
    """Text to a decoded picture."""
    return loaders(model, tiny.IMAGE_VAE) | {
        "empty": node("K5EmptyLatent", width=width, height=height, length=1, batch_size=1),
        "sample": sampler(**changes),
        "decode": node("K5VAEDecode", vae=["vae", 0], latent=["sample", 0]),
    }


def edit(image: list[Any], width: int = 64, height: int = 48, **changes: Any) -> Graph:
    """Image (a link) and an instruction to a decoded picture; node ids: model, clip, vae, edit, sample, decode."""
    made = loaders(tiny.EDIT, tiny.IMAGE_VAE)
    del made["text"]
    return made | {
        "edit": node(
            "K5ImageEdit", clip=["clip", 0], vae=["vae", 0], image=image, prompt="make it red", negative_prompt="",
            size="custom", width=width, height=height, fit="crop", model=["model", 0],
        ),
        "sample": sampler("edit", ("edit", 2), **changes),
        "decode": node("K5VAEDecode", vae=["vae", 0], latent=["sample", 0]),
    }  # fmt: skip


def save(**links: list[Any]) -> dict[str, Any]:
    """The test node that writes values to a file (in ComfyUI, with the host tests' nodes)."""
    return node("K5TestSave", **links)
