"""Make many clips, pictures or edits at once with the project's own sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..sampling.conditioning import Known, TextCondition
from ..sampling.flow import Velocity, guide, noise, sample, velocity_of
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
    # The editing template expects a picture that the nano text tower cannot see; instructions are ordinary prompts.
    template = "video" if frames > 1 else "image"
    batch = max(1, (BATCH_TOK if family.device.type == "cpu" else BATCH_TOK_GPU) // shape.tokens)
    out = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        known = _known(family, images_BHWC, edit_BHWC, slice(start, start + batch))

        def velocity(texts: list[str], known: Known = known) -> Velocity:
            features, mask, pooled = encode_batch(family.text, texts, template)
            condition = TextCondition(features, pooled, mask)
            return velocity_of(
                family.transformer, condition, dtype=torch.float32, rope_scale=row.rope_scale, known=known
            )

        # One draw per clip, so that a clip does not depend on its neighbours in the batch.
        latent = (1, family.transformer.spec.in_visual_dim, *shape.latent_thw)
        x_BCTHW = torch.cat([noise(latent, seed + start + index) for index in range(len(part))]).to(family.device)
        guided = guide(velocity(part), velocity([row.negative]), row.guidance)
        out.append(clips(family.vae.decode(sample(guided, x_BCTHW, times, known=known))))
    return torch.cat(out)


def _known(family: Family, images_BHWC: Tensor | None, edit_BHWC: Tensor | None, rows: slice) -> Known:
    """Encode the given pictures of a batch."""

    def encoded(given_BHWC: Tensor | None) -> Tensor | None:
        if given_BHWC is None:
            return None
        return family.vae.encode(pixels(given_BHWC[rows, None].to(family.device))).float()

    return Known(frames_BCTHW=encoded(images_BHWC), edit_BCTHW=encoded(edit_BHWC))
