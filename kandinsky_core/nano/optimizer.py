"""Muon: momentum whose update matrices are made orthogonal, with AdamW for everything that is not a matrix.

Small convolutional autoencoders reach the same loss in a fraction of AdamW's steps (docs/nano.md has the figures).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic that pushes singular values towards 1 (Jordan et al., 2024)
UPDATE_RMS = 0.2  # of an update before the learning rate: about AdamW's, so both share one rate


def orthogonalize(updates_NRC: Tensor, iterations: int = 5) -> Tensor:
    """Return the nearest semi-orthogonal matrices, to about 20 % per singular value, which is enough here."""
    a, b, c = NEWTON_SCHULZ
    tall = updates_NRC.shape[-2] > updates_NRC.shape[-1]
    x = updates_NRC.mT if tall else updates_NRC
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-12)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum for weights of two or more dimensions (flattened after the first).

    `dtype` is that of the orthogonalisation; bfloat16 does no harm. Weights of one shape are treated as one batch.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # noqa: ARG002
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            gradients = [weight.grad for weight in weights]
            for weight in weights:
                if "trace" not in self.state[weight]:
                    self.state[weight]["trace"] = torch.zeros_like(weight)
            traces = [self.state[weight]["trace"] for weight in weights]
            torch._foreach_mul_(traces, group["momentum"])
            torch._foreach_add_(traces, gradients)
            updates = torch._foreach_add(gradients, traces, alpha=group["momentum"])
            alike: dict[torch.Size, list[int]] = {}
            for index, update in enumerate(updates):
                alike.setdefault(update.flatten(1).shape, []).append(index)
            for shape, indices in alike.items():
                stacked_NRC = torch.stack([updates[index].flatten(1) for index in indices]).to(self.dtype)
                steps_NRC = orthogonalize(stacked_NRC)
                scale = group["lr"] * UPDATE_RMS * max(shape) ** 0.5
                for index, step_RC in zip(indices, steps_NRC, strict=True):
                    weights[index].sub_(step_RC.view_as(weights[index]), alpha=scale)


def autoencoder_optimizers(module: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices and kernels of `module`, AdamW for its gains and biases."""
    weights = [p for p in module.parameters() if p.requires_grad]
    return [
        Muon([p for p in weights if p.ndim > 1], lr=lr),
        torch.optim.AdamW([p for p in weights if p.ndim <= 1], lr=lr, weight_decay=0.0),
    ]
