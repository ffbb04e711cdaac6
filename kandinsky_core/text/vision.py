"""Qwen2.5-VL's vision tower: pictures become states at the prompt's image tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..io.checkpoint import Checkpoint
from .images import MERGE, Patches
from .qwen import LLAMA_CPP
from .weights import Layout, assign, building, tower_names

if TYPE_CHECKING:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

HEAD_DIM = 80  # of the published vision tower; a single file does not say it
ROPE_THETA = 10_000.0

VISION = Layout(
    title="Qwen2.5-VL with its vision tower",
    tower=re.compile(r"^(?:model\.)?visual\.(?P<name>.+)$"),
    ignored=re.compile(r"^(?:model\.)?(?:language_model\.)?(?:model\.)?(?:embed_tokens|layers|norm|lm_head)\."),
    spelling=LLAMA_CPP,
)


def load_vision_tower(checkpoint: Checkpoint, dtype: torch.dtype | None) -> nn.Module:
    """Vision tower with memory-mapped weights; a text-only file raises `CheckpointError`."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    if not any(VISION.tower.match(name) for name in checkpoint.tensors):
        raise CheckpointError(
            f"{checkpoint.path} has no vision tower, which a prompt with an image needs. "
            "Use the whole Qwen2.5-VL (folder or ComfyUI file)."
        )
    names = tower_names(checkpoint, VISION)
    with building(checkpoint), torch.device("meta"):
        tower = Qwen2_5_VisionTransformerPretrainedModel(vision_config(checkpoint, names))
    assign(tower, checkpoint, VISION, dtype)
    rotary = tower.rotary_pos_emb
    for name, buffer in list(rotary.named_buffers()):  # rotary frequencies, in no file
        pairs = buffer.numel()
        frequencies = ROPE_THETA ** -(torch.arange(pairs, dtype=torch.float32) / pairs)
        rotary.register_buffer(name, frequencies, persistent=False)
    return tower


def vision_config(checkpoint: Checkpoint, names: Mapping[str, str]) -> Qwen2_5_VLVisionConfig:
    """Sizes from the folder's config.json, else from the tensor shapes of a single file."""
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

    if checkpoint.config:
        return Qwen2_5_VLConfig(**checkpoint.config).vision_config
    return Qwen2_5_VLVisionConfig(**_sizes(checkpoint, names))


def image_states(tower: nn.Module, pictures: Sequence[Patches]) -> Tensor:
    """`[tokens, D]`: the states of all pictures' tokens, one after the other, in the tower's dtype."""
    weight = next(tower.parameters())
    values = torch.cat([picture.values_NP for picture in pictures]).to(weight)
    grid = torch.tensor([[1, picture.rows, picture.columns] for picture in pictures], device=weight.device)
    output = tower(values, grid_thw=grid)
    # Older transformers return the merged states themselves.
    return output if isinstance(output, Tensor) else output.pooler_output


def positions(length: int, image: slice, pictures: Sequence[Patches]) -> Tensor:
    """Rotary positions `[3, length]` (time, row, column) of a text with pictures in the positions `image`.

    Text counts on; a picture's tokens share one time and spread over rows and columns; the text after it goes on
    from its larger side. Each picture stands between two marker tokens, which count as text.
    """
    parts, cursor = [], 0

    def text(count: int) -> None:
        nonlocal cursor
        parts.append(torch.arange(cursor, cursor + count).expand(3, -1))
        cursor += count

    text(image.start)
    for picture in pictures:
        text(1)
        rows, columns = picture.rows // MERGE, picture.columns // MERGE
        axes = (torch.arange(count) for count in (1, rows, columns))
        grid_3TRC = torch.stack(torch.meshgrid(*axes, indexing="ij"))
        parts.append(cursor + grid_3TRC.reshape(3, -1))
        cursor += max(rows, columns)
        text(1)
    text(length - image.stop)
    return torch.cat(parts, dim=1)


def _sizes(checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, Any]:
    needed = ("patch_embed.proj.weight", "blocks.0.mlp.gate_proj.weight", "merger.mlp.2.weight")
    if missing := [name for name in needed if name not in names]:
        raise CheckpointError(f"{checkpoint.path}: the vision tower is incomplete, {', '.join(missing)} missing.")
    patch, gate, merger = (checkpoint.shape(names[name]) for name in needed)
    depth = 1 + max(int(name.split(".")[1]) for name in names if name.startswith("blocks."))
    return {
        "depth": depth,
        "hidden_size": patch[0],
        "in_channels": patch[1],
        "temporal_patch_size": patch[2],
        "patch_size": patch[3],
        "intermediate_size": gate[0],
        "num_heads": max(1, patch[0] // HEAD_DIM),
        "out_hidden_size": merger[0],
        "window_size": 112,
        # Every eighth of the published 32 blocks sees the whole picture, the others windows.
        "fullatt_block_indexes": list(range(7, depth, 8)),
    }
