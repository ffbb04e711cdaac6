"""What foreign weights files look like, as data: used to say what a file is and where it belongs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

DIFFUSION = "it is another model's diffusion weights; use ComfyUI's 'Load Diffusion Model' node"
BUNDLE = "it is another model's checkpoint; use ComfyUI's 'Load Checkpoint' node"
LORA = "load the base weights here and put this file into a LoRA loader"
TEXT = "it belongs in the Kandinsky 5 Text Encoder Loader (folder text_encoders)"
OTHER_TEXT = "Kandinsky 5 needs Qwen2.5-VL 7B and CLIP-L as text encoders"
VAE = "it belongs in the Kandinsky 5 VAE Loader (folder vae)"
OTHER_VAE = "Kandinsky 5 needs the HunyuanVideo autoencoder (video) or the FLUX.1 one (images)"
TRANSFORMER = "it belongs in the Kandinsky 5 Model Loader (folder diffusion_models)"
NEXT = "it has other blocks than Kandinsky 5.0 and needs a pack made for it"


@dataclass(frozen=True, slots=True)
class Signature:
    """A model is `title` when every pattern is found at the start of some tensor name, its prefixes stripped."""

    title: str
    advice: str
    patterns: tuple[str, ...]


def _row(title: str, advice: str, *patterns: str) -> Signature:
    return Signature(title, advice, patterns)


# First match wins: the specific before the general.
SIGNATURES = (
    _row("a LoRA", LORA, r".*\.(lora_(A|B|up|down)|lora\.(up|down)|hada_w1_a|lokr_w1)\b"),
    _row("Kandinsky 6", NEXT, r"visual_transformer_blocks\.\d+\.video_dec_block\."),
    _row("Kandinsky 6", NEXT, r"(audio_embeddings|video_time_embeddings|visual_token_type_embeddings)\."),
    _row("Kandinsky 6", NEXT, r"visual_transformer_blocks\.", r"text_blocks\."),
    _row("a Kandinsky 5 transformer", TRANSFORMER, r"visual_transformer_blocks\.\d+\.cross_attention\."),
    _row("Wan", DIFFUSION, r"head\.modulation", r"blocks\.\d+\.self_attn\."),
    _row("Wan (diffusers)", DIFFUSION, r"condition_embedder\.time_embedder\.", r"blocks\.\d+\.attn1\."),
    _row("HunyuanVideo", DIFFUSION, r"txt_in\.individual_token_refiner\."),
    _row("HunyuanVideo (diffusers)", DIFFUSION, r"context_embedder\.token_refiner\."),
    _row("FLUX", DIFFUSION, r"double_blocks\.\d+\.img_attn\.", r"single_blocks\.\d+\.linear1\."),
    _row("FLUX (diffusers)", DIFFUSION, r"single_transformer_blocks\.", r"x_embedder\.", r"context_embedder\."),
    _row("Stable Diffusion 3", DIFFUSION, r"joint_blocks\.\d+\.context_block\."),
    _row("Stable Diffusion 3 (diffusers)", DIFFUSION, r"pos_embed\.proj\.", r"transformer_blocks\.0\.norm1_context\."),
    _row("PixArt", DIFFUSION, r"(t_block\.1\.|adaln_single\.)", r"(pos_embed\.proj|x_embedder\.proj)\."),
    _row("LTX-Video", DIFFUSION, r"adaln_single\.emb\.timestep_embedder\.", r"patchify_proj\."),
    _row("LTX-Video (diffusers)", DIFFUSION, r"time_embed\.emb\.timestep_embedder\.", r"proj_in\."),
    _row("Qwen-Image", DIFFUSION, r"txt_norm\.", r"transformer_blocks\.\d+\.(img|txt)_mlp\."),
    _row("Mochi", DIFFUSION, r"(t5_yproj|time_embed\.pooler)\."),
    _row("CogVideoX", DIFFUSION, r"(transformer_)?blocks\.0\.norm1\.linear\.", r"patch_embed\."),
    _row("Lumina 2 or Z-Image", DIFFUSION, r"(cap_embedder\.1|time_caption_embed)\.", r"noise_refiner\.0\."),
    _row("Stable Diffusion XL", BUNDLE, r"input_blocks\.0\.0\.", r"label_emb\."),
    _row("Stable Diffusion", BUNDLE, r"input_blocks\.0\.0\."),
    _row("Stable Diffusion (diffusers)", BUNDLE, r"down_blocks\.\d+\.attentions\.", r"time_embedding\."),
    _row("Stable Cascade", BUNDLE, r"clf\.1\."),
    _row("an all-in-one checkpoint", BUNDLE, r"(cond_stage_model|conditioner)\."),
    _row("the CogVideoX autoencoder", OTHER_VAE, r"decoder\.mid_block\.resnets\.0\.norm1\.norm_layer\."),
    _row("the HunyuanVideo autoencoder", VAE, r"decoder\.conv_in\.conv\.", r"post_quant_conv\."),
    _row("the Wan or Qwen-Image autoencoder", OTHER_VAE, r"decoder\.mid(dle\.0\.residual|_block\.\S+\.gamma)"),
    _row("the LTX-Video autoencoder", OTHER_VAE, r"(per_channel_statistics\.|latents_mean)", r"decoder\."),
    _row("a Stable Diffusion autoencoder", OTHER_VAE, r"decoder\.conv_in\.weight", r"post_quant_conv\."),
    _row("an image autoencoder of the FLUX kind", VAE, r"decoder\.conv_in\.weight", r"decoder\.mid(_block)?\."),
    _row("a tiny preview autoencoder", OTHER_VAE, r"(decoder\.|decoder\.layers\.)?[13]\.conv\.0\."),
    _row("Qwen2.5-VL", TEXT, r"visual\.blocks\.", r"(model\.)?(language_model\.)?layers\.\d+\.self_attn\.q_proj\.bias"),
    _row("a Qwen2.5 language model", TEXT, r"(model\.)?(language_model\.)?layers\.\d+\.self_attn\.q_proj\.bias"),
    _row("a Qwen2.5 language model in llama.cpp's form", TEXT, r"blk\.\d+\.attn_q\.bias"),
    _row("CLIP", TEXT, r"(text_model\.)?embeddings\.token_embedding\.", r"(text_model\.)?encoder\.layers\.\d+\."),
    _row("T5", OTHER_TEXT, r"encoder\.block\.\d+\.layer\.0\.SelfAttention\."),
    _row("a language model", OTHER_TEXT, r"(model\.)?(language_model\.)?layers\.\d+\.(self_attn|mlp)\."),
)  # fmt: skip


def recognise(names: Iterable[str]) -> Signature | None:
    """The signature that a set of tensor names carries, None when nothing is known."""
    listing = "\n".join(names)
    for signature in SIGNATURES:
        if all(
            re.search(rf"^(?:model\.)?{pattern}", listing, re.MULTILINE) for pattern in signature.patterns
        ):
            return signature
    return None


def describe(names: Iterable[str]) -> str:
    """One sentence on what the file is and where it belongs."""
    listed = list(names)
    found = recognise(listed)
    if found is None:
        return f"It is not a model this pack knows: {len(listed)} tensors, the first is {min(listed)!r}."
    return f"It looks like {found.title}: {found.advice}."
