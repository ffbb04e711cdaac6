"""The nano family: tiny weights of the same classes that come with the pack, and the recipe that makes them."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
NAMES = {
    "model": "k5_nano_video.safetensors",
    "image_model": "k5_nano_image.safetensors",
    "edit_model": "k5_nano_edit.safetensors",
    "vae": "k5_nano_vae.safetensors",
    "image_vae": "k5_nano_image_vae.safetensors",
    "text_encoder": "k5_nano_qwen",
    "clip": "k5_nano_clip",
}


def files(folder: Path = WEIGHTS) -> dict[str, Path]:
    """Return where the built-in weights lie: transformers, autoencoders, text encoder folders."""
    return {kind: folder / name for kind, name in NAMES.items()}
