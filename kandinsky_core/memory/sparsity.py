"""Bytes that block-sparse attention needs besides queries, keys, values and its result.

Shapes: B batch, A heads, E head width, K blocks, C rows of scores treated at once.
"""

from __future__ import annotations

import math

from ..sparse.kernels.blockwise import GATHER_BYTES
from ..sparse.nabla import GROUP_BYTES
from ..sparse.selection import CHUNK_BYTES, DEVICE_CHUNK_BYTES
from ..sparse.tiles import BLOCK_TOK, Tiles
from ..variants import CrossDiTSpec

FLOAT, LONG = 4, 8
SCORES = 2.5  # tensors of scores at once while blocks are chosen: scores, weights or a scratch copy, two masks


def sparse_bytes(
    spec: CrossDiTSpec, token_thw: tuple[int, int, int], *, batch: int, itemsize: int, is_cpu: bool, kept: float
) -> int:
    """Bytes at the peak of one attention that keeps a share `kept` of the block pairs.

    On a processor the keys and values of each query block are gathered, more of them on a grid whose tiles are not
    whole; other devices are taken to have a kernel that reads them in place.
    """
    tiles = Tiles(token_thw)
    blocks = tiles.blocks
    # Heads treated together. Not rounded to whole ones: an estimate must not fall when a clip grows.
    heads = min(spec.heads, max(1.0, GROUP_BYTES / (FLOAT * batch * blocks**2)))
    rows = math.ceil(batch * heads * blocks)
    group = rows * BLOCK_TOK * spec.head_dim * itemsize  # one of q, k, v, padded, of these heads
    pairs = round(rows * blocks * kept)
    layout = pairs * (2 if blocks < 2**15 else 4) + 2 * rows * LONG
    means = 2 * rows * spec.head_dim * FLOAT
    chunk = min(rows * blocks * FLOAT, max(CHUNK_BYTES if is_cpu else DEVICE_CHUNK_BYTES, blocks * FLOAT))
    choosing = means + 2 * layout + round(SCORES * chunk)
    attending = layout
    if is_cpu:
        copies = 3 * group  # rows of whole blocks; the result is a view of the fourth
        both = 2 * BLOCK_TOK * spec.head_dim * itemsize  # keys and values of a block
        gathered = min(max(GATHER_BYTES, round(blocks * kept) * both), pairs * both)
        # Where blocks are not whole, their tokens are copied once more, out of the values' slots.
        slots = 0 if tiles.is_whole else gathered // 2 * blocks * BLOCK_TOK // tiles.tokens
        # Keys and values of a piece, and of the piece before.
        attending += copies + min(2 * gathered, pairs * both) + slots + 3 * rows * LONG
    grouped = group if heads < spec.heads else 0  # a group's result before it is put in its place
    order = 3 * math.prod(token_thw) * LONG + blocks**2  # the tokens' places, and the window
    return order + grouped + max(choosing, attending)
