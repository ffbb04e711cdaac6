"""The flow-matching objective of Kandinsky 5: x_t = (1 - t) data + t noise, target = noise - data.

Shapes: B batch, C latent channels, T/H/W latent frames/rows/columns. All latents are in model units (scaled).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.attention import Attend, dense
from ..model.crossdit import CrossDiT
from ..sampling.conditioning import NOTHING_KNOWN, Known, TextCondition, transformer_input


def logit_normal_times(
    batch: int, generator: torch.Generator, *, shift: float = 1.0, mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """Draw flow times in 0…1 `[B]` on the CPU: logit-normal, then shifted towards noise as in sampling."""
    t = torch.sigmoid(mean + std * torch.randn(batch, generator=generator))
    return shift * t / (1 + (shift - 1) * t)


def flow_matching_loss(
    model: CrossDiT,
    clean_BCTHW: Tensor,
    text: TextCondition,
    time_B: Tensor,
    noise_BCTHW: Tensor,
    *,
    known: Known = NOTHING_KNOWN,
    attend: Attend | Sequence[Attend] = dense,
    rope_scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Tensor:
    """Mean squared error of the velocity; known leading frames are given clean and do not count."""
    t_B1111 = time_B.view(-1, 1, 1, 1, 1).to(clean_BCTHW)
    noisy_BCTHW = torch.lerp(clean_BCTHW, noise_BCTHW, t_B1111)
    velocity_BTHWC = model(
        transformer_input(model.spec, noisy_BCTHW, known),
        text.features_BLD,
        text.pooled_BP,
        time_B.to(clean_BCTHW.device) * 1000,
        text_mask_BL=text.mask_BL,
        attend=attend,
        rope_scale=rope_scale,
    )
    target_BCTHW = noise_BCTHW - clean_BCTHW
    velocity_BCTHW = velocity_BTHWC.movedim(-1, 1)
    given = 0 if known.frames_BCTHW is None else known.frames_BCTHW.shape[2]
    return F.mse_loss(velocity_BCTHW[:, :, given:].float(), target_BCTHW[:, :, given:])
