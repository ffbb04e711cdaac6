"""Gradients for every kernel: forward by the kernel, backward block by block in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ..layout import BlockLayout
from .blockwise import gradients

Kernel = Callable[[Tensor, Tensor, Tensor, BlockLayout], Tensor]
"""Attention of `(q_BANE, k_BANE, v_BANE)` in tile order over the kept blocks of a layout, giving `out_BANE`."""


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, q_BANE: Tensor, k_BANE: Tensor, v_BANE: Tensor, layout: BlockLayout, kernel: Kernel
    ) -> Tensor:
        out_BANE = kernel(q_BANE, k_BANE, v_BANE, layout)
        ctx.save_for_backward(q_BANE, k_BANE, v_BANE, out_BANE)
        ctx.layout = layout
        return out_BANE

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_BANE: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        return *gradients(*ctx.saved_tensors, grad_BANE, ctx.layout), None, None


def with_gradient(kernel: Kernel, q_BANE: Tensor, k_BANE: Tensor, v_BANE: Tensor, layout: BlockLayout) -> Tensor:
    """Run `kernel`; q, k and v get gradients of the first order. The selection of blocks has none."""
    return _WithGradient.apply(q_BANE, k_BANE, v_BANE, layout, kernel)
