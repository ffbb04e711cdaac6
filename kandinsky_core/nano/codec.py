"""What stands between pixels and the transformer: an autoencoder in model units, for clips and pictures alike.

`LatentBasis` is one as it is, so a transformer can be measured before an autoencoder has been trained.
Shapes: B batch, T/H/W frames/rows/columns of pixels or latents, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..vae.flux import FluxVAE
from ..vae.hunyuan import HunyuanVideoVAE
from ..variants import VAESpec

BATCH_PX = 16 * 17 * 64 * 64  # pixels of all frames that go through an autoencoder at once


VAE = HunyuanVideoVAE | FluxVAE


def encoded(vae: VAE, x_BCTHW: Tensor) -> Tensor:
    """Encode clips, or pictures as clips of one frame, to the mean of their raw latents `[B,C,t,h,w]`."""
    if isinstance(vae, FluxVAE):
        return vae.encode(x_BCTHW.squeeze(2)).mean.unsqueeze(2)
    return vae.encode(x_BCTHW).mean


def decoded(vae: VAE, z_BCTHW: Tensor) -> Tensor:
    """Decode raw latents `[B,C,t,h,w]` to pixels `[B,3,T,H,W]`."""
    if isinstance(vae, FluxVAE):
        return vae.decode(z_BCTHW.squeeze(2)).unsqueeze(2)
    return vae.decode(z_BCTHW)


class Codec(Protocol):
    """Maps pixels -1…1 `[B,3,T,H,W]` to latents in model units and back."""

    def encode(self, x_BCTHW: Tensor) -> Tensor:
        """Latents of pixels."""
        ...

    def decode(self, z_BCTHW: Tensor) -> Tensor:
        """Pixels of latents, not clamped."""
        ...


@dataclass(frozen=True, slots=True)
class ScaledVAE:
    """A real autoencoder as a codec: the posterior's mean times the scaling factor; a picture is one frame."""

    vae: VAE

    @property
    def spec(self) -> VAESpec:
        """The autoencoder's numbers."""
        return self.vae.spec

    def encode(self, x_BCTHW: Tensor) -> Tensor:
        """Latents of pixels."""
        return encoded(self.vae, x_BCTHW.to(next(self.vae.parameters()))) * self.spec.scaling_factor

    def decode(self, z_BCTHW: Tensor) -> Tensor:
        """Pixels of latents."""
        return decoded(self.vae, z_BCTHW.to(next(self.vae.parameters())) / self.spec.scaling_factor)


def pixels(clip_BTHWC: Tensor) -> Tensor:
    """Turn clips `[B,T,H,W,3]` in 0…1 into `[B,3,T,H,W]` in -1…1."""
    return clip_BTHWC.movedim(-1, 1) * 2 - 1


def clips(pixels_BCTHW: Tensor) -> Tensor:
    """Turn pixels `[B,3,T,H,W]` into clips `[B,T,H,W,3]` in 0…1 on the CPU."""
    return ((pixels_BCTHW.float().clamp(-1, 1) + 1) / 2).movedim(1, -1).cpu()


@torch.no_grad()
def reconstruct(codec: Codec, clip_BTHWC: Tensor, device: torch.device | None = None) -> Tensor:
    """Encode and decode clips, both `[B,T,H,W,3]` in 0…1, computed on `device`."""
    parts = clip_BTHWC.split(max(1, BATCH_PX // clip_BTHWC[0, ..., 0].numel()))
    return torch.cat([clips(codec.decode(codec.encode(pixels(part).to(device)))) for part in parts])
