"""Muon: momentum whose update matrices are made orthogonal, with AdamW for everything that is not a matrix.

Small convolutional autoencoders reach the same loss in a fraction of AdamW's steps (docs/nano.md has the figures).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic that pushes singular values towards 1 (Jordan et al., 2024)
UPDATE_RMS = 0.2  # of an update before the learning rate: about AdamW's, so both share one rate


def orthogonalize(update_RC: Tensor, iterations: int = 5) -> Tensor:
    """Return the nearest semi-orthogonal matrix, to about 20 % per singular value, which is enough here."""
    a, b, c = NEWTON_SCHULZ
    x = update_RC.T if update_RC.shape[0] > update_RC.shape[1] else update_RC
    x = x / (x.norm() + 1e-12)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if update_RC.shape[0] > update_RC.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum for weights of two or more dimensions (flattened after the first)."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # noqa: ARG002
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                trace = self.state[weight].setdefault("trace", torch.zeros_like(weight))
                trace.mul_(group["momentum"]).add_(weight.grad)
                update_RC = weight.grad.add(trace, alpha=group["momentum"]).flatten(1)
                scale = UPDATE_RMS * max(update_RC.shape) ** 0.5
                weight.add_(orthogonalize(update_RC).view_as(weight), alpha=-group["lr"] * scale)


def optimizers(module: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices and kernels of `module`, AdamW for its gains and biases."""
    weights = [p for p in module.parameters() if p.requires_grad]
    return [
        Muon([p for p in weights if p.ndim > 1], lr=lr),
        torch.optim.AdamW([p for p in weights if p.ndim <= 1], lr=lr, weight_decay=0.0),
    ]
