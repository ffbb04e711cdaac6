"""The attention the recipe trains with is attention, forwards and backwards."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from comfyui_kandinsky5.kandinsky_core.nano.attention import training_attention
from torch.testing import assert_close


def test_values_and_gradients_are_those_of_torch():
    torch.manual_seed(0)
    given = [torch.randn(2, 3, 7, 8, dtype=torch.float64) for _ in range(3)]
    weight = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    found = []
    for attend in (training_attention, F.scaled_dot_product_attention):
        leaves = [x.clone().requires_grad_() for x in given]
        out = attend(*leaves)
        (out * weight).sum().backward()
        found.append((out, *(leaf.grad for leaf in leaves)))
    for mine, theirs in zip(*found, strict=True):
        assert_close(mine, theirs)


def test_under_autocast_bfloat16_stays_close_to_float32():
    """As the recipe runs it: projections under autocast are bfloat16, and so is the gradient that comes back."""
    torch.manual_seed(0)
    given = [torch.randn(2, 3, 40, 8).bfloat16() for _ in range(3)]
    weight = torch.randn(2, 3, 40, 8).bfloat16()
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [x.to(dtype).requires_grad_() for x in given]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            out = training_attention(*leaves)
        assert out.dtype == dtype
        (out * weight).sum().backward()
        found.append((out, *(leaf.grad for leaf in leaves)))
    for wide, narrow in zip(*found, strict=True):
        assert (narrow.float() - wide).square().mean() < 1e-4 * wide.square().mean()


def test_it_passes_torchs_gradient_check():
    leaves = [torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(training_attention, leaves)
