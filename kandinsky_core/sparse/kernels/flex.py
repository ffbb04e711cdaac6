"""Block-sparse attention by torch's FlexAttention, always compiled.

Run eagerly FlexAttention ignores a list of blocks and computes everything; a compiler that is missing or switched off
is therefore an error here, and `trial` would notice the wrong numbers.

Shapes: B batch, A heads, N visual tokens, E head width, K blocks, R query blocks of all heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..layout import BlockLayout
from ..tiles import BLOCK_TOK

# Tiles of the kernel: the default ones need more shared memory than cards of compute capability 8.6 and 8.9 have.
TILES = {"BLOCK_M": BLOCK_TOK, "BLOCK_N": BLOCK_TOK}


def attend(q_BANE: Tensor, k_BANE: Tensor, v_BANE: Tensor, layout: BlockLayout) -> Tensor:
    """Return attention of tile-ordered `q_BANE`, `k_BANE`, `v_BANE` over the kept blocks only."""
    q, k, v = (layout.tiles.pad(x) for x in (q_BANE, k_BANE, v_BANE))
    if q.is_cpu and q.dtype.itemsize == 2 and not multiplies_16_bit():
        # The kernel would convert every tile it multiplies, each time: one conversion is 1.6 times faster.
        q, k, v = q.float(), k.float(), v.float()
    options = {} if q.is_cpu else {"kernel_options": TILES}
    out = _compiled()(q, k, v, block_mask=block_mask(layout), **options)
    return layout.tiles.unpad(out.to(q_BANE.dtype))


@cache
def multiplies_16_bit() -> bool:
    """Tell whether this processor has products of 16-bit numbers (AVX-512 BF16, AMX and the like)."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def block_mask(layout: BlockLayout) -> Any:
    """Return the layout as FlexAttention's `BlockMask`."""
    from torch.nn.attention.flex_attention import BlockMask

    counts_BAK = layout.counts_R.view(layout.batch, layout.heads, -1).int()
    index_BAKK = padded_columns(layout)
    side = layout.tiles.blocks * BLOCK_TOK
    rest = {"BLOCK_SIZE": BLOCK_TOK, "seq_lengths": (side, side), "compute_q_blocks": False}
    if layout.tiles.is_whole:
        # Blocks without a mask function are "full". The same tensor may not serve as both lists: Inductor's C++
        # template then names one of them only.
        nothing = (torch.zeros_like(counts_BAK), torch.zeros_like(index_BAKK))
        return BlockMask.from_kv_blocks(*nothing, counts_BAK, index_BAKK, **rest)
    lengths_K = layout.tiles.lengths_K

    def is_token(_b: Tensor, _a: Tensor, _q: Tensor, key: Tensor) -> Tensor:
        return key % BLOCK_TOK < lengths_K[key // BLOCK_TOK]

    return BlockMask.from_kv_blocks(counts_BAK, index_BAKK, mask_mod=is_token, **rest)


def padded_columns(layout: BlockLayout) -> Tensor:
    """Return the key blocks of every query block, int32 `[B,A,K,K]`, each row filled up with zeros.

    FlexAttention takes nothing shorter: four bytes a pair of blocks, which the other kernels do not need.
    """
    blocks = layout.tiles.blocks
    used_RK = torch.arange(blocks, device=layout.columns_M.device) < layout.counts_R.unsqueeze(1)
    index_RK = torch.zeros(used_RK.shape, dtype=torch.int32, device=used_RK.device)
    index_RK.masked_scatter_(used_RK, layout.columns_M.int())
    return index_RK.view(layout.batch, layout.heads, blocks, blocks)


@cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)
