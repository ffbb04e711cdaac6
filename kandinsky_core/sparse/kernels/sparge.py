"""Block-sparse attention by SpargeAttn's quantised kernel, where that package is installed.

Queries and keys are rounded to 8 bits, so this is never chosen automatically. The kernel takes a mask of 128 query
rows by 64 keys: two query blocks share what either of them keeps, so it attends to somewhat more than was selected.

Shapes: B batch, A heads, N visual tokens, E head width, K blocks, J pairs of blocks.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...errors import BackendUnavailable
from ..layout import BlockLayout


def attend(q_BANE: Tensor, k_BANE: Tensor, v_BANE: Tensor, layout: BlockLayout) -> Tensor:
    """Return attention of tile-ordered `q_BANE`, `k_BANE`, `v_BANE` over the kept blocks, rounded to 8 bits inside."""
    try:
        from spas_sage_attn import block_sparse_sage2_attn_cuda
    except ImportError as error:
        raise BackendUnavailable(
            f"The spargeattn kernel needs the package spas_sage_attn (github: thu-ml/SpargeAttn): {error}. "
            "Install it, or set kernel to auto."
        ) from error
    if not layout.tiles.is_whole:
        raise BackendUnavailable(
            "The spargeattn kernel takes grids of whole 8 x 8 tiles only. Use a width and height that are multiples of "
            "128 pixels, or set kernel to auto."
        )
    q, k, v = (x.contiguous() for x in (q_BANE, k_BANE, v_BANE))
    return block_sparse_sage2_attn_cuda(q, k, v, mask_id=paired_mask(layout))


def paired_mask(layout: BlockLayout) -> Tensor:
    """Return the union of every two query blocks' key blocks, int8 `[B,A,J,K]`; an odd last one stands alone."""
    live_BAKK = layout.live()
    live_BAKK = F.pad(live_BAKK, (0, 0, 0, layout.tiles.blocks % 2))
    return live_BAKK.unflatten(2, (-1, 2)).any(3).char()
