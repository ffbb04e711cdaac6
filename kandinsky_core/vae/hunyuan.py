"""HunyuanVideo autoencoder: 3-D, causal in time, 4 x 8 x 8, raw latents on both sides.

Shape legend: B batch, C channels, T/H/W frames, rows, columns of whatever grid the tensor lives on.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ShapeError
from ..shapes import VAE_SPATIAL, VAE_TEMPORAL, latent_frames, snap_frames
from ..variants import VAESpec
from .blocks import NORM_EPS, PIXEL_CHANNELS, Decoder, Encoder, Layers, check_sides, check_spec
from .convolution import sound_convolutions
from .moments import Moments
from .tiling import DECODE, ENCODE, OnTile, Plan, reference_plan, run_plan

Triple = tuple[int, int, int]


class CausalConv3d(nn.Module):
    """Convolution that sees the present and the past: replicated borders, `kernel - 1` frames in front, none behind."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int,
        *,
        ops: ModuleType | type = nn,
        stride: Triple = (1, 1, 1),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.margin = kernel // 2
        self.conv = ops.Conv3d(channels_in, channels_out, kernel, stride=stride, device=device, dtype=dtype)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        if self.margin == 0:
            return self.conv(x_BCTHW)
        space = (self.margin,) * 4
        if x_BCTHW.shape[2] == 1 and type(self.conv) is nn.Conv3d:
            return self.one_frame(F.pad(x_BCTHW.squeeze(2), space, mode="replicate")).unsqueeze(2)
        return self.conv(F.pad(x_BCTHW, (*space, 2 * self.margin, 0), mode="replicate"))

    def one_frame(self, x_BCHW: Tensor) -> Tensor:
        # A single frame meets every temporal tap, so their sum is the same convolution at a third of the work.
        # Only for torch's own layer: a host's layer may hold its weight elsewhere or in another form.
        weight = self.conv.weight.sum(2, dtype=torch.promote_types(self.conv.weight.dtype, torch.float32))
        return F.conv2d(x_BCHW, weight.to(self.conv.weight.dtype), self.conv.bias, self.conv.stride[1:])


class Downsampler(nn.Module):
    """Strided causal convolution."""

    def __init__(self, conv: CausalConv3d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return self.conv(x_BCTHW)


class Upsampler(nn.Module):
    """Repeat cells, then convolve; in time every frame but the clip's first is repeated (T -> 2T-1)."""

    def __init__(self, conv: CausalConv3d, factors: Triple) -> None:
        super().__init__()
        self.conv = conv
        self.factors = factors

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        frames = x_BCTHW.shape[2]
        factors = self.factors if frames > 1 else (1, *self.factors[1:])
        x_BCTHW = F.interpolate(x_BCTHW, scale_factor=tuple(map(float, factors)), mode="nearest")
        return self.conv(x_BCTHW[:, :, factors[0] - 1 :])


def level_factors(level: int) -> Triple:
    """(time, rows, columns) step after level 0, 1 or 2: space first, then space and time twice."""
    return (1, 2, 2) if level == 0 else (2, 2, 2)


class HunyuanVideoVAE(nn.Module):
    """Encode and decode clips of 4k+1 frames; parameter names are diffusers' `AutoencoderKLHunyuanVideo`."""

    def __init__(
        self,
        spec: VAESpec,
        *,
        ops: ModuleType | type = nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_spec(spec, "hunyuan")
        made = {"device": device, "dtype": dtype}

        def conv(
            channels_in: int, channels_out: int, kernel: int, stride: Triple = (1, 1, 1)
        ) -> CausalConv3d:
            return CausalConv3d(channels_in, channels_out, kernel, ops=ops, stride=stride, **made)

        layers = Layers(
            conv=conv,
            down=lambda width, level: Downsampler(conv(width, width, 3, level_factors(level))),
            up=lambda width, level: Upsampler(conv(width, width, 3), level_factors(level)),
            norm=lambda width: ops.GroupNorm(spec.norm_num_groups, width, eps=NORM_EPS, **made),
            linear=lambda width: ops.Linear(width, width, **made),
        )
        latents = spec.latent_channels
        self.spec = spec
        self.encoder = Encoder(spec, layers)
        self.decoder = Decoder(spec, layers)
        self.quant_conv = ops.Conv3d(2 * latents, 2 * latents, 1, **made)
        self.post_quant_conv = ops.Conv3d(latents, latents, 1, **made)

    def encode(self, x_BCTHW: Tensor, *, plan: Plan | None = None, on_tile: OnTile | None = None) -> Moments:
        """Encode pixels `[B,3,4k+1,8h,8w]`, -1...1, to raw moments `[B,16,k+1,h,w]`.

        Without a plan up to 17 frames go in one pass and longer clips in the released windows.
        """
        check_pixels(x_BCTHW)
        _, _, frames, height, width = x_BCTHW.shape
        plan = plan or reference_plan(latent_frames(frames), height // VAE_SPATIAL, width // VAE_SPATIAL)
        with sound_convolutions(x_BCTHW.device, x_BCTHW.dtype):
            return Moments.split(
                run_plan(plan, x_BCTHW, lambda x: self.quant_conv(self.encoder(x)), ENCODE, on_tile)
            )

    def decode(self, z_BCTHW: Tensor, *, plan: Plan | None = None, on_tile: OnTile | None = None) -> Tensor:
        """Decode raw latents `[B,16,n,h,w]` to pixels `[B,3,4(n-1)+1,8h,8w]`, about -1...1, not clamped.

        Without a plan up to 5 latent frames go in one pass and longer clips in the released windows.
        """
        check_latent(z_BCTHW, self.spec)
        plan = plan or reference_plan(*z_BCTHW.shape[2:])
        with sound_convolutions(z_BCTHW.device, z_BCTHW.dtype):
            return run_plan(plan, z_BCTHW, lambda z: self.decoder(self.post_quant_conv(z)), DECODE, on_tile)


def check_latent(z_BCTHW: Tensor, spec: VAESpec) -> None:
    """Raise `ShapeError` unless the latent is `[B,16,n,h,w]`."""
    if z_BCTHW.ndim != 5 or z_BCTHW.shape[1] != spec.latent_channels or 0 in z_BCTHW.shape[2:]:
        raise ShapeError(
            f"A video latent is [batch, {spec.latent_channels}, frames, rows, columns], "
            f"at least one of each; got {list(z_BCTHW.shape)}."
        )


def check_pixels(x_BCTHW: Tensor) -> None:
    """Raise `ShapeError` unless the clip is `[B,3,4k+1,8h,8w]`."""
    if x_BCTHW.ndim != 5 or x_BCTHW.shape[1] != PIXEL_CHANNELS:
        raise ShapeError(f"A clip is [batch, 3, frames, height, width]; got {list(x_BCTHW.shape)}.")
    _, _, frames, height, width = x_BCTHW.shape
    if frames < 1 or (frames - 1) % VAE_TEMPORAL:
        raise ShapeError(f"{frames} frames: the count must be 4k+1 (1, 5, 9, …). Use {snap_frames(frames)}.")
    check_sides(height, width)
