"""Train a nano CrossDiT on cached latents and prompts."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..model.attention import dense
from ..model.crossdit import CrossDiT
from ..sampling.conditioning import Known
from ..train.data import Bucket
from ..train.losses import flow_matching_loss, logit_normal_times
from ..variants import Variant
from .attention import training_attention
from .optimizer import Muon
from .run import Run, train


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """One kind of step: its data, how often it comes, and what the model is given."""

    bucket: Bucket
    batch: int
    weight: float  # relative to the other open lessons
    begin: float = 0.0  # part of all steps after which it comes in
    known_frames: int = 0  # leading latent frames given clean and marked in the mask (image to video)
    stray: float = 0.0  # share of clips whose first frame is another clip's, clean but not marked: not to be followed


def transformer_optimizers(model: CrossDiT, lr: float, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, output, norms and modulation."""
    inner = [
        weight for name, weight in model.named_parameters()
        if weight.ndim == 2 and "transformer_blocks" in name and "modulation" not in name
    ]  # fmt: skip
    ids = {id(weight) for weight in inner}
    outer = [weight for weight in model.parameters() if id(weight) not in ids]
    return [
        Muon(inner, lr=lr, dtype=dtype),
        torch.optim.AdamW(outer, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
    ]


def put_strays(clean_BCTHW: Tensor, noise_BCTHW: Tensor, chosen_B: Tensor) -> None:
    """Put another clip's first frame, free of noise, at the start of the chosen clips, in place.

    Data and noise are made the same there, so the model sees the frame clean at every time and its velocity is zero.
    Without such clips a clean frame alone gives the start away and the mask means nothing.
    """
    chosen_B = chosen_B.to(clean_BCTHW.device)
    strays_BCHW = clean_BCTHW[:, :, 0].roll(1, 0)[chosen_B]
    clean_BCTHW[chosen_B, :, 0] = strays_BCHW
    noise_BCTHW[chosen_B, :, 0] = strays_BCHW


def train_transformer(
    run: Run, stage: str, row: Variant, lessons: Sequence[Lesson], *, steps: int, lr: float, shift: float,
    recipe: object = None,
) -> CrossDiT:  # fmt: skip
    """Train from nothing and return the averaged (EMA) weights; `recipe` says where the lessons come from, for JSON."""
    torch.manual_seed(run.seed)
    model = CrossDiT(row.spec).to(run.device)
    average = copy.deepcopy(model).requires_grad_(False)
    on_cpu = all(weight.is_cpu for weight in model.parameters())
    if run.compile:
        for block in model.visual_transformer_blocks:
            block.compile(dynamic=False)

    def loss_at(step: int) -> Tensor:
        generator = run.generator(stage, step)
        rng = random.Random(f"{run.seed}/{stage}/{step}")
        begun = [lesson for lesson in lessons if step >= lesson.begin * steps]
        lesson = rng.choices(begun, [item.weight for item in begun])[0]
        clean, text, edit = lesson.bucket.draw(lesson.batch, generator)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        time_B = logit_normal_times(lesson.batch, generator, shift=shift)
        known = Known(clean[:, :, : lesson.known_frames] if lesson.known_frames else None, edit)
        if lesson.stray:
            put_strays(clean, noise, torch.rand(lesson.batch, generator=generator) < lesson.stray)
        with (
            torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32),
            sdpa_kernel(SDPBackend.MATH),  # masked text attention: few keys, and a several times faster backward
        ):
            attend = training_attention if on_cpu else dense
            return flow_matching_loss(
                model, clean, text, time_B, noise, known=known, attend=attend,
                rope_scale=row.rope_at(*clean.shape[3:]),
            )  # fmt: skip

    optimizers = transformer_optimizers(model, lr, run.dtype)
    train(run, stage, model, optimizers, loss_at, steps=steps, lr=lr, recipe=recipe, ema=average)
    return average
