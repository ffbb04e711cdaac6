"""Tiny random models in the formats of the real ones, under the folders of a ComfyUI `models` directory.

The transformers take the published text widths (3584, 768) and 64-wide heads, so ComfyUI's own loader recognises the
video one too.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from comfyui_kandinsky5.kandinsky_core.io import save_checkpoint, spec_metadata
from comfyui_kandinsky5.kandinsky_core.model import CrossDiT
from comfyui_kandinsky5.kandinsky_core.vae.flux import FluxVAE
from comfyui_kandinsky5.kandinsky_core.vae.hunyuan import HunyuanVideoVAE
from comfyui_kandinsky5.kandinsky_core.variants import VARIANTS, CrossDiTSpec, VAESpec

VIDEO, IMAGE, EDIT = "k5_tiny_video.safetensors", "k5_tiny_image.safetensors", "k5_tiny_edit.safetensors"
VIDEO_VAE, IMAGE_VAE = "k5_tiny_video_vae.safetensors", "k5_tiny_image_vae.safetensors"
QWEN, CLIP = "k5_tiny_qwen", "k5_tiny_clip"

VIDEO_SPEC = CrossDiTSpec(
    model_dim=128, ff_dim=256, time_dim=64, num_text_blocks=1, num_visual_blocks=2,
    axes_dims=(16, 24, 24), visual_cond=True,
)  # fmt: skip
IMAGE_SPEC = replace(VIDEO_SPEC, visual_cond=False)
EDIT_SPEC = replace(IMAGE_SPEC, instruct_type="channel")
_SMALL = dict(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)
VIDEO_VAE_SPEC = VAESpec(kind="hunyuan", scaling_factor=0.476986, **_SMALL)
IMAGE_VAE_SPEC = VAESpec(kind="flux", scaling_factor=0.3611, **_SMALL)

QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>",
)  # fmt: skip
CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def write(models: Path) -> None:
    """Write every tiny model under `models`."""
    for name, spec, row in (
        (VIDEO, VIDEO_SPEC, "lite_i2v_5s"),
        (IMAGE, IMAGE_SPEC, "lite_t2i"),
        (EDIT, EDIT_SPEC, "lite_i2i"),
    ):
        metadata = spec_metadata(replace(VARIANTS[row], spec=spec))
        save_checkpoint(models / "diffusion_models" / name, _weights(CrossDiT(spec)), metadata)
    for name, vae in ((VIDEO_VAE, HunyuanVideoVAE(VIDEO_VAE_SPEC)), (IMAGE_VAE, FluxVAE(IMAGE_VAE_SPEC))):
        metadata = {"kandinsky5.vae": json.dumps(asdict(vae.spec))}
        save_checkpoint(models / "vae" / name, _weights(vae), metadata)
    _text_encoders(models / "text_encoders")


def _weights(module: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Unit-gain matrices and uneven norms, float32."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.named_parameters():
        value.data.normal_(std=0.02 if value.ndim < 2 else value[0].numel() ** -0.5, generator=generator)
        if value.ndim == 1 and "norm" in name and name.endswith("weight"):
            value.data += 1
    return {name: value.detach() for name, value in module.state_dict().items()}


def _text_encoders(folder: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, Qwen2_5_VLConfig, Qwen2_5_VLModel

    ids = {name: 256 + index for index, name in enumerate(QWEN_SPECIAL)}
    text = {
        "vocab_size": 256 + len(QWEN_SPECIAL), "hidden_size": 3584, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 28, "num_key_value_heads": 1, "max_position_embeddings": 4096,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 3584,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    qwen = Qwen2_5_VLModel(
        Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, image_token_id=ids["<|image_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        )
    ).bfloat16()  # fmt: skip
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=256 + len(CLIP_SPECIAL), hidden_size=768, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=12, bos_token_id=256, eos_token_id=257, pad_token_id=257,
        )
    )  # fmt: skip
    for model, name, special in ((qwen, QWEN, QWEN_SPECIAL), (clip, CLIP, CLIP_SPECIAL)):
        model.load_state_dict(_weights(model))
        model.save_pretrained(folder / name)
        _tokenizer(folder / name, special)


def _tokenizer(folder: Path, special: tuple[str, ...]) -> None:
    """A byte-level tokenizer without merges: one token a byte, then the special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: index for index, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
