"""The latent space of the nano autoencoder: principal components of 4 x 8 x 8 pixel blocks, closed form.

A network trained from nothing on both sides at once spends hours finding a code; this one is optimal among linear
codes and takes seconds. The encoder is then regressed onto it and the decoder learns to beat its linear inverse.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..shapes import VAE_SPATIAL, VAE_TEMPORAL

# Channel spread falls with rank**0.2 of its variance: whitening fully would make fine detail as loud as the colours.
WHITENING = 0.3


@dataclass(frozen=True, slots=True)
class LatentBasis:
    """Affine map between a block of 768 pixel values and its latent channels."""

    mean: Tensor  # [768]
    project: Tensor  # [768, C]

    def encode(self, x_BCTHW: Tensor) -> Tensor:
        """Map pixels -1…1 `[B,3,4k+1,8h,8w]` to latents `[B,C,k+1,h,w]` of unit mean square."""
        return ((blocks(x_BCTHW) - self.mean) @ self.project).movedim(-1, 1)


def blocks(x_BCTHW: Tensor) -> Tensor:
    """Cut a clip into `[B,t,h,w,768]`; the first frame stands for four, as causal padding makes it."""
    x_BCTHW = torch.cat([x_BCTHW[:, :, :1].expand(-1, -1, VAE_TEMPORAL - 1, -1, -1), x_BCTHW], 2)
    batch, channels, frames, height, width = x_BCTHW.shape
    cut = x_BCTHW.reshape(
        batch, channels, frames // VAE_TEMPORAL, VAE_TEMPORAL,
        height // VAE_SPATIAL, VAE_SPATIAL, width // VAE_SPATIAL, VAE_SPATIAL,
    )  # fmt: skip
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def fit(x_BCTHW: Tensor, channels: int) -> LatentBasis:
    """Fit the basis to sample clips, in float64 so that it does not depend on the order of sums."""
    rows = blocks(x_BCTHW).flatten(0, 3).double()
    mean = rows.mean(0)
    covariance = (rows - mean).T @ (rows - mean) / len(rows)
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0)[:channels], vectors.flip(1)[:, :channels]
    vectors = vectors * vectors.sum(0).sign()  # eigh leaves the sign open
    spread = values ** (0.5 - WHITENING)
    scale = values**-WHITENING / spread.square().mean().sqrt()
    return LatentBasis(mean.float(), (vectors * scale).float())
