"""Attention for training on a CPU: three matrix products and their gradients, written out.

torch's fused CPU attention spends several times the forward's time in its backward at the lengths of the nano family
(80 to 1,280 tokens), and its unfused one makes many passes over the score matrix (docs/nano.md has the figures).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, q_BANE: Tensor, k_BANE: Tensor, v_BANE: Tensor) -> Tensor:
        scale = q_BANE.shape[-1] ** -0.5
        weight_BANN = torch.softmax((q_BANE * scale) @ k_BANE.mT, -1)
        out_BANE = weight_BANN @ v_BANE
        ctx.save_for_backward(q_BANE, k_BANE, v_BANE, weight_BANN, out_BANE)
        return out_BANE

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_BANE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BANE, k_BANE, v_BANE, weight_BANN, out_BANE = ctx.saved_tensors
        scale = q_BANE.shape[-1] ** -0.5
        grad_BANE = grad_BANE.contiguous()
        score_BANN = grad_BANE @ v_BANE.mT
        score_BANN = score_BANN.sub_((grad_BANE * out_BANE).sum(-1, keepdim=True)).mul_(weight_BANN).mul_(scale)
        return score_BANN @ k_BANE, score_BANN.mT @ q_BANE, weight_BANN.mT @ grad_BANE


def training_attention(q_BANE: Tensor, k_BANE: Tensor, v_BANE: Tensor) -> Tensor:
    """Attend from every query to every key: an `Attend` of the model with a fast backward; one derivative only."""
    return _Attention.apply(q_BANE.contiguous(), k_BANE.contiguous(), v_BANE.contiguous())
