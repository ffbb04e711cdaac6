"""NABLA's choice of blocks (Kandinsky 5.0, arXiv 2511.14993; Wan2.1-NABLA), without its sorts.

For each head, the softmax between the means of query and key blocks; of each row the smallest entries are dropped as
long as they add up to less than 1 - P, and the sliding window is added to what is left.

Shapes: B batch, A heads, N visual tokens, E head width, K blocks, R = B*A heads of the batch, C rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import BlockLayout, column_dtype, from_live, starts
from .tiles import BLOCK_TOK, Tiles

CHUNK_BYTES = 1 << 20  # float32 scores treated at once: on a CPU what stays in a core's cache
DEVICE_CHUNK_BYTES = 1 << 26
ROUNDS = 16  # of the threshold search: less than one entry in ten thousand falls on the wrong side
STEP = 0.01  # the least share of its bracket that a round of the search moves

FindThreshold = Callable[[Tensor, float], Tensor]


def select(
    q_BANE: Tensor, k_BANE: Tensor, tiles: Tiles, mass: float, window_KK: Tensor, *, exact: bool = False,
    find: FindThreshold | None = None,
) -> BlockLayout:  # fmt: skip
    """Return the blocks that queries attend to; `q_BANE`, `k_BANE` in tile order, `mass` is P in 0…1.

    `window_KK` is what `sliding_window` gives. `exact` follows the published recipe to the bit, sorts included, at
    many times the memory; without it a row's threshold is found by a search, and an entry at the edge may fall to the
    other side. `find` takes the place of `threshold`.
    """
    if exact:
        return from_live(tiles, published(q_BANE, k_BANE, tiles, mass) | window_KK)
    return select_from_means(tiles.mean(q_BANE), tiles.mean(k_BANE), tiles, mass, window_KK, find or threshold)


def select_from_means(
    q_BAKE: Tensor, k_BAKE: Tensor, tiles: Tiles, mass: float, window_KK: Tensor, find: FindThreshold
) -> BlockLayout:
    """Do what `select` does from the float32 block means, some rows at a time."""
    batch, heads, blocks, width = q_BAKE.shape
    q_RKE = q_BAKE.flatten(0, 1) * width**-0.5
    k_RKE = k_BAKE.flatten(0, 1)
    chunk = (CHUNK_BYTES if q_BAKE.is_cpu else DEVICE_CHUNK_BYTES) // (4 * blocks)
    rows = min(blocks, max(1, chunk))
    together = max(1, chunk // blocks)
    counts, columns = [], []
    index_K = torch.arange(blocks, dtype=column_dtype(blocks), device=q_BAKE.device)
    for q_part, k_part in zip(q_RKE.split(together), k_RKE.split(together), strict=True):
        for q_chunk, window_CK in zip(q_part.split(rows, dim=1), window_KK.split(rows), strict=True):
            if mass < 1:
                weight_RCK = torch.softmax(q_chunk @ k_part.mT, -1)
                keep_RCK = (weight_RCK > find(weight_RCK, 1 - mass)) | window_CK
            else:
                keep_RCK = window_CK.new_ones(len(q_chunk), *window_CK.shape)
            counts.append(keep_RCK.sum(-1).flatten())
            columns.append(index_K.expand_as(keep_RCK).masked_select(keep_RCK))
    return BlockLayout(tiles, batch, heads, starts(torch.cat(counts)), torch.cat(columns))


def threshold(weight_RCK: Tensor, dropped: float) -> Tensor:
    """Return for each row of float32 weights (sum 1) a value `[R,C,1]`: entries up to it sum to less than `dropped`.

    It is the largest such value but for the search's resolution. Of equal entries at the edge all are kept (a sort
    drops some of them, in the order it puts them), so a flat row is kept whole. The search is the Illinois variant of
    regula falsi on the logarithm: the dropped sum is close to a straight line there.
    """
    least, high = weight_RCK.aminmax(dim=-1, keepdim=True)
    # n entries of at most dropped / n add up to at most `dropped`; the hair below makes it less.
    low = least.clamp(min=dropped / weight_RCK.shape[-1]) * (1 - 1e-6)
    # How far the dropped sum is from `dropped` at either end, halved each time that end stays where it is.
    over_low, over_high = torch.full_like(low, -dropped), torch.full_like(low, 1 - dropped)
    went_up = went_down = torch.zeros_like(low, dtype=torch.bool)
    scratch = torch.empty_like(weight_RCK)
    for _ in range(ROUNDS):
        share = (over_low / (over_low - over_high)).clamp(STEP, 1 - STEP)
        middle = low * (high / low) ** share
        # A comparison would give booleans, whose arithmetic is several times slower.
        torch.div(weight_RCK, middle, out=scratch)
        kept = F.threshold_(scratch, 1, 0).sum(-1, keepdim=True) * middle
        over = (1 - dropped) - kept
        is_low = over < 0
        over_low, over_high = (
            torch.where(is_low, over, torch.where(went_down, over_low / 2, over_low)),
            torch.where(is_low, torch.where(went_up, over_high / 2, over_high), over),
        )
        low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
        went_up, went_down = is_low, ~is_low
    return low


def published(q_BANE: Tensor, k_BANE: Tensor, tiles: Tiles, mass: float) -> Tensor:
    """Return the published selection as a bool mask `[B,A,K,K]`, without the window: sorts and sums each row whole.

    Means and scores are in the dtype of q and k as released, softmax and sums in float32.
    """
    means = (
        x.unflatten(2, (-1, BLOCK_TOK)).mean(3) if tiles.is_whole else tiles.mean(x).to(x.dtype)
        for x in (q_BANE, k_BANE)
    )
    q_BAKE, k_BAKE = means
    weight_BAKK = torch.softmax((q_BAKE @ k_BAKE.mT).float() / math.sqrt(q_BAKE.shape[-1]), -1)
    sorted_BAKK, places_BAKK = weight_BAKK.sort(-1)
    keep_BAKK = sorted_BAKK.cumsum_(-1) >= 1 - mass
    return torch.zeros_like(keep_BAKK).scatter_(-1, places_BAKK, keep_BAKK)
