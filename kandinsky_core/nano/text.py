"""The nano text encoders: a tokenizer for the nano language and small towers, as Hugging Face folders.

They load through `text.load_text_encoder` exactly as the released Qwen2.5-VL and CLIP do, with the official templates
and a vision tower for editing. Training asks both towers what a caption shows and what an instruction changes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..text.encoder import TEXT_POSITIONS, TextEncoder
from ..text.images import patches
from ..text.templates import TEMPLATES, get_template
from ..text.tokens import CLIP_TOKENS, CLIPTokenizer, QwenTokenizer, load_clip_tokenizer, load_qwen_tokenizer
from ..text.vision import image_states, positions
from .caption import caption, continuation, language
from .codec import pixels
from .draw import BACKGROUNDS, COLORS, MOTIONS, SHAPES, draw, scene
from .edit import KINDS, Edit, edit, instruction, instructions_language
from .run import Run, train

QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
)  # fmt: skip
CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
VOCABULARY = 896  # upper bound; a whole word of the language is one token
TEMPLATE_WEIGHT = 50  # copies of the templates among the sentences the tokenizer is trained on

QWEN_WIDTH, QWEN_HEADS, QWEN_LAYERS = 96, 4, 2
VISION_WIDTH, VISION_HEADS, VISION_LAYERS = 32, 2, 2
CLIP_WIDTH, CLIP_HEADS, CLIP_LAYERS = 64, 4, 2

UNCHANGED = "none"
CAPTION_LABELS = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "motion": MOTIONS,
    "background": tuple(BACKGROUNDS),
}
EDIT_LABELS = {"kind": tuple(KINDS)} | {f"new_{kind}": (UNCHANGED, *names) for kind, names in KINDS.items()}
LABELS = CAPTION_LABELS | EDIT_LABELS
SMOOTHING = 0.15  # of the labels: without it a word learns to deny what training never shows it with
TEMPLATE_OF = {"clip": "video", "continuation": "video", "picture": "image", "edit": "image_edit"}  # kinds of prompts
SHARES = {"clip": 0.4, "continuation": 0.1, "picture": 0.12, "edit": 0.38}  # of the training steps
PICTURE_PX = (128, 256)  # sides of the pictures to edit


def save_tokenizer(folder: Path, special: Sequence[str], *, lower: bool) -> int:
    """Train a byte-level BPE on the language and the templates, write `tokenizer.json`, and return its size."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=lower)
    texts = [*language(), *instructions_language()]
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
    return tokenizer.get_vocab_size()


def new_qwen(tokenizer: QwenTokenizer, vocabulary: int) -> nn.Module:
    """Build Qwen2.5-VL, text and vision tower, with fresh weights in float32."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    section = QWEN_WIDTH // QWEN_HEADS // 6
    start_id, pad_id, end_id = tokenizer.vision_ids
    text = {
        "vocab_size": vocabulary, "hidden_size": QWEN_WIDTH, "intermediate_size": 2 * QWEN_WIDTH,
        "num_hidden_layers": QWEN_LAYERS, "num_attention_heads": QWEN_HEADS, "num_key_value_heads": QWEN_HEADS // 2,
        "max_position_embeddings": 2048, "rope_scaling": {"type": "mrope", "mrope_section": [section] * 3},
        "initializer_range": QWEN_WIDTH**-0.5, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    vision = {
        "depth": VISION_LAYERS, "hidden_size": VISION_WIDTH, "intermediate_size": 2 * VISION_WIDTH,
        "num_heads": VISION_HEADS, "out_hidden_size": QWEN_WIDTH, "fullatt_block_indexes": [VISION_LAYERS - 1],
        "initializer_range": VISION_WIDTH**-0.5,
    }  # fmt: skip
    return Qwen2_5_VLModel(
        Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, image_token_id=pad_id, vision_start_token_id=start_id,
            vision_end_token_id=end_id,
        )
    )  # fmt: skip


def new_clip(tokenizer: CLIPTokenizer, vocabulary: int) -> nn.Module:
    """Build CLIP's text tower with fresh weights in float32."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=CLIP_WIDTH, intermediate_size=2 * CLIP_WIDTH,
            num_hidden_layers=CLIP_LAYERS, num_attention_heads=CLIP_HEADS, max_position_embeddings=CLIP_TOKENS,
            projection_dim=CLIP_WIDTH, bos_token_id=tokenizer.start_id, eos_token_id=tokenizer.end_id,
            pad_token_id=tokenizer.end_id,
        )
    )  # fmt: skip


def encode_batch(
    encoder: TextEncoder, prompts: Sequence[str], template: str, images: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """Encode many prompts at once: features `[B,L,D]`, mask `[B,L]`, pooled `[B,P]`; the same numbers as `encode`.

    `images` are one `[3,H,W]` in -1…1 for each prompt, or none at all.
    """
    chosen = get_template(template)
    pictures = [[patches(image)] for image in images] or [[] for _ in prompts]
    limit = TEXT_POSITIONS if images else chosen.max_tokens
    tokens = [
        encoder.qwen_tokenizer.tokenize(prompt, chosen, limit, [picture.tokens for picture in own])
        for prompt, own in zip(prompts, pictures, strict=True)
    ]
    length = max(item.kept for item in tokens)
    padded = [item.padded(length, encoder.qwen_tokenizer.pad_id) for item in tokens]
    ids_BL = torch.stack([ids for ids, _ in padded]).to(encoder.device)
    mask_BL = torch.stack([mask for _, mask in padded]).to(encoder.device)
    embeds_BLD = encoder.qwen.embed_tokens(ids_BL)
    where_3BL = None
    if images:
        states = image_states(encoder.load_vision().to(encoder.device), [own[0] for own in pictures])
        pads_BL = torch.zeros_like(ids_BL, dtype=torch.bool)
        for row, item in enumerate(tokens):
            pads_BL[row, item.image.start + 1 : item.image.stop - 1] = True
        embeds_BLD = embeds_BLD.masked_scatter(pads_BL[..., None], states.to(embeds_BLD))
        where = [
            positions(ids_BL.shape[1], item.image, own) for item, own in zip(tokens, pictures, strict=True)
        ]
        where_3BL = torch.stack(where, 1).to(encoder.device)
    # Padding is on the right and attention is causal: it changes nothing before it.
    states_BLD = encoder.qwen(
        inputs_embeds=embeds_BLD, position_ids=where_3BL, use_cache=False
    ).last_hidden_state
    return states_BLD[:, tokens[0].crop :], mask_BL, pooled_batch(encoder, prompts)


def pooled_batch(encoder: TextEncoder, prompts: Sequence[str]) -> Tensor:
    """Return CLIP's state at the end marker of each prompt, `[B,P]`."""
    clips = [encoder.clip_tokenizer.tokenize(prompt).ids for prompt in prompts]
    longest = max(map(len, clips))
    end = encoder.clip_tokenizer.end_id
    clip_BL = torch.tensor([[*ids, *[end] * (longest - len(ids))] for ids in clips], device=encoder.device)
    last_B = torch.tensor([len(ids) - 1 for ids in clips], device=encoder.device)
    states = encoder.clip(input_ids=clip_BL).last_hidden_state
    return states[torch.arange(len(clips), device=encoder.device), last_B]


class Reader(nn.Module):
    """The towers with a linear question for each label; the questions are left behind after training."""

    def __init__(
        self, qwen: nn.Module, clip: nn.Module, tokenizers: tuple[QwenTokenizer, CLIPTokenizer]
    ) -> None:
        super().__init__()
        self.vision = qwen.visual
        self.encoder = TextEncoder(qwen.language_model, clip, *tokenizers, lambda: self.vision)
        self.heads = nn.ModuleDict(
            {
                f"{tower}_{name}": nn.Linear(width, len(labels))
                for tower, width in (("qwen", QWEN_WIDTH), ("clip", CLIP_WIDTH))
                for name, labels in LABELS.items()
            }
        )

    def answers(
        self, prompts: Sequence[str], template: str, images: Sequence[Tensor], names: Sequence[str]
    ) -> Iterator[tuple[str, str, Tensor]]:
        """Yield tower, label and logits `[B,classes]`: Qwen's from the prompt's last token, CLIP's from the pooled."""
        states_BLD, mask_BL, pooled_BP = encode_batch(self.encoder, prompts, template, images)
        last_BD = states_BLD[torch.arange(len(prompts), device=mask_BL.device), mask_BL.sum(1) - 1]
        for tower, state in (("qwen", last_BD), ("clip", pooled_BP)):
            for name in names:
                yield tower, name, self.heads[f"{tower}_{name}"](state)


def edit_labels(wanted: Edit) -> dict[str, str]:
    """Return what an instruction says: the kind of the change and the new value of each attribute."""
    new = {f"new_{kind}": wanted.value if kind == wanted.kind else UNCHANGED for kind in KINDS}
    return {"kind": wanted.kind, **new}


def examples(
    rng: random.Random, kind: str, count: int, *, unseen: bool
) -> tuple[list[str], list[Tensor], list[Mapping[str, str]]]:
    """Draw prompts of a kind, pictures `[3,H,W]` in -1…1 if they speak of any, and each prompt's labels."""
    if kind == "edit":
        wanted = [edit(rng.randrange(2**31), 0, unseen=unseen) for _ in range(count)]
        side_px = rng.choice(PICTURE_PX)
        drawn = torch.stack([draw(item.before, size_px=side_px, frames=1) for item in wanted])
        images = list(pixels(drawn)[:, :, 0])
        return [instruction(item, rng) for item in wanted], images, [edit_labels(item) for item in wanted]
    scenes = [scene(rng.randrange(2**31), 0, unseen=unseen) for _ in range(count)]
    if kind == "continuation":
        return [continuation(item, rng) for item in scenes], [], [{"motion": item.motion} for item in scenes]
    moving = kind == "clip"
    shown = [
        {name: item.names[name] for name in CAPTION_LABELS if moving or name != "motion"} for item in scenes
    ]
    return [caption(item, rng, moving=moving) for item in scenes], [], shown


def targets(labels: Sequence[Mapping[str, str]], name: str, device: torch.device) -> Tensor:
    """Return the class of each prompt for one label, `[B]`."""
    return torch.tensor([LABELS[name].index(item[name]) for item in labels], device=device)


def reading_loss(reader: Reader, rng: random.Random, batch: int) -> Tensor:
    """Draw a batch of one kind and return the sum of the questions' cross entropies."""
    kind = rng.choices(tuple(SHARES), tuple(SHARES.values()))[0]
    prompts, images, labels = examples(rng, kind, batch, unseen=False)
    losses = [
        F.cross_entropy(logits, targets(labels, name, logits.device), label_smoothing=SMOOTHING)
        for _, name, logits in reader.answers(prompts, TEMPLATE_OF[kind], images, tuple(labels[0]))
    ]
    return torch.stack(losses).sum()


@torch.no_grad()
def reading_shares(reader: Reader, count: int, *, batch: int = 50) -> dict[str, float]:
    """Return the share of right answers on held-out combinations, by kind of prompt, tower and label."""
    right: dict[str, int] = {}
    batch = min(batch, count)
    rng = random.Random("reading")
    for kind, template in TEMPLATE_OF.items():
        for _ in range(count // batch):
            prompts, images, labels = examples(rng, kind, batch, unseen=True)
            for tower, name, logits in reader.answers(prompts, template, images, tuple(labels[0])):
                key = f"{kind}/{tower}/{name}"
                hits = logits.argmax(1) == targets(labels, name, logits.device)
                right[key] = right.get(key, 0) + int(hits.sum())
    return {key: hits / (count // batch * batch) for key, hits in right.items()}


def train_text(
    run: Run,
    folders: tuple[Path, Path],
    *,
    steps: int,
    batch: int = 32,
    lr: float = 2e-3,
    checked: int = 500,
) -> dict[str, float]:
    """Make the tokenizers and all towers, train them, and save them in their folders (Qwen, CLIP).

    Returns the `reading_shares` of `checked` prompts of each kind.
    """
    vocabularies = (
        save_tokenizer(folders[0], QWEN_SPECIAL, lower=False),
        save_tokenizer(folders[1], CLIP_SPECIAL, lower=True),
    )
    tokenizers = load_qwen_tokenizer(folders[0]), load_clip_tokenizer(folders[1])
    torch.manual_seed(run.seed)
    qwen, clip = new_qwen(tokenizers[0], vocabularies[0]), new_clip(tokenizers[1], vocabularies[1])
    reader = Reader(qwen, clip, tokenizers).to(run.device)

    def loss_at(step: int) -> Tensor:
        return reading_loss(reader, random.Random(f"{run.seed}/text/{step}"), batch)

    optimizer = torch.optim.AdamW(reader.parameters(), lr=lr, weight_decay=0.2)
    recipe = {"batch": batch, "shares": SHARES, "smoothing": SMOOTHING}
    train(run, "text", reader, [optimizer], loss_at, steps=steps, lr=lr, recipe=recipe)
    right = reading_shares(reader, checked)
    qwen.half().save_pretrained(folders[0])
    clip.half().save_pretrained(folders[1])
    return right
