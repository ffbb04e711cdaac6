"""Layers of CrossDiT around attention: embeddings, modulation, feed-forward, output; and how they use memory.

Shapes: B batch, T/H/W latent frames/rows/columns, C latent channels, N visual tokens, L text tokens, D width,
E time width.

Two regimes, one result. While gradients are recorded, or while a compiler traces, every layer is one expression
over all tokens. Otherwise the float32 work of the norms and residuals, and the wide hidden tensor of the
feed-forward, run over pieces of the tokens, so that float32 copies of whole activations never exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .rope import frequencies

NORM_EPS = 1e-5
RMS_EPS = 1.1920929e-07  # float32 machine epsilon: what the released code's eps=None means for float32 input
# A float32 piece of activations: on a CPU a step's few of them fit in a core's cache; elsewhere every
# piece is a kernel launch, so only what would weigh on the device's memory is cut.
PIECE_BYTES = 1 << 19
DEVICE_PIECE_BYTES = 1 << 26
# A hidden piece: larger blocks go back to the system when freed, and every use faults them in anew.
HIDDEN_PIECE_BYTES = 1 << 25
MAX_HIDDEN_PIECES = 4  # a host that streams weights streams them once per piece


class Ops(Protocol):
    """The layer classes a model is built from: `torch.nn`, or a host's namespace of the same signatures."""

    Linear: type[nn.Linear]
    LayerNorm: type[nn.LayerNorm]
    RMSNorm: type[nn.RMSNorm]


def piece_tokens(x_BND: Tensor) -> int:
    """Return how many tokens of `x_BND` to treat at once."""
    return max(1, (PIECE_BYTES if x_BND.is_cpu else DEVICE_PIECE_BYTES) // (4 * x_BND.shape[2]))


def traced() -> bool:
    """Tell whether autograd records or a compiler traces: then nothing is written in place or in pieces."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def whole(x_BND: Tensor) -> bool:
    """Tell whether a layer runs as one expression over all tokens: it is traced, or the input is small."""
    return traced() or x_BND.shape[1] <= piece_tokens(x_BND)


def pieces(x_BND: Tensor) -> Iterator[slice]:
    """Yield the slices of the token axis that `piece_tokens` asks for."""
    size = piece_tokens(x_BND)
    for start in range(0, x_BND.shape[1], size):
        yield slice(start, start + size)


def linear_float32(linear: nn.Linear, x: Tensor) -> Tensor:
    """Apply `linear` to float32 `x` in float32, whatever dtype its weights are stored in.

    A host's own Linear class must cast its weights to the input's dtype, so it is simply called. `torch.nn.Linear`
    does not cast, so 16-bit weights are widened here, a slice of output features at a time.
    """
    if type(linear) is not nn.Linear or linear.weight.dtype == torch.float32:
        return linear(x)
    rows = max(1, linear.out_features // 8)
    weights, biases = linear.weight.split(rows), linear.bias.split(rows)
    return torch.cat(
        [F.linear(x, w.float(), b.float()) for w, b in zip(weights, biases, strict=True)], dim=-1
    )


def rms_norm_float32(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """Apply `norm` to float32 `x` in float32; the rule for weights is that of `linear_float32`."""
    if type(norm) is not nn.RMSNorm or norm.weight.dtype == torch.float32:
        return norm(x)
    return F.rms_norm(x, norm.normalized_shape, norm.weight.float(), norm.eps)


def rms_norm_float32_(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """Do what `rms_norm_float32` does, but possibly in place."""
    if type(norm) is not nn.RMSNorm or not x.is_cpu:
        return rms_norm_float32(norm, x)
    # torch has no fused kernel for the CPU: its norm is six passes over new tensors, this is three over one.
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x.mul_(norms.square_().div_(x.shape[-1]).add_(norm.eps).rsqrt_()).mul_(norm.weight)


def modulated_norm(
    x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """LayerNorm, then `y * (1 + scale) + shift`, all in float32; one rounding to `dtype` (None: that of `x_BND`)."""
    weight_BD = scale_BD + 1.0
    width = x_BND.shape[-1:]
    dtype = dtype or x_BND.dtype
    if len(x_BND) == 1 and dtype == x_BND.dtype and (dtype == torch.float32 or x_BND.is_cpu):
        # One kernel; the CPU's takes 16-bit tokens with float32 vectors and computes in float32.
        return F.layer_norm(x_BND, width, weight_BD[0], shift_BD[0], NORM_EPS)
    if whole(x_BND):
        y_BND = F.layer_norm(x_BND.float(), width, eps=NORM_EPS)
        return torch.addcmul(shift_BD.unsqueeze(1), y_BND, weight_BD.unsqueeze(1)).to(dtype)
    out_BND = torch.empty_like(x_BND, dtype=dtype)
    for x_ND, out_ND, shift_D, weight_D in zip(x_BND, out_BND, shift_BD, weight_BD, strict=True):
        for part in pieces(x_BND):
            out_ND[part] = F.layer_norm(x_ND[part].float(), width, weight_D, shift_D, NORM_EPS)
    return out_BND


def gated_residual(x_BND: Tensor, branch_BND: Tensor, gate_BD: Tensor) -> Tensor:
    """Return `x + gate * branch`, in float32, rounded once to the dtype of `x_BND`.

    Outside autograd the result reuses `branch_BND`, if that has the same dtype.
    """
    if whole(x_BND):
        return torch.addcmul(x_BND.float(), branch_BND.float(), gate_BD.unsqueeze(1)).to(x_BND.dtype)
    out_BND = branch_BND if branch_BND.dtype == x_BND.dtype else torch.empty_like(x_BND)
    for x_ND, branch_ND, out_ND, gate_D in zip(x_BND, branch_BND, out_BND, gate_BD, strict=True):
        for part in pieces(x_BND):
            sum_ND = x_ND[part].to(torch.float32, copy=True)
            out_ND[part] = sum_ND.addcmul_(branch_ND[part].float(), gate_D)
    return out_BND


def scaled_linear(linear: nn.Linear, x: Tensor, scale: float) -> Tensor:
    """Return `linear(x) * scale`, scaled before the result is rounded, which may not fit the dtype otherwise."""
    if scale == 1:
        return linear(x)
    bias = {} if linear.bias is None else {"bias": linear.bias * scale}
    return torch.func.functional_call(linear, bias, (x * scale,))


class TimeEmbeddings(nn.Module):
    """Sinusoid and two-layer perceptron of the flow time; float32 throughout."""

    def __init__(self, model_dim: int, time_dim: int, ops: Ops, **factory: Any) -> None:
        super().__init__()
        self.half = model_dim // 2
        self.in_layer = ops.Linear(model_dim, time_dim, **factory)
        self.out_layer = ops.Linear(time_dim, time_dim, **factory)

    def forward(self, time_B: Tensor) -> Tensor:
        """Return `[B,E]` float32 for `time_B` in 0..1000; cosines come before sines."""
        angles = torch.outer(time_B.float(), frequencies(self.half, time_B.device))
        wave_BD = torch.cat((angles.cos(), angles.sin()), dim=-1)
        return linear_float32(self.out_layer, F.silu(linear_float32(self.in_layer, wave_BD)))


class TextEmbeddings(nn.Module):
    """Linear and affine LayerNorm: text features `[B,L,in]` to `[B,L,D]`, or the pooled vector to `[B,E]`."""

    def __init__(self, in_dim: int, out_dim: int, ops: Ops, **factory: Any) -> None:
        super().__init__()
        self.in_layer = ops.Linear(in_dim, out_dim, **factory)
        self.norm = ops.LayerNorm(out_dim, eps=NORM_EPS, **factory)

    def forward(self, text: Tensor) -> Tensor:
        """Embed in the dtype of `text`; LayerNorm kernels accumulate in float32 by themselves."""
        return self.norm(self.in_layer(text))


class VisualEmbeddings(nn.Module):
    """Cut the latent into patches and project each to one token."""

    def __init__(
        self, channels: int, model_dim: int, patch: tuple[int, int, int], ops: Ops, **factory: Any
    ) -> None:
        super().__init__()
        self.patch = patch
        self.in_layer = ops.Linear(math.prod(patch) * channels, model_dim, **factory)

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        """Return tokens `[B,t,h,w,D]`; inside a patch the order is frame, row, column, channel."""
        t, h, w = self.patch
        x = x_BTHWC.unflatten(3, (-1, w)).unflatten(2, (-1, h)).unflatten(1, (-1, t))
        return self.in_layer(x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4))


class Modulation(nn.Module):
    """Shift, scale and gate vectors from the time embedding; float32, zero at initialisation."""

    def __init__(self, time_dim: int, model_dim: int, count: int, ops: Ops, **factory: Any) -> None:
        super().__init__()
        self.out_layer = ops.Linear(time_dim, count * model_dim, **factory)
        for parameter in self.out_layer.parameters():
            nn.init.zeros_(parameter)

    def forward(self, time_BE: Tensor) -> Tensor:
        """Return `[B, count*D]` float32; per sub-block the order is shift, scale, gate."""
        return linear_float32(self.out_layer, F.silu(time_BE))


Modulate = Callable[[Modulation, Tensor], Tensor]
"""(a modulation of the model, time_BE) -> its vectors `[B, count*D]`: how and when they are computed."""


def computed(modulation: Modulation, time_BE: Tensor) -> Tensor:
    """Compute the vectors where they are used."""
    return modulation(time_BE)


class FeedForward(nn.Module):
    """Linear, exact GELU, Linear; no biases."""

    def __init__(self, model_dim: int, ff_dim: int, ops: Ops, **factory: Any) -> None:
        super().__init__()
        self.ff_dim = ff_dim
        self.in_layer = ops.Linear(model_dim, ff_dim, bias=False, **factory)
        self.out_layer = ops.Linear(ff_dim, model_dim, bias=False, **factory)

    def forward(self, x_BND: Tensor, scale: float = 1.0) -> Tensor:
        """Map tokens one by one; outside autograd in up to four pieces, so the hidden tensor is never whole.

        The result is multiplied by `scale` before it is rounded.
        """
        if traced():
            return scaled_linear(self.out_layer, F.gelu(self.in_layer(x_BND)), scale)
        # Pieces are cut from a flat matrix: slices of a batched tensor take a several times slower CPU matmul.
        x_ND = x_BND.flatten(0, 1)
        hidden_bytes = len(x_ND) * self.ff_dim * x_ND.element_size()
        count = min(MAX_HIDDEN_PIECES, -(-hidden_bytes // HIDDEN_PIECE_BYTES))
        if count <= 1:
            return self._piece(x_ND, scale).view_as(x_BND)
        out_ND = torch.empty_like(x_ND)
        for x_part, out_part in zip(x_ND.chunk(count), out_ND.chunk(count), strict=True):
            out_part.copy_(self._piece(x_part, scale))
        return out_ND.view_as(x_BND)

    def _piece(self, x_ND: Tensor, scale: float) -> Tensor:
        return scaled_linear(self.out_layer, torch.ops.aten.gelu_(self.in_layer(x_ND)), scale)


class OutLayer(nn.Module):
    """Modulated norm, projection, and the patches put back in place."""

    def __init__(
        self,
        model_dim: int,
        time_dim: int,
        channels: int,
        patch: tuple[int, int, int],
        ops: Ops,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.modulation = Modulation(time_dim, model_dim, 2, ops, **factory)
        self.out_layer = ops.Linear(model_dim, math.prod(patch) * channels, **factory)

    def forward(
        self,
        x_BND: Tensor,
        time_BE: Tensor,
        token_thw: tuple[int, int, int],
        modulate: Modulate = computed,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return the velocity `[B,T,H,W,channels]`; a token holds channel, frame, row, column in this order.

        The projection computes in `dtype` (None: that of the tokens).
        """
        shift_BD, scale_BD = modulate(self.modulation, time_BE).chunk(2, dim=-1)
        x = self.out_layer(modulated_norm(x_BND, shift_BD, scale_BD, dtype))
        x = x.unflatten(-1, (-1, *self.patch)).unflatten(1, token_thw)
        return x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(5, 6).flatten(3, 4).flatten(1, 2)
