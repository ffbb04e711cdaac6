"""FLUX.1 autoencoder for single pictures: 2-D, 8 x 8, raw latents on both sides.

Shape legend: B batch, C channels, H/W rows and columns of whatever grid the tensor lives on.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ShapeError
from ..variants import VAESpec
from .blocks import NORM_EPS, PIXEL_CHANNELS, Decoder, Encoder, Layers, check_sides, check_spec
from .moments import Moments
from .tiling import OnTile


class Downsampler(nn.Module):
    """Strided convolution with one row of zeros below and one column to the right, none above or left."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsampler(nn.Module):
    """Repeat rows and columns, then convolve."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class FluxVAE(nn.Module):
    """Encode and decode pictures; parameter names are diffusers' `AutoencoderKL` without quant convolutions."""

    def __init__(
        self,
        spec: VAESpec,
        *,
        ops: ModuleType | type = nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_spec(spec, "flux")
        made = {"device": device, "dtype": dtype}
        layers = Layers(
            conv=lambda inside, outside, kernel: ops.Conv2d(
                inside, outside, kernel, padding=kernel // 2, **made
            ),
            down=lambda width, _: Downsampler(ops.Conv2d(width, width, 3, stride=2, **made)),
            up=lambda width, _: Upsampler(ops.Conv2d(width, width, 3, padding=1, **made)),
            norm=lambda width: ops.GroupNorm(spec.norm_num_groups, width, eps=NORM_EPS, **made),
            linear=lambda width: ops.Linear(width, width, **made),
        )
        self.spec = spec
        self.encoder = Encoder(spec, layers)
        self.decoder = Decoder(spec, layers)

    def encode(self, x_BCHW: Tensor, *, on_tile: OnTile | None = None) -> Moments:
        """Encode pixels `[B,3,8h,8w]`, -1...1, to raw moments `[B,16,h,w]` in one pass."""
        if x_BCHW.ndim != 4 or x_BCHW.shape[1] != PIXEL_CHANNELS:
            raise ShapeError(f"A picture is [batch, 3, height, width]; got {list(x_BCHW.shape)}.")
        check_sides(*x_BCHW.shape[2:])
        return Moments.split(_reported(self.encoder(x_BCHW), on_tile))

    def decode(self, z_BCHW: Tensor, *, on_tile: OnTile | None = None) -> Tensor:
        """Decode raw latents `[B,16,h,w]` to pixels `[B,3,8h,8w]`, about -1...1, not clamped, in one pass."""
        if z_BCHW.ndim != 4 or z_BCHW.shape[1] != self.spec.latent_channels or 0 in z_BCHW.shape[2:]:
            raise ShapeError(
                f"An image latent is [batch, {self.spec.latent_channels}, rows, columns], at least one of each; "
                f"got {list(z_BCHW.shape)}."
            )
        return _reported(self.decoder(z_BCHW), on_tile)


def _reported(out: Tensor, on_tile: OnTile | None) -> Tensor:
    if on_tile is not None:
        on_tile(1, 1)
    return out
