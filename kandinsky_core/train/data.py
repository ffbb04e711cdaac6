"""Cached training data: latents of clips or pictures of one size, and the encoded prompts that describe them.

Shapes: N clips, K prompts of a clip, R prompts, B batch, C latent channels, T/H/W latent frames/rows/columns,
L text tokens, D text width, P pooled width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..sampling.conditioning import TextCondition


@dataclass(frozen=True, slots=True)
class Prompts:
    """Encoded prompts, padded to one length; for classifier-free guidance some of them are empty."""

    features_RLD: Tensor  # float16
    mask_RL: Tensor  # True at tokens
    pooled_RP: Tensor

    def pick(self, rows_B: Tensor) -> TextCondition:
        """Return the prompts of the rows in float32."""
        rows_B = rows_B.to(self.mask_RL.device)
        return TextCondition(self.features_RLD[rows_B].float(), self.pooled_RP[rows_B], self.mask_RL[rows_B])


@dataclass(frozen=True, slots=True)
class Bucket:
    """Clips of one size with rows into `prompts`; an editing bucket also holds the pictures to edit."""

    latents_NCTHW: Tensor  # float16, model units
    rows_NK: Tensor
    prompts: Prompts
    edit_NCTHW: Tensor | None = None

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, TextCondition, Tensor | None]:
        """Return random latents `[B,C,T,H,W]` float32, a prompt of each, and the pictures to edit if there are."""
        at_B = torch.randint(len(self.latents_NCTHW), (batch,), generator=generator)
        which_B = torch.randint(self.rows_NK.shape[1], (batch,), generator=generator)
        text = self.prompts.pick(self.rows_NK[at_B, which_B])
        at_B = at_B.to(self.latents_NCTHW.device)
        edit = None if self.edit_NCTHW is None else self.edit_NCTHW[at_B].float()
        return self.latents_NCTHW[at_B].float(), text, edit
