"""Tokenizers from local files, and the token arithmetic of templates: crops, limits, padding. No model is needed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import TextError
from .templates import Template

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CLIP_TOKENS = 77
VISION = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
OFFICIAL_START = ("<|im_start|>", 151644)  # the Qwen2.5 vocabulary is known by this id


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids for Qwen and what happens to them after it."""

    ids: tuple[int, ...]  # template, prompt and image tokens; no padding
    crop: int  # leading positions that the transformer never sees
    dropped: int  # prompt and suffix tokens cut off by the limit
    image: slice | None = None  # positions of the image tokens of all images, markers included

    @property
    def kept(self) -> int:
        """Number of positions the transformer sees."""
        return max(0, len(self.ids) - self.crop)

    def padded(self, length: int, pad_id: int) -> tuple[Tensor, Tensor]:
        """Ids `[crop + length]`, padded right, and the bool mask `[length]` of real tokens after the crop."""
        ids_L = torch.full((self.crop + length,), pad_id)
        ids_L[: len(self.ids)] = torch.tensor(self.ids)
        return ids_L, torch.arange(length) < self.kept


class QwenTokenizer:
    """Qwen2.5 byte-level tokenizer (or another with the same special tokens) applied to templates."""

    def __init__(self, backend: Tokenizer, source: Path) -> None:
        self.source = source
        self._backend = backend
        self.pad_id = self._id("<|endoftext|>")
        self._start = self._id(OFFICIAL_START[0])
        self._id("<|im_end|>")

    def __call__(self, text: str) -> list[int]:
        """Ids of `text`; special tokens written in it count as special, as in the released code."""
        return self._backend.encode(text, add_special_tokens=False).ids

    @cached_property
    def vision_ids(self) -> tuple[int, int, int]:
        """Ids that open an image, stand for one image token, and close it."""
        start, pad, end = (self._id(name) for name in VISION)
        return start, pad, end

    def crop_start(self, template: Template) -> int:
        """Leading tokens to drop: the released number for Qwen2.5's vocabulary, else the length of the prefix."""
        prefix = len(self(template.prefix))
        official = self._start == OFFICIAL_START[1] and prefix == template.prefix_tokens
        return template.crop_start if official else prefix

    def tokenize(
        self, prompt: str, template: Template, max_tokens: int, image_tokens: Sequence[int] = ()
    ) -> Tokens:
        """Ids of a prompt in its template, cut so that at most `max_tokens` are left after the crop.

        Without images the cut takes the tail, the closing marker first. With images (`image_tokens` gives the
        number of tokens of each) the prompt is cut and the image tokens stay whole.
        """
        crop = self.crop_start(template)
        if not image_tokens:
            ids = self(template.text(prompt))
            limit = crop + max_tokens
            return Tokens(tuple(ids[:limit]), crop, max(0, len(ids) - limit))
        start, pad, end = self.vision_ids
        images = [token for count in image_tokens for token in (start, *[pad] * count, end)]
        tail = images + self(template.suffix)
        ids = self(template.prefix + prompt)
        limit = crop + max_tokens - len(tail)
        if limit < len(self(template.prefix)):
            raise TextError(
                f"{len(image_tokens)} image(s) need {len(tail)} text tokens, more than the limit of {max_tokens}. "
                "Use fewer or smaller images."
            )
        ids, dropped = ids[:limit], max(0, len(ids) - limit)
        return Tokens((*ids, *tail), crop, dropped, slice(len(ids), len(ids) + len(images)))

    def _id(self, token: str) -> int:
        found = self._backend.token_to_id(token)
        if found is None:
            raise TextError(f"{self.source} is not a Qwen2.5 tokenizer: it has no token {token!r}.")
        return found


class CLIPTokenizer:
    """CLIP's lower-casing tokenizer: start marker, prompt, end marker."""

    def __init__(self, backend: Tokenizer, source: Path) -> None:
        self.source = source
        self._backend = backend
        self.start_id, self.end_id = (self._id(name) for name in ("<|startoftext|>", "<|endoftext|>"))

    def tokenize(self, prompt: str, max_tokens: int = CLIP_TOKENS) -> Tokens:
        """Ids of the raw prompt between its markers, at most `max_tokens` with them."""
        ids = self._backend.encode(prompt, add_special_tokens=False).ids
        room = max_tokens - 2
        return Tokens((self.start_id, *ids[:room], self.end_id), 0, max(0, len(ids) - room))

    def _id(self, token: str) -> int:
        found = self._backend.token_to_id(token)
        if found is None:
            raise TextError(f"{self.source} is not a CLIP tokenizer: it has no token {token!r}.")
        return found


def require_text(prompt: object) -> str:
    """`prompt` if it is a string of real characters, else `TextError`."""
    if not isinstance(prompt, str):
        raise TextError(f"A prompt must be text, not {type(prompt).__name__}.")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise TextError("The prompt holds half of a UTF-16 character pair. Type or paste it again as plain text.")
    return prompt


def tokenizer_folder(weights: Path, given: str | os.PathLike[str] | None) -> Path:
    """Folder of the tokenizer files: `given`, else the weights' own folder or its diffusers sibling `tokenizer*`."""
    if given is not None:
        candidates = [Path(given).expanduser()]
    else:
        home = weights if weights.is_dir() else weights.parent
        candidates = [home, home / "tokenizer"]
        if "text_encoder" in home.name:
            candidates.append(home.with_name(home.name.replace("text_encoder", "tokenizer")))
    for folder in candidates:
        if _is_tokenizer(folder):
            return folder
    looked = ", ".join(str(folder) for folder in candidates)
    raise TextError(
        f"No tokenizer for {weights}. Looked for tokenizer.json, or vocab.json with merges.txt, in: {looked}. "
        "Put the files there or give the tokenizer's folder."
    )


def load_qwen_tokenizer(folder: Path) -> QwenTokenizer:
    """Read the Qwen2.5 tokenizer in `folder`."""
    return QwenTokenizer(_backend(folder, "Qwen2TokenizerFast"), folder)


def load_clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """Read the CLIP tokenizer in `folder`."""
    return CLIPTokenizer(_backend(folder, "CLIPTokenizerFast"), folder)


def _is_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    )


def _backend(folder: Path, family: str) -> Tokenizer:
    """The fast tokenizer in `folder`: tokenizer.json as it is, else built from vocabulary and merges by `family`."""
    import tokenizers

    serialized = folder / "tokenizer.json"
    try:
        if serialized.is_file():
            # The file's own rules count: transformers' classes replace its splitting rules with their own.
            backend = tokenizers.Tokenizer.from_buffer(serialized.read_bytes())
        else:
            import transformers

            backend = getattr(transformers, family).from_pretrained(folder, local_files_only=True).backend_tokenizer
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TextError(f"The tokenizer in {folder} cannot be read: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend
