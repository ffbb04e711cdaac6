"""Layer classes that train the autoencoders fast on a CPU: the `ops` of both, same sums, same weights.

Activations are bfloat16, weights float32. Convolutions run as 2-D ones over stacked frames, which also avoids torch's
bfloat16 `conv3d` on CPUs: its weight gradient is NaN for one output frame and it writes outside its buffer for 1x1x1
kernels (torch 2.13).
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable


class FoldedConv3d(nn.Conv3d):
    """Causal `Conv3d` with its own replicated padding; temporal taps are stacked into channels."""

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        taps, pace, stride = self.kernel_size[0], self.stride[0], self.stride[1:]
        weight, bias = self.weight.to(x_BCTHW.dtype), self.bias.to(x_BCTHW.dtype)
        batch, _, frames = x_BCTHW.shape[:3]
        x_NCHW = x_BCTHW.transpose(1, 2).flatten(0, 1)
        if taps > 1:
            x_NCHW = F.pad(x_NCHW, (taps // 2,) * 4, mode="replicate")
        if frames == 1 or taps == 1:
            # Every temporal tap meets the same picture, but only the newest learns from it: if all moved alike,
            # pictures would teach the network to average over time.
            picture = weight[:, :, -1] + weight[:, :, :-1].sum(2).detach()
            return F.conv2d(x_NCHW, picture, bias, stride).unflatten(0, (batch, frames)).transpose(1, 2)
        x_BTCHW = x_NCHW.unflatten(0, (batch, frames))
        x_BTCHW = torch.cat([x_BTCHW[:, :1]] * (taps - 1) + [x_BTCHW], 1)
        x_BTKHW = torch.cat([x_BTCHW[:, tap : tap + frames : pace] for tap in range(taps)], 2)
        out = F.conv2d(x_BTKHW.flatten(0, 1), weight.transpose(1, 2).flatten(1, 2), bias, stride)
        return out.unflatten(0, x_BTKHW.shape[:2]).transpose(1, 2)


class CastConv2d(nn.Conv2d):
    """`Conv2d` whose weights follow the input's dtype."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self._conv_forward(x_BCHW, self.weight.to(x_BCHW.dtype), self.bias.to(x_BCHW.dtype))


class _GroupNorm(torch.autograd.Function):
    """Group normalisation whose backward is four passes over the data; torch's bfloat16 one is five times slower."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, gain: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        x = x.contiguous()
        batch, channels = x.shape[:2]
        cells = x[0, 0].numel()
        out, mean_BG, scale_BG = torch.native_group_norm(x, gain, bias, batch, channels, cells, groups, eps)
        ctx.save_for_backward(x, gain, mean_BG, scale_BG)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, mean_BG, scale_BG = ctx.saved_tensors
        batch, channels = x.shape[:2]
        groups = mean_BG.shape[1]
        x_BCN, grad_BCN = x.flatten(2), grad.contiguous().flatten(2)
        width = channels // groups
        mean_BC = mean_BG.float().repeat_interleave(width, 1)
        scale_BC = scale_BG.float().repeat_interleave(width, 1)
        sum_BC = grad_BCN.sum(2).float()
        aligned_BC = ((grad_BCN * x_BCN).sum(2).float() - mean_BC * sum_BC) * scale_BC
        weight = gain.float()

        def group_mean(values_BC: Tensor) -> Tensor:
            total_BG = (weight * values_BC).unflatten(1, (groups, width)).sum(2)
            return (total_BG / (width * x_BCN.shape[2])).repeat_interleave(width, 1)

        slope_BC = -scale_BC.square() * group_mean(aligned_BC)
        offset_BC = -scale_BC * group_mean(sum_BC) - slope_BC * mean_BC
        own_BC1, slope_BC1, offset_BC1 = (
            value.to(x.dtype).unsqueeze(2) for value in (scale_BC * weight, slope_BC, offset_BC)
        )
        out_BCN = torch.addcmul(offset_BC1, x_BCN, slope_BC1).addcmul_(grad_BCN, own_BC1)
        return out_BCN.view_as(x), aligned_BC.sum(0).to(gain.dtype), sum_BC.sum(0).to(gain.dtype), None, None


class FastGroupNorm(nn.GroupNorm):
    """`GroupNorm` for 16-bit activations; statistics are float32 inside."""

    def forward(self, x: Tensor) -> Tensor:
        gain, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return _GroupNorm.apply(x, gain, bias, self.num_groups, self.eps)


class CastLinear(nn.Linear):
    """`Linear` whose weights follow the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


TRAINING_OPS = SimpleNamespace(
    Conv2d=CastConv2d, Conv3d=FoldedConv3d, GroupNorm=FastGroupNorm, Linear=CastLinear
)
