"""A prompt's two embeddings: Qwen2.5-VL features and CLIP's pooled vector, as the released models were trained on."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import TextError
from ..io.checkpoint import open_checkpoint
from ..io.mapped import mapping_dtype
from ..memory.stream import BlockStream
from .clip import load_clip_tower, pooled_state
from .images import Patches, patches
from .qwen import load_text_tower
from .streaming import stream_clip, stream_qwen
from .templates import Template, get_template
from .tokens import (
    CLIP_TOKENS,
    CLIPTokenizer,
    QwenTokenizer,
    Tokens,
    load_clip_tokenizer,
    load_qwen_tokenizer,
    require_text,
    tokenizer_folder,
)
from .vision import image_states, load_vision_tower, positions

logger = logging.getLogger("kandinsky5")

TEXT_POSITIONS = 1024  # text positions of the released transformers' rotary table
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
    """Both text towers with their tokenizers; `to` moves it, `stream` or `free` give its memory back."""

    def __init__(
        self,
        qwen: nn.Module,
        clip: nn.Module,
        qwen_tokenizer: QwenTokenizer,
        clip_tokenizer: CLIPTokenizer,
        load_vision: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.qwen = qwen
        self.clip = clip
        self.qwen_tokenizer = qwen_tokenizer
        self.clip_tokenizer = clip_tokenizer
        self.load_vision = load_vision  # only prompts with images need the vision tower: it comes and goes with them
        self.streams: list[BlockStream] = []
        self.dtype: torch.dtype | None = None  # of Qwen's states, None: as its embeddings are stored

    @property
    def device(self) -> torch.device:
        """Where the text tower computes."""
        return self.qwen.norm.weight.device  # the embeddings of a streamed tower stay on the host

    @property
    def width(self) -> int:
        """D: width of the Qwen features."""
        return self.qwen.embed_tokens.embedding_dim

    def stream(
        self,
        device: torch.device,
        *,
        dtype: torch.dtype | None = None,
        prefetch: int = 1,
        pinned_bytes: int = 0,
    ) -> None:
        """Encode on `device` from now on with towers whose layers visit it one after the other.

        The results are those of the moved towers. `dtype` is Qwen's (None: as stored); `pinned_bytes` limits
        page-locked copies of its layers on the host. Undone by `close_streams`.
        """
        self.close_streams()
        self.dtype = dtype
        options = {"dtype": dtype, "prefetch": prefetch, "pinned_bytes": pinned_bytes}
        self.streams = [stream_qwen(self.qwen, device, **options), stream_clip(self.clip, device, prefetch=prefetch)]

    def close_streams(self) -> None:
        """Leave all weights where they were before `stream`."""
        while self.streams:
            self.streams.pop().close()
        self.dtype = None

    def free(self) -> None:
        """Release the weights; the object cannot encode afterwards."""
        self.close_streams()
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

        `images` (template image_edit) are `[3,H,W]` in -1…1, of the size that is generated. `max_tokens` limits the
        tokens left after the template's crop; None means the released limit, with images the transformer's 1024.
        What does not fit is dropped from the prompt's end, counted in the result and logged.
        """
        require_text(prompt)
        if self.device.type == "meta":
            raise TextError("The text encoder was freed. Load it again.")
        pictures = [patches(image) for image in images or ()]
        tokens = self._tokenize(prompt, get_template(template), pictures, max_tokens)
        clip_limit = min(CLIP_TOKENS, self.clip.config.max_position_embeddings)
        clip_tokens = self.clip_tokenizer.tokenize(prompt, clip_limit)
        _require_known(tokens, self.qwen, self.qwen_tokenizer)
        _require_known(clip_tokens, self.clip, self.clip_tokenizer)
        with self._reporting(on_layer):
            features_LD = self._features(tokens, pictures)
            clip_ids = torch.tensor(clip_tokens.ids, device=self.device)
            pooled_P = pooled_state(self.clip, clip_ids, self.clip_tokenizer.end_id)
        _require_finite(features_LD, "Qwen2.5-VL")
        _require_finite(pooled_P, "CLIP")
        result = TextFeatures(
            features_LD, pooled_P, tokens.kept, tokens.dropped, clip_tokens.kept, clip_tokens.dropped
        )
        _log_cuts(result)
        return result

    def _tokenize(
        self, prompt: str, template: Template, pictures: Sequence[Patches], max_tokens: int | None
    ) -> Tokens:
        """Token ids for Qwen; a request that leaves nothing to encode raises `TextError`."""
        if pictures and not (template.takes_images and self.load_vision):
            raise TextError(f"Template {template.name!r} takes no images. Use 'image_edit', or give no images.")
        released = TEXT_POSITIONS if pictures else template.max_tokens
        limit = released if max_tokens is None else max_tokens
        if not 1 <= limit <= TEXT_POSITIONS:
            raise TextError(f"max_tokens is {limit}; it must be between 1 and {TEXT_POSITIONS}.")
        tokens = self.qwen_tokenizer.tokenize(prompt, template, limit, [picture.tokens for picture in pictures])
        if not tokens.kept:
            raise TextError(
                f"Nothing is left of this prompt: template {template.name!r} drops the first {tokens.crop} tokens and "
                f"the whole text has {len(tokens.ids)}. Write a longer prompt, or give the image to edit."
            )
        return tokens

    def _features(self, tokens: Tokens, pictures: Sequence[Patches]) -> Tensor:
        """`[L, D]`: Qwen states after the final norm and the crop."""
        ids_L = torch.tensor(tokens.ids, device=self.device)
        rows = self.qwen.embed_tokens
        embeds_LD = rows(ids_L.to(rows.weight.device)).to(self.device, self.dtype)
        where = None
        if pictures:
            vision = self.load_vision().to(self.device)
            states = image_states(vision, pictures).to(embeds_LD)
            pads_L = ids_L == self.qwen_tokenizer.vision_ids[1]
            pads_L[: tokens.image.start] = False  # a prompt may spell out the image token: that is text
            embeds_LD[pads_L] = states
            where = positions(len(tokens.ids), tokens.image, pictures)[:, None].to(self.device)
        output = self.qwen(inputs_embeds=embeds_LD[None], position_ids=where, use_cache=False)
        return output.last_hidden_state[0, tokens.crop :].clone()  # a view would keep the template's states alive

    @contextmanager
    def _reporting(self, on_layer: OnLayer | None) -> Iterator[None]:
        """Call `on_layer` after each layer of both towers."""
        if on_layer is None:
            yield
            return
        clip_encoder = getattr(self.clip, "text_model", self.clip).encoder
        layers = [*self.qwen.layers, *clip_encoder.layers]

        def report(done: int, *_: object) -> None:  # what a hook returns would replace the layer's output
            on_layer(done, len(layers))

        hooks = [
            layer.register_forward_hook(partial(report, index)) for index, layer in enumerate(layers, start=1)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _require_known(tokens: Tokens, tower: nn.Module, tokenizer: QwenTokenizer | CLIPTokenizer) -> None:
    rows = tower.get_input_embeddings().num_embeddings
    if max(tokens.ids) >= rows:
        raise TextError(
            f"The tokenizer in {tokenizer.source} gives token {max(tokens.ids)}, but the weights know {rows} tokens. "
            "It belongs to another model; give the tokenizer that came with the weights."
        )


def _require_finite(states: Tensor, tower: str) -> None:
    if not torch.isfinite(states).all():
        raise TextError(
            f"{tower} gave NaN or Inf in {states.dtype}. Its file is damaged, or float16 is too narrow for it: "
            "use bfloat16 or float32."
        )


def _log_cuts(result: TextFeatures) -> None:
    """Say what was cut: a warning for Qwen's tokens; CLIP's 77 are fewer than most prompts have, so only a note."""
    if result.dropped or result.clip_dropped:
        logger.log(
            logging.WARNING if result.dropped else logging.INFO,
            "Prompt cut: Qwen keeps %d tokens and drops %d, CLIP keeps %d and drops %d.",
            result.tokens, result.dropped, result.clip_tokens, result.clip_dropped,
        )  # fmt: skip


def load_text_encoder(
    qwen_path: Path,
    clip_path: Path,
    *,
    tokenizer_path: Path | None = None,
    clip_tokenizer_path: Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    nf4: bool = False,
    streamed: bool = False,
    prefetch: int = 1,
    pinned_bytes: int = 0,
) -> TextEncoder:
    """Text encoder from HF folders, ComfyUI single files or GGUF; nothing is ever downloaded.

    `dtype` is what Qwen computes in (None: as stored; packed weights, which stay packed, compute in bfloat16); CLIP is
    float32 as released. `nf4` packs the text tower's linear weights into four bits as they are read. Tokenizers lie
    beside the weights or in the folders given. Other weights are memory-mapped until `device` or use asks for them.
    `streamed` leaves Qwen's layers mapped for good and lets them visit `device` (see `TextEncoder.stream`): in bf16
    0.9 GB there instead of 13 GB. Packed weights travel packed.
    """
    qwen_file = open_checkpoint(qwen_path, part="text_encoder")
    clip_file = open_checkpoint(clip_path, part="text_encoder_2")
    qwen_tokenizer = load_qwen_tokenizer(tokenizer_folder(qwen_file.path, tokenizer_path))
    clip_tokenizer = load_clip_tokenizer(tokenizer_folder(clip_file.path, clip_tokenizer_path))
    encoder = TextEncoder(
        load_text_tower(qwen_file, mapping_dtype(qwen_file, dtype) if streamed and not nf4 else dtype, nf4=nf4),
        load_clip_tower(clip_file),
        qwen_tokenizer,
        clip_tokenizer,
        partial(load_vision_tower, qwen_file, dtype),
    )
    if streamed:
        place = torch.device("cpu") if device is None else torch.device(device)
        encoder.stream(place, dtype=dtype, prefetch=prefetch, pinned_bytes=pinned_bytes)
        return encoder
    return encoder if device is None else encoder.to(device)
