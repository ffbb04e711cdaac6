"""CLIP inside ComfyUI: the core package's text encoder behind the methods that core's nodes call.

Legend: L text tokens, D text width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from torch import Tensor, nn

from ..kandinsky_core.errors import BackendUnavailable, TextError
from ..kandinsky_core.io import open_checkpoint
from ..kandinsky_core.io.quant import FP8
from ..kandinsky_core.packed.layers import PackedEmbedding, PackedLinear
from ..kandinsky_core.text import TextEncoder, TextFeatures, load_text_encoder
from ..kandinsky_core.text.cache import EmbeddingCache, encode_cached, encoder_hash
from ..kandinsky_core.text.encoder import OnLayer
from ..kandinsky_core.text.tokens import tokenizer_folder
from .comfy_model import DTYPES
from .comfy_packed import HostedPackedEmbedding, HostedPackedLinear, PackedPatcher, formats
from .host import NF4, EncodedText, cut_note, shown

TEMPLATE = "template"  # tokenizer option: which template, and how many tokens are kept
MAX_TOKENS = "max_tokens"
IMAGES = "images"
DEFAULT_TEMPLATE, DEFAULT_MAX_TOKENS = "video", 256
QWEN, CLIP_L = "qwen25_7b", "l"  # core's names of the two prompts in its tokens
ACTIVATION_BYTES = 512 * 1024 * 1024  # room for the states of one prompt next to the weights

VISION_BYTES = 1536 * 1024 * 1024  # the published vision tower (0.68 B) in bfloat16 and its states

# Layers of the towers that have a casting, offloadable counterpart of the same layout.
_ADOPTED = {
    nn.Linear: comfy.ops.manual_cast.Linear,
    nn.Embedding: comfy.ops.manual_cast.Embedding,
    nn.LayerNorm: comfy.ops.manual_cast.LayerNorm,
    PackedLinear: HostedPackedLinear,
    PackedEmbedding: HostedPackedEmbedding,
}


def _bar() -> OnLayer:
    """Return an `on_layer` callback that drives core's progress bar and raises core's interruption."""
    bar = comfy.utils.ProgressBar(1)

    def on_layer(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return on_layer


def _outputs(features_LD: Tensor, pooled_P: Tensor) -> tuple[Tensor, Tensor]:
    """Return features [1,L,D] and pooled [1,P] as core keeps them."""
    device = comfy.model_management.intermediate_device()
    return features_LD[None].float().to(device), pooled_P[None].float().to(device)


class HostedTextEncoder(TextEncoder):
    """Both text towers as core's `cond_stage_model`."""

    def __init__(self, encoder: TextEncoder, identity: str) -> None:
        super().__init__(
            encoder.qwen, encoder.clip, encoder.qwen_tokenizer, encoder.clip_tokenizer, encoder.load_vision
        )
        self.identity = identity  # of the files, for the embedding cache
        self._device: torch.device | None = None
        self.last: TextFeatures | None = None
        for module in self.modules():
            if type(module) in _ADOPTED:
                module.__class__ = _ADOPTED[type(module)]
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()  # core's layers keep the weights, and set what else they need
        self.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where tokens go: core says it, since it may keep weights elsewhere and bring them layer by layer."""
        return self._device or super().device

    @device.setter
    def device(self, device: torch.device | None) -> None:
        self._device = device

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """Take the device core computes on; core's other options are for its own encoders."""
        self.device = options.get("execution_device", self._device)

    def reset_clip_options(self) -> None:
        """Nothing is kept between calls."""

    def memory_estimation_function(self, tokens: dict[str, Any], device: Any = None) -> int:  # noqa: ARG002
        """Return the bytes core should free for activations, and for the vision tower of prompts with pictures."""
        return ACTIVATION_BYTES + (VISION_BYTES if QWEN in tokens and tokens[QWEN].images else 0)

    def encode_token_weights(self, tokens: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Encode what `K5Tokenizer` made: features [1,L,D], pooled [1,P]."""
        request = tokens[QWEN]
        options = {"images": request.images, "max_tokens": request.max_tokens, "on_layer": _bar()}
        self.last = text = self.encode(request.prompt, request.template, **options)
        pooled_P = text.pooled_P
        if tokens[CLIP_L].prompt != request.prompt:  # core's node with two prompt fields
            pooled_P = self.encode(tokens[CLIP_L].prompt, request.template, **options).pooled_P
        return *_outputs(text.features_LD, pooled_P), {}


class Request:
    """A prompt with how it is to be encoded; tokens are made when the encoder runs."""

    def __init__(self, prompt: str, template: str, max_tokens: int, images: Sequence[Tensor] = ()) -> None:
        self.prompt = prompt
        self.template = template
        self.max_tokens = max_tokens
        self.images = images  # [3,H,W] in -1…1


class K5Tokenizer:
    """What core's CLIP calls to tokenize; keeps the prompt whole, since the template belongs to the encoder."""

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, tokenizer_options: dict[str, Any] | None = None, **_: Any
    ) -> dict[str, Request]:  # fmt: skip
        """Return the prompt under core's two names; weights such as (word:1.2) are text to these models."""
        if return_word_ids:
            raise TextError("Kandinsky 5 prompts have no word ids. Use a plain text encode node.")
        options = tokenizer_options or {}
        request = Request(
            text,
            options.get(TEMPLATE, DEFAULT_TEMPLATE),
            options.get(MAX_TOKENS, DEFAULT_MAX_TOKENS),
            options.get(IMAGES, ()),
        )
        return {QWEN: request, CLIP_L: request}

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing of it is saved into checkpoints."""
        return {}


def load(qwen: Path, clip: Path, tokenizer: Path | None, dtype: str) -> comfy.sd.CLIP:
    """Load both encoders into core's CLIP."""
    options = {
        "tokenizer_path": tokenizer or _tokenizer(qwen, "text_encoders/qwen25_tokenizer"),
        "clip_tokenizer_path": _tokenizer(clip, "sd1_tokenizer"),
        "dtype": _compute_dtype(qwen, dtype),
        "nf4": dtype == NF4,
    }
    hosted = HostedTextEncoder(load_text_encoder(qwen, clip, **options), encoder_hash(qwen, clip, **options))
    comfy.model_management.archive_model_dtypes(hosted)
    out = comfy.sd.CLIP(no_init=True)
    out.cond_stage_model = hosted
    out.tokenizer = K5Tokenizer()
    patcher_class = PackedPatcher if formats(hosted) else comfy.model_patcher.CoreModelPatcher
    out.patcher = patcher_class(
        hosted,
        load_device=comfy.model_management.text_encoder_device(),
        offload_device=comfy.model_management.text_encoder_offload_device(),
    )
    out.patcher.is_clip = True
    out.patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
    out.layer_idx = out.apply_hooks_to_conds = None
    out.use_clip_schedule = False
    out.tokenizer_options = {}
    return out


def _compute_dtype(qwen: Path, dtype: str) -> torch.dtype | None:
    """Return the dtype of what is not packed, None for the file's own."""
    if dtype in ("auto", NF4):
        return None
    if DTYPES[dtype] not in FP8:
        return DTYPES[dtype]
    checkpoint = open_checkpoint(qwen, part="text_encoder")
    if checkpoint.is_gguf:
        raise BackendUnavailable(f"{qwen} is a GGUF file, whose weights stay as they are packed. Set dtype to 'auto'.")
    stores_fp8 = any(checkpoint.dtype(name) in FP8 for name in checkpoint.tensors)
    return None if stores_fp8 else DTYPES[dtype]


def _tokenizer(weights: Path, own: str) -> Path | None:
    """Return None when the weights bring a tokenizer, else ComfyUI's copy of it."""
    try:
        tokenizer_folder(weights, None)
    except TextError:
        return Path(comfy.__path__[0]) / own
    return None


def encode(
    clip: Any, prompt: str, template: str, max_tokens: int, images: Sequence[Tensor], cache: EmbeddingCache
) -> EncodedText:
    """Encode with our text encoder, or with core's for Kandinsky 5; `images` are [H,W,3] in 0…1."""
    if not isinstance(clip.cond_stage_model, HostedTextEncoder):
        if images:
            raise TextError(
                "ComfyUI's own text encoder does not show Qwen the picture to edit. "
                "Use the Kandinsky 5 Text Encoder Loader."
            )
        return _encode_with_core(clip, prompt)
    options = {TEMPLATE: template, MAX_TOKENS: max_tokens, IMAGES: shown(images)}
    tokens = clip.tokenize(prompt, tokenizer_options=options)
    if clip.patcher.patches or clip.patcher.forced_hooks:  # a LoRA changes the result: nothing cached applies
        conditioning = clip.encode_from_tokens_scheduled(tokens)
        text = clip.cond_stage_model.last
        return EncodedText(conditioning, text.tokens, text.dropped, cut_note(text))
    text = encode_cached(
        cache,
        clip.cond_stage_model.identity,
        lambda: _on_device(clip, tokens),
        prompt,
        template,
        images=options[IMAGES],
        max_tokens=max_tokens,
        on_layer=_bar(),
    )
    features_BLD, pooled_BP = _outputs(text.features_LD, text.pooled_P)
    conditioning = [[features_BLD, {"pooled_output": pooled_BP}]]
    return EncodedText(conditioning, text.tokens, text.dropped, cut_note(text))


def _on_device(clip: comfy.sd.CLIP, tokens: dict[str, Request]) -> HostedTextEncoder:
    """Have core load the encoder, which frees what is in the way."""
    clip.load_model(tokens)
    clip.cond_stage_model.device = clip.patcher.load_device
    return clip.cond_stage_model


def _encode_with_core(clip: Any, prompt: str) -> EncodedText:
    tokens = clip.tokenize(prompt)
    if QWEN not in tokens:
        raise TextError(
            "This text encoder is not Kandinsky 5's. Use the Kandinsky 5 Text Encoder Loader, "
            "or DualCLIPLoader with type 'kandinsky5'."
        )
    conditioning = clip.encode_from_tokens_scheduled(tokens)
    length = conditioning[0][0].shape[1]
    note = "Encoded by ComfyUI's own encoder: its template and its features before the final norm, no token limit."
    return EncodedText(conditioning, length, 0, note)
