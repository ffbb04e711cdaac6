"""A prompt's two embeddings: Qwen2.5-VL features and CLIP's pooled vector, as the released models were trained on."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import TextError
from ..io.checkpoint import open_checkpoint
from .clip import load_clip_tower, pooled_state
from .qwen import load_text_tower
from .templates import get_template
from .tokens import (
    CLIP_TOKENS,
    CLIPTokenizer,
    QwenTokenizer,
    load_clip_tokenizer,
    load_qwen_tokenizer,
    tokenizer_folder,
)

logger = logging.getLogger("kandinsky5")

OnLayer = Callable[[int, int], None]  # (layers done, layers in total); an exception it raises cancels
Path = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class TextFeatures:
    """One encoded prompt, exact length, no padding."""

    features_LD: Tensor  # Qwen2.5-VL states after the final norm, in the tower's dtype
    pooled_P: Tensor  # CLIP's pooled state, float32
    tokens: int  # L: tokens the transformer sees
    dropped: int  # Qwen tokens cut off by max_tokens
    clip_tokens: int = 0  # CLIP tokens with both markers
    clip_dropped: int = 0  # CLIP tokens cut off by its 77


class TextEncoder(nn.Module):
    """Both text towers with their tokenizers; `to` moves it, `free` gives its memory back."""

    def __init__(
        self, qwen: nn.Module, clip: nn.Module, qwen_tokenizer: QwenTokenizer, clip_tokenizer: CLIPTokenizer
    ) -> None:
        super().__init__()
        self.qwen = qwen
        self.clip = clip
        self.qwen_tokenizer = qwen_tokenizer
        self.clip_tokenizer = clip_tokenizer

    @property
    def device(self) -> torch.device:
        """Where the text tower is."""
        return self.qwen.embed_tokens.weight.device

    @property
    def width(self) -> int:
        """D: width of the Qwen features."""
        return self.qwen.embed_tokens.weight.shape[1]

    def free(self) -> None:
        """Release the weights; the object cannot encode afterwards."""
        self.to("meta")

    @torch.no_grad()
    def encode(
        self,
        prompt: str,
        template: str,
        *,
        images: Sequence[Tensor] | None = None,
        max_tokens: int | None = None,
        on_layer: OnLayer | None = None,
    ) -> TextFeatures:
        """Encode `prompt` with the template called `template`, on the device the encoder is on.

        `max_tokens` limits the tokens left after the template's crop (None: the released limit of the template).
        What does not fit is dropped from the end, counted in the result and logged.
        """
        if not isinstance(prompt, str):
            raise TextError(f"A prompt must be text, not {type(prompt).__name__}.")
        chosen = get_template(template)
        limit = chosen.max_tokens if max_tokens is None else max_tokens
        if limit < 1:
            raise TextError(f"max_tokens is {limit}; it must be at least 1.")
        if self.device.type == "meta":
            raise TextError("The text encoder was freed. Load it again.")
        if images:
            raise TextError(f"Template {template!r} takes no images.")
        tokens = self.qwen_tokenizer.tokenize(prompt, chosen, limit)
        if not tokens.kept:
            raise TextError(
                f"Nothing of this prompt is left: template {template!r} drops the first "
                f"{tokens.crop - len(self.qwen_tokenizer(chosen.prefix))} prompt tokens. Write a longer prompt."
            )
        clip_tokens = self.clip_tokenizer.tokenize(prompt, min(CLIP_TOKENS, self.clip.config.max_position_embeddings))
        with self._reporting(on_layer):
            ids = torch.tensor(tokens.ids, device=self.device)
            states_LD = self.qwen(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            clip_ids = torch.tensor(clip_tokens.ids, device=self.device)
            pooled_P = pooled_state(self.clip, clip_ids, self.clip_tokenizer.end_id)
        if tokens.dropped or clip_tokens.dropped:
            logger.warning(
                "Prompt cut: Qwen keeps %d tokens and drops %d, CLIP keeps %d and drops %d.",
                tokens.kept, tokens.dropped, len(clip_tokens.ids), clip_tokens.dropped,
            )  # fmt: skip
        return TextFeatures(
            states_LD[tokens.crop :].clone(),  # not a view that keeps the template's states alive
            pooled_P,
            tokens.kept,
            tokens.dropped,
            len(clip_tokens.ids),
            clip_tokens.dropped,
        )

    @contextmanager
    def _reporting(self, on_layer: OnLayer | None) -> Iterator[None]:
        """Call `on_layer` after each layer of both towers."""
        if on_layer is None:
            yield
            return
        clip_encoder = getattr(self.clip, "text_model", self.clip).encoder
        layers = [*self.qwen.layers, *clip_encoder.layers]
        hooks = [
            layer.register_forward_hook(lambda *_, done=index: on_layer(done, len(layers)))
            for index, layer in enumerate(layers, start=1)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def load_text_encoder(
    qwen_path: Path,
    clip_path: Path,
    *,
    tokenizer_path: Path | None = None,
    clip_tokenizer_path: Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> TextEncoder:
    """Text encoder from HF folders or ComfyUI single files; nothing is ever downloaded.

    `dtype` is Qwen's (None: as stored; fp8 becomes bfloat16); CLIP is float32 as released. Tokenizers lie beside the
    weights or in the folders given. Weights are memory-mapped until `device` or use asks for them.
    """
    qwen_file = open_checkpoint(qwen_path, part="text_encoder")
    clip_file = open_checkpoint(clip_path, part="text_encoder_2")
    qwen_tokenizer = load_qwen_tokenizer(tokenizer_folder(qwen_file.path, tokenizer_path))
    clip_tokenizer = load_clip_tokenizer(tokenizer_folder(clip_file.path, clip_tokenizer_path))
    encoder = TextEncoder(
        load_text_tower(qwen_file, dtype), load_clip_tower(clip_file), qwen_tokenizer, clip_tokenizer
    )
    return encoder if device is None else encoder.to(device)
