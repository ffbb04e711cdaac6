"""Train the nano CrossDiT on cached latents and prompts: text to video, image to video and text to image in one."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..model.crossdit import CrossDiT
from ..sampling.conditioning import TextCondition
from ..text.encoder import TextEncoder
from ..variants import CrossDiTSpec
from .autoencoder import to_pixels
from .caption import caption
from .draw import draw, scenes
from .objective import flow_matching_loss, logit_normal_times
from .optimizer import Muon
from .run import Run, train
from .text import encode_batch

TASKS = (("t2v", 0.55), ("i2v", 0.33), ("t2i", 0.12))
TEXT_DROP = 0.1  # share of prompts replaced by the empty one, for classifier-free guidance
PROMPTS_PER_CLIP = 3
ENCODE_CLIPS = 50  # clips per encoder call


@dataclass(frozen=True, slots=True)
class Corpus:
    """Everything the transformer trains on, in memory."""

    latents_NCTHW: Tensor  # model units
    clip_text: TextCondition  # [N * PROMPTS_PER_CLIP, …], describes the motion
    picture_text: TextCondition  # [N, …], describes the first frame
    empty_clip: TextCondition  # [1, …]
    empty_picture: TextCondition


def padded(encoder: TextEncoder, prompts: list[str], template: str, length: int) -> TextCondition:
    """Encode prompts and pad them to `length` tokens."""
    parts = []
    for start in range(0, len(prompts), 200):
        features, mask, pooled = encode_batch(encoder, prompts[start : start + 200], template)
        room = length - features.shape[1]
        parts.append(
            (
                torch.nn.functional.pad(features.float(), (0, 0, 0, room)),
                torch.nn.functional.pad(mask, (0, room)),
                pooled.float(),
            )
        )
    features, masks, pooled = (torch.cat(column) for column in zip(*parts, strict=True))
    return TextCondition(features, pooled, masks)


@torch.no_grad()
def make_corpus(
    run: Run, encode: Callable[[Tensor], Tensor], scale: float, encoder: TextEncoder,
    *, count: int, size_px: int, frames: int, text_tokens: int = 24,
) -> Corpus:  # fmt: skip
    """Draw `count` training clips, encode them with `encode` (pixels to raw latents), and write and encode prompts."""
    rng = random.Random(f"{run.seed}/prompts")
    latents, clips, pictures = [], [], []
    chunk: list[Tensor] = []
    for index, item in enumerate(scenes(run.seed, count, unseen=False)):
        chunk.append(draw(item, size_px=size_px, frames=frames))
        clips += [caption(item, rng) for _ in range(PROMPTS_PER_CLIP)]
        pictures.append(caption(item, rng, moving=False))
        if len(chunk) == ENCODE_CLIPS or index == count - 1:
            pixels = to_pixels((torch.stack(chunk) * 255).round(), run.device)
            latents.append(encode(pixels).float() * scale)
            chunk = []
    return Corpus(
        torch.cat(latents),
        padded(encoder, clips, "video", text_tokens),
        padded(encoder, pictures, "image", text_tokens),
        padded(encoder, [""], "video", text_tokens),
        padded(encoder, [""], "image", text_tokens),
    )


def pick(text: TextCondition, empty: TextCondition, rows: Tensor, dropped_B: Tensor) -> TextCondition:
    """Select prompts by row and replace the dropped ones by the empty prompt."""
    rows = rows.to(text.features_BLD.device)
    dropped_B = dropped_B.to(rows.device)
    return TextCondition(
        torch.where(dropped_B[:, None, None], empty.features_BLD, text.features_BLD[rows]),
        torch.where(dropped_B[:, None], empty.pooled_BP, text.pooled_BP[rows]),
        torch.where(dropped_B[:, None], empty.mask_BL, text.mask_BL[rows]),
    )


def optimizers(model: CrossDiT, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, output, norms and modulation."""
    inner = [
        weight for name, weight in model.named_parameters()
        if weight.ndim == 2 and "transformer_blocks" in name and "modulation" not in name
    ]  # fmt: skip
    ids = {id(weight) for weight in inner}
    outer = [weight for weight in model.parameters() if id(weight) not in ids]
    return [Muon(inner, lr=lr), torch.optim.AdamW(outer, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)]


def train_transformer(
    run: Run, spec: CrossDiTSpec, corpus: Corpus,
    *, steps: int = 5000, batch: int = 32, lr: float = 2e-3, shift: float = 1.5, stage: str = "dit",
) -> CrossDiT:  # fmt: skip
    """Train from nothing and return the averaged (EMA) weights."""
    torch.manual_seed(run.seed)
    model = CrossDiT(spec).to(run.device)
    average = copy.deepcopy(model).requires_grad_(False)
    count = len(corpus.latents_NCTHW)

    def loss_at(step: int) -> Tensor:
        generator = run.generator(stage, step)
        rows = torch.randint(count, (batch,), generator=generator)
        dropped_B = torch.rand(batch, generator=generator) < TEXT_DROP
        task = random.Random(f"{run.seed}/{stage}/{step}").choices(
            [name for name, _ in TASKS], [share for _, share in TASKS]
        )[0]
        clean = corpus.latents_NCTHW[rows.to(corpus.latents_NCTHW.device)]
        if task == "t2i":
            clean = clean[:, :, :1]
            text = pick(corpus.picture_text, corpus.empty_picture, rows, dropped_B)
        else:
            which = torch.randint(PROMPTS_PER_CLIP, (batch,), generator=generator)
            text = pick(corpus.clip_text, corpus.empty_clip, rows * PROMPTS_PER_CLIP + which, dropped_B)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        time_B = logit_normal_times(batch, generator, shift=shift)
        # The fused attention's backward is half of a CPU step at these sizes; plain matrix products are a tenth.
        with (
            torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32),
            sdpa_kernel(SDPBackend.MATH),
        ):
            return flow_matching_loss(model, clean, text, time_B, noise, known_frames=int(task == "i2v"))

    train(run, stage, model, optimizers(model, lr), loss_at, steps=steps, lr=lr, ema=average)
    return average
