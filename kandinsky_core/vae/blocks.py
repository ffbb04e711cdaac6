"""The graph both autoencoders share; what differs between video and image arrives as `Layers`.

Shape legend: B batch, C channels, T/H/W frames, rows, columns (T absent in the image autoencoder), S = H*W, N = T*S.
Parameter names are those of the diffusers checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ShapeError, VariantError
from ..shapes import VAE_SPATIAL, snap_side
from ..variants import VAESpec

NORM_EPS = 1e-6
PIXEL_CHANNELS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """Factories of the layers an autoencoder is made of."""

    conv: Callable[[int, int, int], nn.Module]  # (channels in, channels out, kernel)
    down: Callable[[int, int], nn.Module]  # (channels, level)
    up: Callable[[int, int], nn.Module]  # (channels, level)
    norm: Callable[[int], nn.Module]  # (channels); torch accumulates 16-bit statistics in float32
    linear: Callable[[int], nn.Module]  # (channels in = channels out)


def activate(x: Tensor) -> Tensor:
    """Apply SiLU, in place when no gradient is recorded; `x` must be a temporary."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResBlock(nn.Module):
    """Two normalised convolutions added to their input."""

    def __init__(self, channels_in: int, channels_out: int, layers: Layers) -> None:
        super().__init__()
        self.norm1 = layers.norm(channels_in)
        self.conv1 = layers.conv(channels_in, channels_out, 3)
        self.norm2 = layers.norm(channels_out)
        self.conv2 = layers.conv(channels_out, channels_out, 3)
        self.conv_shortcut = (
            layers.conv(channels_in, channels_out, 1) if channels_in != channels_out else None
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv1(activate(self.norm1(x))))
        h = self.conv2(activate(h))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class FrameCausalAttention(nn.Module):
    """Single-head attention in which frame t sees the frames up to t; one frame is plain attention.

    Frames are queried one after the other against the keys so far: no mask, half the work.
    """

    def __init__(self, channels: int, layers: Layers) -> None:
        super().__init__()
        self.group_norm = layers.norm(channels)
        self.to_q = layers.linear(channels)
        self.to_k = layers.linear(channels)
        self.to_v = layers.linear(channels)
        self.to_out = nn.ModuleList([layers.linear(channels)])

    def forward(self, x: Tensor) -> Tensor:
        frame_tok = x.shape[-2] * x.shape[-1]
        h_BNC = self.group_norm(x).flatten(2).transpose(1, 2)
        q_B1NC, k_B1NC, v_B1NC = (to(h_BNC).unsqueeze(1) for to in (self.to_q, self.to_k, self.to_v))
        frames = [
            F.scaled_dot_product_attention(
                q_B1NC[:, :, end - frame_tok : end], k_B1NC[:, :, :end], v_B1NC[:, :, :end]
            )
            for end in range(frame_tok, q_B1NC.shape[2] + 1, frame_tok)
        ]
        out_BNC = self.to_out[0](torch.cat(frames, dim=2).squeeze(1))
        return x + out_BNC.transpose(1, 2).reshape(x.shape)


class MidBlock(nn.Module):
    """Residual block, attention, residual block on the latent grid."""

    def __init__(self, channels: int, layers: Layers) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([FrameCausalAttention(channels, layers)])
        self.resnets = nn.ModuleList([ResBlock(channels, channels, layers) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class DownBlock(nn.Module):
    """Residual blocks of one encoder level, then the step to the next level."""

    def __init__(
        self, channels_in: int, channels_out: int, depth: int, layers: Layers, down: nn.Module | None
    ) -> None:
        super().__init__()
        self.resnets = _resnets(channels_in, channels_out, depth, layers)
        self.downsamplers = nn.ModuleList([down]) if down is not None else ()

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """What it runs; not as a forward of its own, because its caller would hold its input until it is done."""
        return (*self.resnets, *self.downsamplers)


class UpBlock(nn.Module):
    """Residual blocks of one decoder level, then the step to the next level."""

    def __init__(
        self, channels_in: int, channels_out: int, depth: int, layers: Layers, up: nn.Module | None
    ) -> None:
        super().__init__()
        self.resnets = _resnets(channels_in, channels_out, depth, layers)
        self.upsamplers = nn.ModuleList([up]) if up is not None else ()

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """What it runs, as in `DownBlock`."""
        return (*self.resnets, *self.upsamplers)


class Encoder(nn.Module):
    """Pixels to `2 x latent_channels` maps of mean and log variance."""

    def __init__(self, spec: VAESpec, layers: Layers) -> None:
        super().__init__()
        widths = spec.block_out_channels
        last = len(widths) - 1
        self.conv_in = layers.conv(PIXEL_CHANNELS, widths[0], 3)
        self.down_blocks = nn.ModuleList(
            DownBlock(
                widths[max(level - 1, 0)],
                width,
                spec.layers_per_block,
                layers,
                layers.down(width, level) if level < last else None,
            )
            for level, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], layers)
        self.conv_norm_out = layers.norm(widths[-1])
        self.conv_out = layers.conv(widths[-1], 2 * spec.latent_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            for layer in block.layers:
                x = layer(x)
        return self.conv_out(activate(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents to pixels; its levels run from the deepest to the widest grid."""

    def __init__(self, spec: VAESpec, layers: Layers) -> None:
        super().__init__()
        widths = spec.block_out_channels[::-1]
        last = len(widths) - 1
        self.conv_in = layers.conv(spec.latent_channels, widths[0], 3)
        self.mid_block = MidBlock(widths[0], layers)
        self.up_blocks = nn.ModuleList(
            UpBlock(
                widths[max(level - 1, 0)],
                width,
                spec.layers_per_block + 1,
                layers,
                layers.up(width, level) if level < last else None,
            )
            for level, width in enumerate(widths)
        )
        self.conv_norm_out = layers.norm(widths[-1])
        self.conv_out = layers.conv(widths[-1], PIXEL_CHANNELS, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            for layer in block.layers:
                x = layer(x)
        return self.conv_out(activate(self.conv_norm_out(x)))


def check_spec(spec: VAESpec, kind: str) -> None:
    """Refuse a specification of the other autoencoder or one whose grid would not be 8 times smaller."""
    if spec.kind != kind:
        raise VariantError(
            f"A {kind} autoencoder cannot be built from a specification of kind {spec.kind!r}."
        )
    if len(spec.block_out_channels) != 4:
        raise VariantError(
            f"block_out_channels {spec.block_out_channels} has {len(spec.block_out_channels)} levels; "
            "both autoencoders have 4 (three halvings of each side)."
        )
    if odd := [width for width in spec.block_out_channels if width % spec.norm_num_groups]:
        raise VariantError(
            f"block_out_channels {odd} are not multiples of norm_num_groups {spec.norm_num_groups}."
        )


def check_sides(height_px: int, width_px: int) -> None:
    """Refuse a picture whose sides the three halvings cannot divide."""
    for name, side in (("height", height_px), ("width", width_px)):
        if side < VAE_SPATIAL or side % VAE_SPATIAL:
            raise ShapeError(
                f"{name} {side} is not a positive multiple of {VAE_SPATIAL}. Use {snap_side(side, VAE_SPATIAL)}."
            )


def _resnets(channels_in: int, channels_out: int, depth: int, layers: Layers) -> nn.ModuleList:
    return nn.ModuleList(
        ResBlock(channels_in if index == 0 else channels_out, channels_out, layers) for index in range(depth)
    )
