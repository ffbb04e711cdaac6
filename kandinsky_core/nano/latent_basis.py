"""The latent space of the nano autoencoders: principal components of pixel blocks, closed form.

A network trained from nothing on both sides at once spends hours finding a code; this one is optimal among linear
codes and takes seconds. The encoder is then regressed onto it, the decoder learns to beat its linear inverse, and the
transformers train on it without waiting for either.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..shapes import VAE_SPATIAL, VAE_TEMPORAL

# A channel's spread is its variance to the power 0.2: whitening fully would make fine detail as loud as the colours.
WHITENING = 0.3


@dataclass(frozen=True, slots=True)
class LatentBasis:
    """Affine map between a block of `frames` x 8 x 8 RGB pixels (S values) and its C latent channels."""

    mean_S: Tensor
    project_SC: Tensor
    frames: int = VAE_TEMPORAL  # 1 for the 2-D autoencoder

    def encode(self, x_BCTHW: Tensor) -> Tensor:
        """Map pixels -1…1 `[B,3,4k+1,8h,8w]` to latents `[B,C,k+1,h,w]`, of unit mean square over the sample."""
        return ((blocks(x_BCTHW, self.frames) - self.mean_S) @ self.project_SC).movedim(-1, 1)

    def decode(self, z_BCTHW: Tensor) -> Tensor:
        """Map latents back to pixels by the least-squares inverse."""
        rows = z_BCTHW.movedim(1, -1) @ torch.linalg.pinv(self.project_SC) + self.mean_S
        return unblocks(rows, self.frames)

    def scaled(self, factor: float) -> LatentBasis:
        """Return the basis whose latents are `factor` times as large."""
        return LatentBasis(self.mean_S, self.project_SC * factor, self.frames)

    def to(self, device: torch.device) -> LatentBasis:
        """Return the basis on a device."""
        return LatentBasis(self.mean_S.to(device), self.project_SC.to(device), self.frames)


def blocks(x_BCTHW: Tensor, frames: int) -> Tensor:
    """Cut a clip into `[B,t,h,w,S]`; the first frame stands for a whole block, as causal padding makes it."""
    x_BCTHW = torch.cat([x_BCTHW[:, :, :1].expand(-1, -1, frames - 1, -1, -1), x_BCTHW], 2)
    cut = x_BCTHW.unflatten(4, (-1, VAE_SPATIAL)).unflatten(3, (-1, VAE_SPATIAL)).unflatten(2, (-1, frames))
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def unblocks(rows_BTHWS: Tensor, frames: int) -> Tensor:
    """Undo `blocks`."""
    cut = rows_BTHWS.unflatten(4, (3, frames, VAE_SPATIAL, VAE_SPATIAL)).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return cut.flatten(6, 7).flatten(4, 5).flatten(2, 3)[:, :, frames - 1 :]


def fit(samples: Iterable[Tensor], channels: int, frames: int = VAE_TEMPORAL) -> LatentBasis:
    """Fit the basis to batches of clips `[B,3,T,H,W]` of any sizes, in float64 so that their order does not matter."""
    size = 3 * frames * VAE_SPATIAL**2
    total_S, products_SS, count = torch.zeros(size).double(), torch.zeros(size, size).double(), 0
    for x_BCTHW in samples:
        rows_NS = blocks(x_BCTHW.cpu(), frames).flatten(0, 3).double()
        total_S += rows_NS.sum(0)
        products_SS += rows_NS.T @ rows_NS
        count += len(rows_NS)
    mean_S = total_S / count
    values, vectors = torch.linalg.eigh(products_SS / count - torch.outer(mean_S, mean_S))
    values, vectors = values.flip(0)[:channels], vectors.flip(1)[:, :channels]
    # eigh leaves the sign open; no component is nearly orthogonal to random numbers.
    vectors = vectors * (torch.randn(size, generator=torch.Generator().manual_seed(0)).double() @ vectors).sign()
    spread = values ** (0.5 - WHITENING)
    scale = values**-WHITENING / spread.square().mean().sqrt()
    return LatentBasis(mean_S.float(), (vectors * scale).float(), frames)
