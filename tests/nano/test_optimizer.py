"""Muon."""

from __future__ import annotations

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.nano.optimizer import Muon, orthogonalize
from torch import nn
from torch.testing import assert_close


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_are_nearly_orthogonal(shape, dtype):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, *shape, dtype=dtype)).float())
    assert values.min() > 0.3 and values.max() < 1.3


def test_weights_of_one_shape_do_not_mix():
    torch.manual_seed(0)
    start, gradients = torch.randn(3, 8, 8), torch.randn(3, 8, 8)

    def stepped(rows):
        weights = [nn.Parameter(start[row].clone()) for row in rows]
        optimizer = Muon(weights, lr=0.1)
        for _ in range(2):
            for row, weight in zip(rows, weights, strict=True):
                weight.grad = gradients[row].clone()
            optimizer.step()
        return dict(zip(rows, weights, strict=True))

    together = stepped([0, 1, 2])
    for row in range(3):
        assert_close(stepped([row])[row], together[row], atol=1e-5, rtol=1e-5)


def test_it_lowers_a_loss_and_skips_unused_weights():
    torch.manual_seed(0)
    layer, idle = nn.Conv2d(3, 3, 3), nn.Linear(2, 2)
    before = idle.weight.clone()
    optimizer = Muon([layer.weight, idle.weight], lr=0.02)
    x = torch.randn(4, 3, 8, 8)
    values = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(x) - x[:, :, 1:-1, 1:-1]).square().mean()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.3 * values[0]
    assert torch.equal(idle.weight, before)
