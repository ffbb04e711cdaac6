"""Attention as a value, and the projections around it.

Shapes: B batch, N tokens, L text tokens, D width, A heads, E head width, P = E/2 rotary pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import RMS_EPS, Ops, pieces, rms_norm_float32, rms_norm_float32_, scaled_linear, traced, whole
from .rope import rotate, rotate_

PACKED_KEY_BYTES = 1 << 22  # keys a CPU attention call may repack at once

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention over `(q_BANE, k_BANE, v_BANE)`, scaled by 1/sqrt(E), giving `out_BANE`."""


def dense(q_BANE: Tensor, k_BANE: Tensor, v_BANE: Tensor, mask_BL: Tensor | None = None) -> Tensor:
    """Attend from every query to every key, or to the keys where `mask_BL` is True."""
    mask_B11L = None if mask_BL is None else mask_BL[:, None, None, :]
    if traced() or not k_BANE.is_cpu or k_BANE.nbytes <= PACKED_KEY_BYTES:  # while traced a size may be a symbol
        return F.scaled_dot_product_attention(q_BANE, k_BANE, v_BANE, attn_mask=mask_B11L)
    # The CPU kernel repacks all keys and values it is given: by a few heads at a time the copies stay small.
    heads = max(1, q_BANE.shape[1] * PACKED_KEY_BYTES // k_BANE.nbytes)
    out_BANE = torch.empty_like(q_BANE)
    for part in zip(*(x.split(heads, dim=1) for x in (out_BANE, q_BANE, k_BANE, v_BANE)), strict=True):
        part[0].copy_(F.scaled_dot_product_attention(*part[1:], attn_mask=mask_B11L))
    return out_BANE


class Attention(nn.Module):
    """Projections, per-head RMSNorm and rotation before attention, and the projection after it.

    `project` and `merge` are separate so that a block can drop the projections' input before attention runs.
    """

    def __init__(self, model_dim: int, head_dim: int, ops: Ops, **factory: Any) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_query = ops.Linear(model_dim, model_dim, **factory)
        self.to_key = ops.Linear(model_dim, model_dim, **factory)
        self.to_value = ops.Linear(model_dim, model_dim, **factory)
        self.query_norm = ops.RMSNorm(head_dim, eps=RMS_EPS, **factory)
        self.key_norm = ops.RMSNorm(head_dim, eps=RMS_EPS, **factory)
        self.out_layer = ops.Linear(model_dim, model_dim, **factory)

    def project(
        self, x_BND: Tensor, context_BLD: Tensor | None = None, rope_NP2: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return `(q_BANE, k_BANE, v_BANE)`; keys and values come from `context_BLD`, else from `x_BND`."""
        source = x_BND if context_BLD is None else context_BLD
        return self.project_query(x_BND, rope_NP2), *self.project_context(source, rope_NP2)

    def project_query(self, x_BND: Tensor, rope_NP2: Tensor | None = None) -> Tensor:
        """Return `q_BANE`."""
        return self.heads(self.to_query(x_BND), self.query_norm, rope_NP2).transpose(1, 2)

    def project_context(self, context_BLD: Tensor, rope_LP2: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `(k_BALE, v_BALE)`."""
        k_BLAE = self.heads(self.to_key(context_BLD), self.key_norm, rope_LP2)
        v_BLAE = self.to_value(context_BLD).unflatten(-1, (-1, self.head_dim))
        return k_BLAE.transpose(1, 2), v_BLAE.transpose(1, 2)

    def merge(self, out_BANE: Tensor, scale: float = 1.0) -> Tensor:
        """Join the heads of attention's output and project it to `[B,N,D]`, times `scale`."""
        return scaled_linear(self.out_layer, out_BANE.transpose(1, 2).flatten(2), scale)

    def heads(self, x_BND: Tensor, norm: nn.RMSNorm, rope_NP2: Tensor | None) -> Tensor:
        """Split into heads, normalise and rotate in float32, round once; outside autograd in place."""
        x_BNAE = x_BND.unflatten(-1, (-1, self.head_dim))
        if whole(x_BND):
            y_BNAE = rms_norm_float32(norm, x_BNAE.float())
            return (y_BNAE if rope_NP2 is None else rotate(y_BNAE, rope_NP2)).to(x_BND.dtype)
        for part in pieces(x_BND):
            y_BNAE = rms_norm_float32_(norm, x_BNAE[:, part].float())
            x_BNAE[:, part] = y_BNAE if rope_NP2 is None else rotate_(y_BNAE, rope_NP2[part])
        return x_BNAE


def masked(mask_BL: Tensor | None) -> Attend:
    """Return dense attention that sees only the text tokens where `mask_BL` is True (None: all)."""
    return lambda q, k, v: dense(q, k, v, mask_BL)
