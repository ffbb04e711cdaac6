"""A small test that every kernel must pass on this very machine before it is trusted with a clip.

Shapes: B batch, A heads, N visual tokens, E head width, K blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import BackendUnavailable
from ..layout import BlockLayout, from_live
from ..tiles import Tiles
from .gradient import Kernel

WHOLE_THW, RAGGED_THW = (2, 16, 24), (2, 13, 19)  # grids of 12 blocks
KEPT = 0.3
# Largest error against dense masked attention, relative to its norm. A kernel that forgets the blocks is off by more
# than 0.5; these leave room for 10-bit products of float32 (TF32) and for 8-bit queries and keys.
LIMITS = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 1e-2}
ROUNDED_LIMIT = 1e-1


def check(kernel: Kernel, like_BANE: Tensor, is_whole: bool, limit: float | None = None) -> None:
    """Raise `BackendUnavailable` if `kernel` errs on tensors of this device, dtype and head width; tried once each."""
    _checked(kernel, like_BANE.device, like_BANE.dtype, like_BANE.shape[-1], is_whole, limit)


@cache  # of successes only: an error is raised again at the next try
def _checked(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, width: int, is_whole: bool, limit: float | None
) -> None:
    tiles = Tiles(WHOLE_THW if is_whole else RAGGED_THW, device)
    generator = torch.Generator().manual_seed(0)
    q_BANE, k_BANE, v_BANE = (
        torch.randn(1, 2, tiles.tokens, width, generator=generator).to(device, dtype) for _ in range(3)
    )
    live = torch.rand(1, 2, tiles.blocks, tiles.blocks, generator=generator) < KEPT
    layout = from_live(tiles, (live | torch.eye(tiles.blocks, dtype=torch.bool)).to(device))
    error = relative_error(kernel(q_BANE, k_BANE, v_BANE, layout), masked(q_BANE, k_BANE, v_BANE, layout))
    limit = LIMITS[dtype] if limit is None else limit
    if not error <= limit:  # NaN is an error, too
        raise BackendUnavailable(f"wrong results: off by {error:.2g} of the right ones, at most {limit:g} is allowed")


@cache
def check_threshold(find: Callable[[Tensor, float], Tensor], device: torch.device) -> None:
    """Raise `BackendUnavailable` if `find` keeps other entries than a sort would, on rows of random weights."""
    weight_RCK = torch.softmax(torch.randn(1, 32, 97, generator=torch.Generator().manual_seed(0)) * 2, -1)
    sorted_RCK, places_RCK = weight_RCK.sort(-1)
    right = torch.zeros_like(weight_RCK, dtype=torch.bool).scatter(-1, places_RCK, sorted_RCK.cumsum(-1) >= 0.2)
    weight_RCK = weight_RCK.to(device)
    wrong = int(((weight_RCK > find(weight_RCK, 0.2)).cpu() != right).sum())
    if wrong > 3:  # sums round differently
        raise BackendUnavailable(f"wrong results: {wrong} of {right.numel()} blocks chosen differently")


def masked(q_BANE: Tensor, k_BANE: Tensor, v_BANE: Tensor, layout: BlockLayout) -> Tensor:
    """Return dense attention in float32 or wider with the layout as a mask: what every kernel must equal."""
    wide = torch.promote_types(q_BANE.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (q_BANE, k_BANE, v_BANE))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=layout.live_tokens())


def relative_error(given: Tensor, right: Tensor) -> float:
    """Return the norm of the difference over the norm of `right`."""
    wide = torch.promote_types(right.dtype, torch.float32)  # not every device has float64
    return float((given.to(wide) - right.to(wide)).norm() / right.to(wide).norm())
