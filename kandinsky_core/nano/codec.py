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


class Codec(Protocol):
    """Maps pixels -1…1 `[B,3,T,H,W]` to latents in model units and back, without gradients to speak of."""

    def encode(self, x_BCTHW: Tensor) -> Tensor:
        """Latents of pixels."""
        ...

    def decode(self, z_BCTHW: Tensor) -> Tensor:
        """Pixels of latents, not clamped."""
        ...


@dataclass(frozen=True, slots=True)
class ScaledVAE:
    """A real autoencoder as a codec: the posterior's mean times the scaling factor; a picture is one frame."""

    vae: HunyuanVideoVAE | FluxVAE

    @property
    def spec(self) -> VAESpec:
        """The autoencoder's numbers."""
        return self.vae.spec

    def encode(self, x_BCTHW: Tensor) -> Tensor:
        """Latents of pixels."""
        x_BCTHW = x_BCTHW.to(next(self.vae.parameters()))
        if self.spec.kind == "flux":
            return self.vae.encode(x_BCTHW.squeeze(2)).mean.unsqueeze(2) * self.spec.scaling_factor
        return self.vae.encode(x_BCTHW).mean * self.spec.scaling_factor

    def decode(self, z_BCTHW: Tensor) -> Tensor:
        """Pixels of latents."""
        z_BCTHW = z_BCTHW.to(next(self.vae.parameters())) / self.spec.scaling_factor
        if self.spec.kind == "flux":
            return self.vae.decode(z_BCTHW.squeeze(2)).unsqueeze(2)
        return self.vae.decode(z_BCTHW)


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
