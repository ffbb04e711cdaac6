"""Make many clips, pictures or edits at once with the project's own sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..sampling.conditioning import Known, TextCondition
from ..sampling.flow import guide, noise, sample, velocity_of
from ..sampling.schedule import timesteps
from ..shapes import VideoShape
from .codec import clips, pixels
from .family import Family
from .text import encode_batch

BATCH_TOK = 2560  # visual tokens of one forward: more do not get faster on a few CPU cores
BATCH_TOK_GPU = 65_536


@torch.no_grad()
def generate(
    family: Family, prompts: Sequence[str], *, images_BHWC: Tensor | None = None, edit_BHWC: Tensor | None = None,
    frames: int = 17, size_px: int = 64, seed: int = 0, **settings: object,
) -> Tensor:  # fmt: skip
    """Make one clip per prompt, `[B,T,H,W,3]` in 0…1, with the noise of seeds `seed`, `seed + 1`, ….

    `images_BHWC` are first frames, `edit_BHWC` pictures to change, both in 0…1. `settings` replace those of the
    variant: steps, guidance, shift, rope_scale.
    """
    row = replace(family.variant, **settings)
    shape = VideoShape(width_px=size_px, height_px=size_px, frames=frames)
    times = timesteps(row.steps, row.shift)
    batch = max(1, (BATCH_TOK if family.device.type == "cpu" else BATCH_TOK_GPU) // shape.tokens)
    latent = (1, family.transformer.spec.in_visual_dim, *shape.latent_thw)
    out = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        first, edit = (
            None if given is None else pixels(given[start : start + batch, None].to(family.device))
            for given in (images_BHWC, edit_BHWC)
        )
        known = Known(
            frames_BCTHW=None if first is None else family.vae.encode(first).float(),
            edit_BCTHW=None if edit is None else family.vae.encode(edit).float(),
        )
        velocities = [
            velocity_of(
                family.transformer, condition(family, texts, frames, edit), dtype=torch.float32,
                rope_scale=row.rope_at(*shape.latent_thw[1:]), known=known,
            )
            for texts in (part, [row.negative] * (1 if edit is None else len(part)))
        ]  # fmt: skip
        # One draw per clip, so that a clip does not depend on its neighbours in the batch.
        x_BCTHW = torch.cat([noise(latent, seed + start + index) for index in range(len(part))])
        z_BCTHW = sample(guide(*velocities, row.guidance), x_BCTHW.to(family.device), times, known=known)
        out.append(clips(family.vae.decode(z_BCTHW)))
    return torch.cat(out)


def condition(family: Family, texts: Sequence[str], frames: int, edit_BCTHW: Tensor | None) -> TextCondition:
    """Encode prompts in the template of their task; with pictures to edit, -1…1, the text encoder sees them too."""
    template = "image_edit" if edit_BCTHW is not None else "video" if frames > 1 else "image"
    pictures = () if edit_BCTHW is None else list(edit_BCTHW[:, :, 0])
    features_BLD, mask_BL, pooled_BP = encode_batch(family.text, texts, template, pictures)
    return TextCondition(features_BLD, pooled_BP, mask_BL)
