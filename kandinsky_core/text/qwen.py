"""Qwen2.5-VL's text tower: sizes from config.json or tensor shapes, weights by memory map."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..io.checkpoint import Checkpoint
from .weights import Layout, assign, building, looks_like, tower_names

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLTextConfig

HEAD_DIM = 128  # of every published Qwen2.5-VL; a single file does not say it
MROPE_SECTION = (16, 24, 24)  # rotary pairs for time, height, width; their sum is half a head
ROPE_THETA = 1_000_000.0
NORM_EPS = 1e-6

# Names in llama.cpp's GGUF files, piece by piece.
LLAMA_CPP = tuple(
    (re.compile(rf"^{there}\."), rf"{here}.") for there, here in (
        ("token_embd", "embed_tokens"),
        ("output_norm", "norm"),
        ("output", "lm_head"),
        (r"blk\.(\d+)\.attn_norm", r"layers.\1.input_layernorm"),
        (r"blk\.(\d+)\.attn_([qkv])", r"layers.\1.self_attn.\2_proj"),
        (r"blk\.(\d+)\.attn_output", r"layers.\1.self_attn.o_proj"),
        (r"blk\.(\d+)\.ffn_norm", r"layers.\1.post_attention_layernorm"),
        (r"blk\.(\d+)\.ffn_(gate|up|down)", r"layers.\1.mlp.\2_proj"),
    )
)  # fmt: skip

TEXT = Layout(
    title="Qwen2.5-VL",
    tower=re.compile(r"^(?:model\.)?(?:language_model\.)?(?:model\.)?(?P<name>(?:embed_tokens|layers|norm)\..+)$"),
    ignored=re.compile(r"^(?:model\.)?(?:visual\.|(?:language_model\.)?lm_head\.)"),
    spelling=LLAMA_CPP,
)


def load_text_tower(checkpoint: Checkpoint, dtype: torch.dtype | None, *, nf4: bool = False) -> nn.Module:
    """Text tower with memory-mapped weights, or ones packed into four bits as they are read.

    The vision tower and the output head are left on disk.
    """
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    names = tower_names(checkpoint, TEXT)
    with building(checkpoint), torch.device("meta"):
        config = text_config(checkpoint, names)
        tower = Qwen2_5_VLTextModel(config)
    assign(tower, checkpoint, TEXT, dtype, nf4=nf4)
    # Rotary frequencies are in no file: built again, this time with numbers. transformers 4 has one in every layer.
    rotary = type(tower.rotary_emb)(config=config)
    for owner in tower.modules():
        for name, child in list(owner.named_children()):
            if isinstance(child, type(rotary)):
                setattr(owner, name, rotary)
    return tower


def text_config(checkpoint: Checkpoint, names: Mapping[str, str]) -> Qwen2_5_VLTextConfig:
    """Sizes from the folder's config.json, else from the tensor shapes of a single file."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextConfig

    match checkpoint.config.get("model_type"):
        case "qwen2_5_vl":
            return Qwen2_5_VLConfig(**checkpoint.config).text_config
        case "qwen2_5_vl_text":
            return Qwen2_5_VLTextConfig(**checkpoint.config)
        case None:
            return Qwen2_5_VLTextConfig(**_sizes(checkpoint, names))
        case other:
            raise CheckpointError(f"{checkpoint.path} is not Qwen2.5-VL: its config.json says {other!r}.")


def _sizes(checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, Any]:
    needed = ("embed_tokens", "layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.0.mlp.gate_proj")
    if missing := [name for name in needed if f"{name}.weight" not in names]:
        raise CheckpointError(
            f"{checkpoint.path} is not a whole Qwen2.5-VL: {', '.join(missing)} missing. "
            f"{looks_like(checkpoint)}"
        )
    shapes = [checkpoint.shape(names[f"{name}.weight"]) for name in needed]
    (vocab, hidden), (queries, _), (keys, _), (inner, _) = shapes
    if queries != hidden or queries % HEAD_DIM or keys % HEAD_DIM:
        raise CheckpointError(
            f"{checkpoint.path}: width {hidden} with attention {queries}/{keys} is not made of heads of {HEAD_DIM}. "
            "Give a folder with config.json."
        )
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 1 + max(int(name.split(".")[1]) for name in names if name.startswith("layers.")),
        "num_attention_heads": queries // HEAD_DIM,
        "num_key_value_heads": keys // HEAD_DIM,
        "max_position_embeddings": 128_000,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_THETA,
        "rope_scaling": {"type": "mrope", "mrope_section": list(MROPE_SECTION)},
    }
