"""GGUF's block formats in torch: bytes to numbers, on any device.

A format cuts a tensor's elements, last axis first, into blocks that share scales. `unpack` functions take the bytes of
n blocks, uint8 `[n, nbytes]`, and return float32 `[n, elements]`. Layouts: ggml's `block_q…` structures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SUPER = 256  # elements of a block of the K formats


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """One way to store a block: how many elements in how many bytes, and how they come back."""

    elements: int
    nbytes: int
    unpack: Callable[[Tensor], Tensor]

    def packed_bytes(self, count: int) -> int:
        """Bytes of `count` elements, a multiple of `elements`."""
        return count // self.elements * self.nbytes


def _half(blocks: Tensor, start: int) -> Tensor:
    """Float16 number at byte `start` of each block, as float32 `[n, 1]`."""
    return blocks[:, start : start + 2].view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """Lower halves of all bytes, then the upper halves."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _bits(packed: Tensor, shifts: range, mask: int) -> Tensor:
    """`[..., m]` bytes to `[..., len(shifts), m]`: the bits that `mask` keeps after each shift."""
    by = torch.tensor(list(shifts), dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-2) >> by.unsqueeze(-1)) & mask


def _fifth_bits(blocks: Tensor, start: int) -> Tensor:
    """Bit 4 of 32 elements from the 4 bytes at `start`, lowest bit first."""
    return _bits(blocks[:, start : start + 4].unsqueeze(-1), range(8), 1).flatten(1) << 4


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * ((_nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)).float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)).float() + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def _q2_k(blocks: Tensor) -> Tensor:
    """Scale and minimum of 16 elements share a byte."""
    pairs = blocks[:, :16]
    scales = _half(blocks, 80) * (pairs & 15).float()
    minima = _half(blocks, 82) * (pairs >> 4).float()
    values = _bits(blocks[:, 16:80].unflatten(1, (2, 32)), range(0, 8, 2), 3).reshape(-1, 16, 16).float()
    return (scales.unsqueeze(-1) * values - minima.unsqueeze(-1)).flatten(1)


def _q3_k(blocks: Tensor) -> Tensor:
    """Third bits stand apart and are stored inverted; scales of 16 elements have 6 bits in two places."""
    low = _nibbles(blocks[:, 96:104])
    high = _bits(blocks[:, 104:108], range(0, 8, 2), 3).flatten(1)
    scales = _half(blocks, 108) * ((low | high << 4).to(torch.int8) - 32).float()
    values = _bits(blocks[:, 32:96].unflatten(1, (2, 32)), range(0, 8, 2), 3).reshape(-1, 8, 32)
    missing = (_bits(blocks[:, :32], range(8), 1) ^ 1) << 2
    values = (values.to(torch.int8) - missing.to(torch.int8)).reshape(-1, 16, 16).float()
    return (scales.unsqueeze(-1) * values).flatten(1)


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima `[n, 8, 1]` of Q4_K and Q5_K: two halves and eight pairs of 6 bits in 12 bytes."""
    first, second, third = blocks[:, 4:16].split(4, dim=1)
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), dim=1).float()
    minima = torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=1).float()
    return (_half(blocks, 0) * scales).unsqueeze(-1), (_half(blocks, 2) * minima).unsqueeze(-1)


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minima = _k_scales(blocks)
    values = _bits(blocks[:, 16:].unflatten(1, (4, 32)), range(0, 8, 4), 15).reshape(-1, 8, 32)
    return (scales * values.float() - minima).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minima = _k_scales(blocks)
    values = _bits(blocks[:, 48:].unflatten(1, (4, 32)), range(0, 8, 4), 15).reshape(-1, 8, 32)
    values = values | _bits(blocks[:, 16:48], range(8), 1) << 4
    return (scales * values.float() - minima).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    low = _bits(blocks[:, :128].unflatten(1, (2, 64)), range(0, 8, 4), 15).reshape(-1, 8, 32)
    high = _bits(blocks[:, 128:192].unflatten(1, (2, 32)), range(0, 8, 2), 3).reshape(-1, 8, 32)
    values = ((low | high << 4).to(torch.int8) - 32).reshape(-1, 16, 16).float()
    return (scales.unsqueeze(-1) * values).flatten(1)


BLOCKS = {
    "Q4_0": BlockFormat(32, 18, _q4_0),
    "Q4_1": BlockFormat(32, 20, _q4_1),
    "Q5_0": BlockFormat(32, 22, _q5_0),
    "Q5_1": BlockFormat(32, 24, _q5_1),
    "Q8_0": BlockFormat(32, 34, _q8_0),
    "Q2_K": BlockFormat(SUPER, 84, _q2_k),
    "Q3_K": BlockFormat(SUPER, 110, _q3_k),
    "Q4_K": BlockFormat(SUPER, 144, _q4_k),
    "Q5_K": BlockFormat(SUPER, 176, _q5_k),
    "Q6_K": BlockFormat(SUPER, 210, _q6_k),
}
