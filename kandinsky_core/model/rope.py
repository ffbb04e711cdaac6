"""Rotary positions in float32: one table for text, one for the visual grid, and the rotation itself.

Shapes: B batch, N tokens, A heads, E head width, P = E/2 rotated pairs, last axis 2 = (cos, sin).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_PERIOD = 10000.0


def frequencies(count: int, device: torch.device | None = None) -> Tensor:
    """Return `count` float32 frequencies 10000^(-k/count), k = 0..count-1, in radians per position."""
    steps = torch.arange(count, dtype=torch.float32, device=device)
    return torch.exp(-math.log(MAX_PERIOD) * steps / count)


def rope_1d(length: int, head_dim: int, device: torch.device | None = None) -> Tensor:
    """Return the table `[length, head_dim/2, 2]` of positions 0..length-1 (text tokens)."""
    return _table(length, head_dim, 1.0, device)


def rope_3d(
    token_thw: tuple[int, int, int],
    axes_dims: tuple[int, int, int],
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
    device: torch.device | None = None,
) -> Tensor:
    """Return the table `[T*H*W, E/2, 2]` of a token grid in raster order; angles are divided by `scale` per axis.

    Pairs are ordered time, height, width. To reorder tokens, index this table like the tokens.
    """
    grid = []
    for axis, (length, dim, axis_scale) in enumerate(zip(token_thw, axes_dims, scale, strict=True)):
        shape = [1, 1, 1, dim // 2, 2]
        shape[axis] = length
        # Sines are taken per axis and then spread over the grid: T+H+W rows of them instead of T*H*W.
        grid.append(_table(length, dim, axis_scale, device).view(shape).expand(*token_thw, -1, -1))
    return torch.cat(grid, dim=-2).flatten(0, 2)


def rotate(x_BNAE: Tensor, rope_NP2: Tensor) -> Tensor:
    """Rotate the channel pairs (2i, 2i+1) of float32 `x_BNAE` by the angles of `rope_NP2`."""
    pairs_BNAP2 = x_BNAE.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # the compiler fuses real arithmetic, not complex
        cos_N1P, sin_N1P = rope_NP2.unsqueeze(1).unbind(-1)
        even_BNAP, odd_BNAP = pairs_BNAP2.unbind(-1)
        turned = (even_BNAP * cos_N1P - odd_BNAP * sin_N1P, even_BNAP * sin_N1P + odd_BNAP * cos_N1P)
        return torch.stack(turned, dim=-1).flatten(-2)
    # A complex product is one pass over memory; the two-by-two form costs ten times as much on a CPU.
    turned_BNAP = torch.view_as_complex(pairs_BNAP2) * torch.view_as_complex(rope_NP2.unsqueeze(1))
    return torch.view_as_real(turned_BNAP).flatten(-2)


def rotate_(x_BNAE: Tensor, rope_NP2: Tensor) -> Tensor:
    """Do what `rotate` does, in place."""
    pairs_BNAP = torch.view_as_complex(x_BNAE.unflatten(-1, (-1, 2)))
    pairs_BNAP.mul_(torch.view_as_complex(rope_NP2.unsqueeze(1)))
    return x_BNAE


def _table(length: int, dim: int, scale: float, device: torch.device | None) -> Tensor:
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles_NP = torch.outer(positions, frequencies(dim // 2, device)) / scale
    return torch.stack((angles_NP.cos(), angles_NP.sin()), dim=-1)
