"""Latents on disk: written whole before they are decoded, found again, and pruned.

The files are ComfyUI's own kind (`.latent`: safetensors with `latent_tensor`), so its Load Latent reads them, too.
Metadata are strings; `kandinsky5` holds the facts that decoding needs, as JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError, MediaError
from .checkpoint import Checkpoint, open_checkpoint
from .header import read_header
from .whole_file import whole_file

logger = logging.getLogger("kandinsky5")

SUFFIX = ".latent"
TENSOR = "latent_tensor"
UNSCALED = "latent_format_version_0"  # ComfyUI's mark that the values are raw; without it they are divided by 0.18215
FACTS = "kandinsky5"  # metadata key
DIGEST_BYTES = 6
OWN_NAME = re.compile(rf"kandinsky5_\d{{8}}-\d{{6}}_([0-9a-f]{{{2 * DIGEST_BYTES}}})\{SUFFIX}")


@dataclass(frozen=True, slots=True)
class SavedLatent:
    """A latent from disk: raw samples `[B,16,t,h,w]` or `[B,16,h,w]`, and what the file says of them."""

    samples: Tensor
    facts: dict[str, Any]  # of those that are known: variant, fps, seed, mode, vae (a file's name)
    metadata: dict[str, str]


def keep_latent(
    folder: Path, samples: Tensor, *, facts: Mapping[str, Any], metadata: Mapping[str, object] | None = None
) -> Path:
    """Write a latent into `folder` and return its path; one that lies there already becomes the newest.

    Its facts are then brought up to date; the rest of its metadata stays, which tells how the latent was made.
    A full disk or a folder that cannot be written raises `MediaError`.
    """
    digest = _digest(samples)
    try:
        path = next((path for path in _own(folder) if OWN_NAME.fullmatch(path.name)[1] == digest), None)
        old = read_header(path)[1] if path else {}
        path = path or folder / f"kandinsky5_{time.strftime('%Y%m%d-%H%M%S')}_{digest}{SUFFIX}"
        _write(path, samples, {**(metadata or {}), **old, FACTS: _facts(old) | dict(facts)})
    except (OSError, SafetensorError, CheckpointError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MediaError(f"{folder}: a latent of {samples.nbytes:,} bytes cannot be written: {reason}.") from error
    return path


def prune_latents(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` files that `keep_latent` wrote into `folder`.

    Deleted is only what has both a name and a mark of that function: a renamed file stays for good.
    """
    for path in _own(folder)[keep:]:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s is not needed any more but cannot be deleted: %s", path, error.strerror)


def saved_latents(folder: Path) -> list[Path]:
    """Return all latent files of `folder`, newest first, whoever wrote them."""
    if not folder.is_dir():
        return []
    aged = []
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):  # another process may be pruning
            aged.append((path.stat().st_mtime_ns, path.name, path))
    return [path for *_, path in sorted(aged, reverse=True)]


def read_latent(path: Path) -> SavedLatent:
    """Read a latent that this package or ComfyUI's Save Latent wrote; other files raise `CheckpointError`."""
    checkpoint = open_latent(path)
    samples = checkpoint.tensor(TENSOR).clone()  # not mapped: the file may be pruned while it is in use
    return SavedLatent(samples, _facts(checkpoint.metadata), checkpoint.metadata)


def open_latent(path: Path) -> Checkpoint:
    """Read the header alone and check it as `read_latent` does."""
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path.name} cannot be read as a latent. {error}") from error
    if not {TENSOR, UNSCALED} <= checkpoint.tensors.keys():
        raise CheckpointError(
            f"{path} is not a latent of today's format ({TENSOR} and {UNSCALED}). "
            "Use a file that a Kandinsky 5 decode node or ComfyUI's Save Latent wrote."
        )
    return checkpoint


def _write(path: Path, samples: Tensor, metadata: Mapping[str, object]) -> None:
    tensors = {TENSOR: samples.detach().cpu().contiguous(), UNSCALED: torch.empty(0)}
    strings = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata=strings)
        with partial.open("rb+") as stream:
            os.fsync(stream.fileno())  # it must outlive a crash of the machine, not only of this process


def _own(folder: Path) -> list[Path]:
    """Return the files of `keep_latent`, newest first."""
    return [path for path in saved_latents(folder) if OWN_NAME.fullmatch(path.name) and _is_marked(path)]


def _is_marked(path: Path) -> bool:
    try:
        return FACTS in read_header(path)[1]
    except CheckpointError:
        return False


def _facts(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        facts = json.loads(metadata.get(FACTS, "{}"))
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _digest(samples: Tensor) -> str:
    """Name the content, so that decoding one latent again does not push others out."""
    values = samples.detach().cpu().contiguous().flatten().view(torch.uint8)
    shape = f"{list(samples.shape)} {samples.dtype}".encode()
    return hashlib.blake2b(shape + values.numpy().tobytes(), digest_size=DIGEST_BYTES).hexdigest()
