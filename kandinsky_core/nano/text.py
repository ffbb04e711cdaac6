"""The nano text encoders: a tokenizer for the caption language and two small towers, as Hugging Face folders.

They load through `text.load_text_encoder` exactly as the released Qwen2.5-VL and CLIP do, official templates included.
Training asks both towers to name the colour, shape, motion and background at the prompt's last token.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..text.encoder import TextEncoder
from ..text.templates import TEMPLATES, get_template
from ..text.tokens import CLIPTokenizer, QwenTokenizer, load_clip_tokenizer, load_qwen_tokenizer
from .caption import caption, language
from .draw import BACKGROUNDS, COLORS, MOTIONS, SHAPES, scene
from .run import Run, train

QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
)  # fmt: skip
CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
VOCABULARY = 768  # upper bound; a whole word of the language is one token
TEMPLATE_WEIGHT = 50  # copies of the templates among the sentences the tokenizer is trained on

QWEN_WIDTH, QWEN_HEADS, QWEN_LAYERS = 96, 4, 2
CLIP_WIDTH, CLIP_HEADS, CLIP_LAYERS = 64, 4, 2
CLIP_POSITIONS = 77
LABELS = {"color": tuple(COLORS), "shape": SHAPES, "motion": MOTIONS, "background": tuple(BACKGROUNDS)}



def save_tokenizer(folder: Path, special: Sequence[str], *, lower: bool) -> None:
    """Train a byte-level BPE on the caption language and the templates and write `tokenizer.json`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=lower)
    texts = list(language())
    if not lower:
        texts += [template.prefix + template.suffix for template in TEMPLATES.values()] * TEMPLATE_WEIGHT
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=20,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def new_towers(
    qwen_tokenizer: QwenTokenizer, clip_tokenizer: CLIPTokenizer, vocabularies: tuple[int, int]
) -> TextEncoder:
    """Build both towers with fresh weights in float32."""
    from transformers import CLIPTextConfig, CLIPTextModel, Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    section = QWEN_WIDTH // QWEN_HEADS // 6
    qwen = Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(
            vocab_size=vocabularies[0], hidden_size=QWEN_WIDTH, intermediate_size=2 * QWEN_WIDTH,
            num_hidden_layers=QWEN_LAYERS, num_attention_heads=QWEN_HEADS, num_key_value_heads=QWEN_HEADS // 2,
            max_position_embeddings=2048, rope_scaling={"type": "mrope", "mrope_section": [section] * 3},
            initializer_range=QWEN_WIDTH**-0.5, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabularies[1], hidden_size=CLIP_WIDTH, intermediate_size=2 * CLIP_WIDTH,
            num_hidden_layers=CLIP_LAYERS, num_attention_heads=CLIP_HEADS,
            max_position_embeddings=CLIP_POSITIONS, projection_dim=CLIP_WIDTH,
            bos_token_id=clip_tokenizer.start_id, eos_token_id=clip_tokenizer.end_id,
            pad_token_id=clip_tokenizer.end_id,
        )
    )  # fmt: skip
    return TextEncoder(qwen, clip, qwen_tokenizer, clip_tokenizer)


def encode_batch(encoder: TextEncoder, prompts: Sequence[str], template: str) -> tuple[Tensor, Tensor, Tensor]:
    """Encode many prompts at once: features `[B,L,D]`, mask `[B,L]`, pooled `[B,P]`; the same numbers as `encode`."""
    chosen = get_template(template)
    tokens = [encoder.qwen_tokenizer.tokenize(prompt, chosen, chosen.max_tokens) for prompt in prompts]
    length = max(item.kept for item in tokens)
    padded = [item.padded(length, encoder.qwen_tokenizer.pad_id) for item in tokens]
    ids_BL = torch.stack([ids for ids, _ in padded]).to(encoder.device)
    mask_BL = torch.stack([mask for _, mask in padded]).to(encoder.device)
    # Padding is on the right and attention is causal: it changes nothing before it.
    states_BLD = encoder.qwen(input_ids=ids_BL, use_cache=False).last_hidden_state[:, tokens[0].crop :]
    clips = [encoder.clip_tokenizer.tokenize(prompt, CLIP_POSITIONS).ids for prompt in prompts]
    longest = max(map(len, clips))
    end = encoder.clip_tokenizer.end_id
    clip_BL = torch.tensor([[*ids, *[end] * (longest - len(ids))] for ids in clips], device=encoder.device)
    last_B = torch.tensor([len(ids) - 1 for ids in clips], device=encoder.device)
    states = encoder.clip(input_ids=clip_BL).last_hidden_state
    return states_BLD, mask_BL, states[torch.arange(len(clips), device=encoder.device), last_B]


def train_text(
    run: Run, folders: tuple[Path, Path], *, steps: int = 350, batch: int = 32, lr: float = 2e-3
) -> TextEncoder:
    """Make the tokenizers and both towers, train them, and save them in their folders (Qwen, CLIP)."""
    save_tokenizer(folders[0], QWEN_SPECIAL, lower=False)
    save_tokenizer(folders[1], CLIP_SPECIAL, lower=True)
    vocabularies = tuple(
        max(
            max(kept["model"]["vocab"].values()) + 1, max(token["id"] for token in kept["added_tokens"]) + 1
        )
        for kept in (json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")) for folder in folders)
    )
    torch.manual_seed(run.seed)
    encoder = new_towers(load_qwen_tokenizer(folders[0]), load_clip_tokenizer(folders[1]), vocabularies)
    heads = nn.ModuleDict(
        {
            f"{tower}_{name}": nn.Linear(width, len(labels))
            for tower, width in (("qwen", QWEN_WIDTH), ("clip", CLIP_WIDTH))
            for name, labels in LABELS.items()
        }
    )
    whole = nn.ModuleDict({"encoder": encoder, "heads": heads}).to(run.device)

    def loss_at(step: int) -> Tensor:
        rng = random.Random(f"{run.seed}/text/{step}")
        moving = rng.random() < 0.75
        scenes = [scene(rng.randrange(2**31), 0, unseen=False) for _ in range(batch)]
        prompts = [caption(item, rng, moving=moving) for item in scenes]
        states_BLD, mask_BL, pooled_BP = encode_batch(encoder, prompts, "video" if moving else "image")
        last_BD = states_BLD[torch.arange(batch, device=run.device), mask_BL.sum(1) - 1]
        loss = torch.zeros((), device=run.device)
        for name, labels in LABELS.items():
            if name == "motion" and not moving:
                continue
            target = torch.tensor([labels.index(item.names[name]) for item in scenes], device=run.device)
            loss = loss + F.cross_entropy(heads[f"qwen_{name}"](last_BD), target)
            loss = loss + F.cross_entropy(heads[f"clip_{name}"](pooled_BP), target)
        return loss

    optimizer = torch.optim.AdamW(whole.parameters(), lr=lr, weight_decay=0.01)
    train(run, "text", whole, [optimizer], loss_at, steps=steps, lr=lr)
    encoder.qwen.half().save_pretrained(folders[0])
    encoder.clip.half().save_pretrained(folders[1])
    return encoder
