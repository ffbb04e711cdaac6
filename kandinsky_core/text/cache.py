"""Prompt embeddings on disk: a prompt that was encoded once needs neither the text encoders nor their memory again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..io.checkpoint import open_checkpoint
from .encoder import OnLayer, TextEncoder, TextFeatures
from .templates import get_template
from .tokens import require_text, tokenizer_folder

logger = logging.getLogger("kandinsky5")

VERSION = 1  # raise it when encoding changes: older entries are then never found
LIMIT_BYTES = 512 * 2**20  # about 300 prompts of 256 tokens in bfloat16
SAMPLES = 16
SAMPLE_BYTES = 4096
COUNTS = ("tokens", "dropped", "clip_tokens", "clip_dropped")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")


class EmbeddingCache:
    """A folder of encoded prompts, one safetensors file each, the least recently used removed above `limit_bytes`."""

    def __init__(self, folder: str | os.PathLike[str], limit_bytes: int = LIMIT_BYTES) -> None:
        self.folder = Path(folder)
        self.limit_bytes = limit_bytes

    def read(self, key: str) -> TextFeatures | None:
        """The entry `key`, or None; an entry that cannot be read is removed with a warning."""
        path = self._path(key)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as stored:
                counts = {name: int(stored.metadata()[name]) for name in COUNTS}
                # Cloned: the file may be pruned while its tensors are in use.
                features, pooled = (stored.get_tensor(name).clone() for name in ("features_LD", "pooled_P"))
            os.utime(path)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            logger.warning("Cached embedding %s is damaged (%s); the prompt is encoded again.", path.name, error)
            path.unlink(missing_ok=True)
            return None
        return TextFeatures(features, pooled, **counts)

    def write(self, key: str, features: TextFeatures) -> None:
        """Store an entry in one step; a disk that refuses it costs a warning, not the result."""
        tensors = {"features_LD": features.features_LD, "pooled_P": features.pooled_P}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        counts = {name: str(getattr(features, name)) for name in COUNTS}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=self.folder, suffix=".partial")
            os.close(handle)
            try:
                save_file(tensors, partial, metadata=counts)
                os.replace(partial, self._path(key))
            finally:
                Path(partial).unlink(missing_ok=True)
            self.prune()
        except (OSError, SafetensorError) as error:
            logger.warning("Embedding not cached in %s: %s.", self.folder, error)

    def prune(self) -> None:
        """Remove the least recently used entries until the rest fits `limit_bytes`."""
        entries = []
        for path in self.folder.glob("*.safetensors"):
            with suppress(FileNotFoundError):  # another process prunes the same folder
                entries.append((path.stat(), path))
        total = 0
        for stat, path in sorted(entries, key=_newest_first):
            total += stat.st_size
            if total > self.limit_bytes:
                path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def encode_cached(
    cache: EmbeddingCache | None,
    identity: str,
    load: Callable[[], TextEncoder],
    prompt: str,
    template: str,
    *,
    images: Sequence[Tensor] | None = None,
    max_tokens: int | None = None,
    on_layer: OnLayer | None = None,
) -> TextFeatures:
    """`TextEncoder.encode` through `cache`; `load` is called only when the entry is missing. None caches nothing.

    `identity` is `encoder_hash` of the files behind `load`.
    """
    key = cache_key(identity, prompt, template, images=images, max_tokens=max_tokens) if cache else ""
    found = cache.read(key) if cache else None
    if found is None:
        found = load().encode(prompt, template, images=images, max_tokens=max_tokens, on_layer=on_layer)
        if cache:
            cache.write(key, found)
    return found


def cache_key(
    identity: str,
    prompt: str,
    template: str,
    *,
    images: Sequence[Tensor] | None = None,
    max_tokens: int | None = None,
) -> str:
    """SHA-256 over everything an embedding depends on: encoder, template text, prompt, limit, image pixels."""
    chosen, prompt = get_template(template), require_text(prompt)
    pixels = [[list(image.shape), _digest(image)] for image in images or ()]
    facts = [VERSION, identity, chosen.prefix, chosen.suffix, chosen.crop_start, prompt, max_tokens, pixels]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def encoder_hash(
    qwen_path: str | os.PathLike[str],
    clip_path: str | os.PathLike[str],
    *,
    tokenizer_path: str | os.PathLike[str] | None = None,
    clip_tokenizer_path: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    nf4: bool = False,
) -> str:
    """Identity of a text encoder, given as to `load_text_encoder`, in milliseconds.

    Of each weights file: its name, size, modification time, header and 16 samples of 4 KiB spread over the data. Of the
    tokenizers: all bytes. Reading 16 GB of weights would cost more than encoding the prompt.
    """
    digest = hashlib.sha256(f"{VERSION} {'NF4' if nf4 else ''}{dtype}".encode())
    parts = (
        (qwen_path, "text_encoder", tokenizer_path),
        (clip_path, "text_encoder_2", clip_tokenizer_path),
    )
    for path, part, tokenizer in parts:
        checkpoint = open_checkpoint(path, part=part)
        digest.update(json.dumps(checkpoint.config, sort_keys=True).encode())
        for file in checkpoint.files:
            _add_samples(digest, file)
        folder = tokenizer_folder(checkpoint.path, tokenizer)
        for file in (folder / name for name in TOKENIZER_FILES):
            digest.update(file.read_bytes() if file.is_file() else b"-")
    return digest.hexdigest()


def _add_samples(digest: hashlib._Hash, file: Path) -> None:
    stat = file.stat()
    digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    with file.open("rb") as stream:
        start = stream.read(8)
        header_bytes = int.from_bytes(start, "little")
        digest.update(stream.read(header_bytes))
        data_bytes = stat.st_size - 8 - header_bytes
        for sample in range(SAMPLES):
            stream.seek(8 + header_bytes + sample * data_bytes // SAMPLES)
            digest.update(stream.read(SAMPLE_BYTES))


def _digest(image: Tensor) -> str:
    pixels = image.detach().cpu().float().contiguous()
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()


def _newest_first(entry: tuple[os.stat_result, Path]) -> tuple[int, str]:
    return -entry[0].st_mtime_ns, entry[1].name
