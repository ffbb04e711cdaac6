"""Layers whose weights stay packed in memory and come back, in the input's dtype, only while they are used.

Legend: R output features, D input features, N tokens. A packed weight is a plain parameter without gradient (uint8
blocks, or 8-bit floats with a float32 `weight_scale` beside them), so whoever moves weights between devices moves it
like any other; gradients reach the input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .formats import FORMATS, FP8

PIECE = 1 << 23  # elements that are float32 at a time, so that a large weight never is as a whole


@dataclass(frozen=True, slots=True)
class Packing:
    """How one weight is stored: `format` is a key of `FORMATS` or of `FP8`; `scales` is for the latter.

    `scales` None means unscaled; 1 one scale for all, else one for each row.
    """

    format: str
    shape: tuple[int, ...]
    scales: int | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the stored tensor: blocks by bytes, or that of the weight."""
        if self.format in FP8:
            return self.shape
        block = FORMATS[self.format]
        return math.prod(self.shape) // block.elements, block.nbytes

    @property
    def stored_dtype(self) -> torch.dtype:
        """Dtype of the stored tensor."""
        return FP8.get(self.format, torch.uint8)


def unpack(packed: Tensor, scale: Tensor | None, packing: Packing, dtype: torch.dtype) -> Tensor:
    """Return the weight in `dtype`: multiplied out in float32 and rounded once. `scale` is one number or `[R,1…]`."""
    if packing.format in FP8 and scale is None:
        return packed.to(dtype)
    out = torch.empty(packing.shape, dtype=dtype, device=packed.device)
    if packing.format in FP8:
        rows = max(1, PIECE * packing.shape[0] // max(1, packed.numel()))
        by = scale.expand(packing.shape)
        for source, target, factor in zip(packed.split(rows), out.split(rows), by.split(rows), strict=True):
            target.copy_(source.float().mul_(factor))
        return out
    block = FORMATS[packing.format]
    rows = PIECE // block.elements
    for source, target in zip(packed.split(rows), out.view(-1, block.elements).split(rows), strict=True):
        target.copy_(block.unpack(source))
    return out


class _Apply(torch.autograd.Function):
    """Linear map that keeps the packed weight for its gradient; autograd's own would keep the unpacked one."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, bias_R: Tensor | None, packed: Tensor, scale: Tensor | None, packing: Packing
    ) -> Tensor:
        ctx.save_for_backward(packed, scale)
        ctx.packing = packing
        return F.linear(x_ND, unpack(packed, scale, packing, x_ND.dtype), bias_R)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NR,) = gradients
        grad_ND = grad_R = None
        if ctx.needs_input_grad[0]:
            grad_ND = grad_NR @ unpack(*ctx.saved_tensors, ctx.packing, grad_NR.dtype)
        if ctx.needs_input_grad[1]:
            grad_R = grad_NR.flatten(0, -2).sum(0)
        return grad_ND, grad_R, None, None, None


def packed_linear(
    x_ND: Tensor, bias_R: Tensor | None, packed: Tensor, scale: Tensor | None, packing: Packing
) -> Tensor:
    """Apply a packed weight and a bias of the dtype of `x_ND`."""
    return _Apply.apply(x_ND, bias_R, packed, scale, packing)


class PackedWeight(nn.Module):
    """What packed layers share: the stored tensors, under the names a state dict has for them."""

    def __init__(self, packing: Packing, *, device: Any = "meta") -> None:
        super().__init__()
        self.packing = packing
        stored = torch.empty(packing.stored_shape, dtype=packing.stored_dtype, device=device)
        self.weight = nn.Parameter(stored, requires_grad=False)
        scale = None
        if packing.scales is not None:
            scale = torch.empty(() if packing.scales == 1 else (packing.scales, 1), device=device)
        self.register_buffer("weight_scale", scale)

    def extra_repr(self) -> str:
        """Show the format in a printed model."""
        return f"{list(self.packing.shape)}, {self.packing.format}"


class PackedLinear(PackedWeight):
    """`nn.Linear` with a packed weight; the bias is a plain one and follows the input's dtype."""

    def __init__(self, packing: Packing, *, bias: bool, device: Any = "meta") -> None:
        super().__init__(packing, device=device)
        self.out_features, self.in_features = packing.shape
        self.bias = nn.Parameter(torch.empty(self.out_features, device=device)) if bias else None

    def forward(self, x_ND: Tensor) -> Tensor:
        """Apply the layer in the dtype of `x_ND`."""
        bias_R = None if self.bias is None else self.bias.to(x_ND.dtype)
        return packed_linear(x_ND, bias_R, self.weight, self.weight_scale, self.packing)


class PackedEmbedding(PackedWeight):
    """`nn.Embedding` with a packed table: only the rows asked for are unpacked, to `dtype`."""

    def __init__(self, packing: Packing, *, dtype: torch.dtype, device: Any = "meta") -> None:
        super().__init__(packing, device=device)
        self.num_embeddings, self.embedding_dim = packing.shape
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows `[..., D]` of `ids`."""
        return self.rows(self.weight, self.weight_scale, ids)

    def rows(self, packed: Tensor, scale: Tensor | None, ids: Tensor) -> Tensor:
        """Look up `ids` in a table given as it is stored."""
        flat = ids.flatten()
        # Bytes: not every device indexes 8-bit floats.
        chosen = packed.view(torch.uint8).unflatten(0, (self.num_embeddings, -1))[flat].flatten(0, 1)
        by = scale if scale is None or scale.ndim == 0 else scale[flat]
        packing = Packing(self.packing.format, (len(flat), self.embedding_dim), self.packing.scales)
        rows = unpack(chosen.view(self.packing.stored_dtype), by, packing, self.dtype)
        return rows.unflatten(0, ids.shape)


def can_hold(layer: nn.Module, packing: Packing) -> bool:
    """Whether a layer has a packed counterpart for its weight: linear ones, and tables whose rows are whole blocks."""
    if isinstance(layer, nn.Embedding):
        return packing.format in FP8 or packing.shape[1] % FORMATS[packing.format].elements == 0
    return isinstance(layer, nn.Linear)


def packed_layer(layer: nn.Module, packing: Packing, dtype: torch.dtype) -> PackedWeight:
    """Return the packed counterpart of a layer, without memory for its tensors; tables give rows in `dtype`."""
    if isinstance(layer, nn.Embedding):
        return PackedEmbedding(packing, dtype=dtype)
    return PackedLinear(packing, bias=layer.bias is not None)


