"""NF4: four bits a weight, at the quantiles of a normal distribution, in blocks of 64 that share a scale.

The values are those of QLoRA (arXiv 2305.14314, appendix E) and bitsandbytes; the layout is ours, since these blocks
are made while a file is read and never written: a float16 scale, then 32 bytes, lower halves first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import BlockFormat

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64


def unpack_nf4(blocks: Tensor) -> Tensor:
    """Return float32 `[n, 64]` of uint8 `[n, 34]`."""
    levels = torch.tensor(LEVELS, device=blocks.device)
    packed = blocks[:, 2:]
    codes = torch.cat((packed & 15, packed >> 4), dim=1)
    return levels[codes.int()] * blocks[:, :2].view(torch.float16).float()


def pack_nf4(values: Tensor) -> Tensor:
    """Return uint8 `[n, 34]` of float32 `[n, 64]`: each value goes to the nearest level."""
    levels = torch.tensor(LEVELS, device=values.device)
    borders = (levels[1:] + levels[:-1]) / 2
    scale = values.abs().amax(1, keepdim=True).half()
    scaled = values / scale.float().clamp_min(torch.finfo(torch.float16).tiny)
    codes = torch.bucketize(scaled, borders, out_int32=True).to(torch.uint8)
    return torch.cat((scale.view(torch.uint8), codes[:, : BLOCK // 2] | codes[:, BLOCK // 2 :] << 4), dim=1)


NF4 = BlockFormat(BLOCK, 2 + BLOCK // 2, unpack_nf4)
