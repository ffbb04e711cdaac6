"""CLIP's text tower: sizes from config.json or tensor shapes, and the state at the end marker as the pooled vector."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..io.checkpoint import Checkpoint
from .weights import Layout, assign, building, looks_like, tower_names

if TYPE_CHECKING:
    from transformers import CLIPTextConfig

WIDTH, HEADS = 768, 12  # of CLIP ViT-L/14; a single file does not say its heads

CLIP = Layout(
    title="CLIP's text encoder",
    tower=re.compile(
        r"^(?:(?:[\w.]+\.)?text_model\.)?(?P<name>(?:embeddings\.(?:token|position)_embedding|encoder\.layers|final_layer_norm)\..+)$"
    ),
    ignored=re.compile(r"(^|.*\.)(position_ids|text_projection(\.weight)?|logit_scale|vision_model\..+|visual_projection\.weight)$"),
)


def load_clip_tower(checkpoint: Checkpoint) -> nn.Module:
    """Text tower in float32, as released, whatever the file stores."""
    from transformers import CLIPTextModel

    names = tower_names(checkpoint, CLIP)
    with building(checkpoint), torch.device("meta"):
        config = clip_config(checkpoint, names)
        tower = CLIPTextModel(config)
    assign(tower, checkpoint, CLIP, torch.float32)
    for name, buffer in list(tower.named_buffers()):
        if buffer.is_meta:  # position_ids, in no file
            owner = tower.get_submodule(name.rpartition(".")[0])
            owner.register_buffer("position_ids", torch.arange(buffer.shape[-1])[None], persistent=False)
    return tower


def clip_config(checkpoint: Checkpoint, names: Mapping[str, str]) -> CLIPTextConfig:
    """Sizes from the folder's config.json, else from the tensor shapes of a single file."""
    from transformers import CLIPConfig, CLIPTextConfig

    match checkpoint.config.get("model_type"):
        case "clip":
            return CLIPConfig(**checkpoint.config).text_config
        case "clip_text_model":
            return CLIPTextConfig(**checkpoint.config)
        case None:
            return CLIPTextConfig(**_sizes(checkpoint, names))
        case other:
            raise CheckpointError(f"{checkpoint.path} is not CLIP: its config.json says {other!r}.")


def pooled_state(tower: nn.Module, ids: Tensor, end_id: int) -> Tensor:
    """`[P]`: final-normed state at the first end marker of `ids` `[L]`, without projection.

    Looked up by the tokenizer's id: the published config says `eos_token_id: 2`, for which transformers takes the
    largest id instead, and that is the end marker only in CLIP's own vocabulary.
    """
    states_LP = tower(input_ids=ids[None]).last_hidden_state[0]
    return states_LP[int((ids == end_id).nonzero()[0])]


def _sizes(checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, Any]:
    needed = ("embeddings.token_embedding", "embeddings.position_embedding", "encoder.layers.0.mlp.fc1")
    if missing := [name for name in needed if f"{name}.weight" not in names]:
        raise CheckpointError(
            f"{checkpoint.path} is not a whole CLIP text encoder: {', '.join(missing)} missing. "
            f"{looks_like(checkpoint)}"
        )
    (vocab, hidden), (positions, _), (inner, _) = (checkpoint.shape(names[f"{name}.weight"]) for name in needed)
    if hidden != WIDTH:
        raise CheckpointError(
            f"{checkpoint.path} is a CLIP text encoder of width {hidden}; Kandinsky 5 needs CLIP ViT-L/14, "
            f"whose width is {WIDTH} (clip_l.safetensors). Other sizes load from a folder with config.json."
        )
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 1 + max(int(name.split(".")[2]) for name in names if name.startswith("encoder.layers.")),
        "num_attention_heads": HEADS,
        "max_position_embeddings": positions,
    }
