"""Weights to fewer bits: GGUF's blocks of 32 and scaled 8-bit floats, as ggml and ComfyUI read them, and NF4."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .formats import FORMATS
from .nf4 import pack_nf4

PIECE = 1 << 14  # blocks whose intermediate values are in memory at a time
FP8_LIMIT = torch.finfo(torch.float8_e4m3fn).max


def _inverse(scale: Tensor) -> Tensor:
    """One over the scale; zero for a block of zeros."""
    return torch.where(scale == 0, 0.0, 1 / scale)


def _scale_bytes(scale: Tensor) -> Tensor:
    return scale.half().view(torch.uint8)


def _signed_extreme(values: Tensor) -> Tensor:
    """Value farthest from zero in each row, with its sign."""
    return values.gather(1, values.abs().argmax(1, keepdim=True))


def _pair(codes: Tensor) -> Tensor:
    """Two codes a byte: the first half of the block in the lower bits."""
    first, second = codes.chunk(2, dim=1)
    return first | second << 4


def pack_q8_0(values: Tensor) -> Tensor:
    """Return uint8 `[n, 34]` of float32 `[n, 32]`."""
    scale = values.abs().amax(1, keepdim=True) / 127
    scaled = values * _inverse(scale)
    # ggml rounds halves away from zero.
    codes = (scaled.sign() * (scaled.abs() + 0.5).floor()).to(torch.int8)
    return torch.cat((_scale_bytes(scale), codes.view(torch.uint8)), dim=1)


def pack_q4_0(values: Tensor) -> Tensor:
    """Return uint8 `[n, 18]` of float32 `[n, 32]`; the farthest value becomes -8."""
    scale = _signed_extreme(values) / -8
    codes = (values * _inverse(scale) + 8.5).trunc().clamp(0, 15).to(torch.uint8)
    return torch.cat((_scale_bytes(scale), _pair(codes)), dim=1)


def pack_q5_0(values: Tensor) -> Tensor:
    """Return uint8 `[n, 22]` of float32 `[n, 32]`; the farthest value becomes -16, fifth bits stand apart."""
    scale = _signed_extreme(values) / -16
    codes = (values * _inverse(scale) + 16.5).trunc().clamp(0, 31).to(torch.uint8)
    places = torch.arange(8, dtype=torch.uint8, device=values.device)
    fifth = ((codes >> 4).unflatten(1, (4, 8)) << places).sum(2, dtype=torch.uint8)
    return torch.cat((_scale_bytes(scale), fifth, _pair(codes & 15)), dim=1)


Packer = Callable[[Tensor], Tensor]
PACKERS: dict[str, Packer] = {"Q8_0": pack_q8_0, "Q5_0": pack_q5_0, "Q4_0": pack_q4_0}  # what files are written in


def pack_blocks(values: Tensor, name: str) -> Tensor:
    """Return uint8 `[n, nbytes]` of a float32 tensor of n whole blocks, a limited number of blocks at a time."""
    packer = pack_nf4 if name == "NF4" else PACKERS[name]
    return torch.cat([packer(part) for part in values.reshape(-1, FORMATS[name].elements).split(PIECE)])


def fp8_scale(values: Tensor) -> Tensor:
    """Return the float32 number that brings the largest of float32 `values` to the end of float8_e4m3fn."""
    least, most = torch.aminmax(values)  # without a copy as large as the weight
    return (torch.maximum(-least, most) / FP8_LIMIT).clamp_min(torch.finfo(torch.float32).tiny)


def to_fp8(values: Tensor, scale: Tensor) -> Tensor:
    """Return float32 `values` over `scale` as float8_e4m3fn."""
    return (values / scale).clamp_(-FP8_LIMIT, FP8_LIMIT).to(torch.float8_e4m3fn)
