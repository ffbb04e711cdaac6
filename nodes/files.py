"""Names in the loaders' lists: the host's model files, and the nano family that comes with the pack."""

from __future__ import annotations

import json
from pathlib import Path

from ..kandinsky_core import nano
from ..kandinsky_core.errors import CheckpointError
from .host import host

BUILT_IN = " [built-in]"  # ends a name that is not in the host's folders
CLASS_KEYS = ("_class_name", "model_type", "architectures")  # of diffusers' and transformers' config.json
MODEL, TEXT_ENCODER, CLIP_ENCODER, VAE = "model", "text_encoder", "clip", "vae"

FOLDERS = {
    MODEL: ("diffusion_models", "checkpoints"),
    TEXT_ENCODER: ("text_encoders",),
    CLIP_ENCODER: ("text_encoders",),
    VAE: ("vae", "checkpoints"),
}
BUILT_IN_KINDS = {  # what `nano.files` calls them; the first is the lists' default
    MODEL: ("model", "image_model", "edit_model"),
    TEXT_ENCODER: ("text_encoder",),
    CLIP_ENCODER: ("clip",),
    VAE: ("vae", "image_vae"),
}


def names(kind: str) -> list[str]:
    """List everything a loader of `kind` can be given: built-in files, then files and model folders of the host."""
    found = list(_built_in(kind))
    for folder in FOLDERS[kind]:
        found += host().filenames(folder) + host().folders(folder)
    return list(dict.fromkeys(found))


def locate(kind: str, name: str) -> Path:
    """Return the path that `name` of a loader's list means; an unknown name raises `CheckpointError`."""
    if name in (built_in := _built_in(kind)):
        return built_in[name]
    for folder in FOLDERS[kind]:
        path = host().locate(folder, name)
        if path is not None:
            return path
    known = names(kind)
    shown = ", ".join(known[:8]) + (", …" if len(known) > 8 else "")
    raise CheckpointError(
        f"{name!r} is not there any more. Choose one of: {shown or 'nothing'}. "
        f"New files go into models/{FOLDERS[kind][0]}; then press R to refresh the list."
    )


def is_model_folder(folder: Path) -> bool:
    """Whether `folder` holds one model in several files: its config.json names the model's class.

    Any other config.json says nothing of the weights beside it, which are files of their own.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and any(key in config for key in CLASS_KEYS)


def built_in(key: str) -> str:
    """Return the name in the loaders' lists of what `nano.files` calls `key`, whether it is there or not."""
    return f"nano/{nano.files()[key].name}{BUILT_IN}"


def _built_in(kind: str) -> dict[str, Path]:
    paths = nano.files()
    return {built_in(key): paths[key] for key in BUILT_IN_KINDS[kind] if paths[key].exists()}
