"""Block-sparse attention in plain PyTorch: any device, no compiler, exact, with gradients.

Query blocks that see the same number of keys are attended to together, so nothing is padded or masked; their keys and
values are gathered a bounded number of bytes at a time.

Shapes: B batch, A heads, N visual tokens, E head width, K blocks, R = B*A*K query blocks, G query blocks of one piece,
L tokens of a query block, S tokens it sees, C its key blocks, U kinds of query blocks, X any flat size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import BlockLayout, starts
from ..tiles import BLOCK_TOK

GATHER_BYTES = 1 << 20  # keys and values gathered at once: on a CPU what stays in a core's cache
DEVICE_GATHER_BYTES = 1 << 27
KEYS = 1 << 28  # more than any query block sees
COUNTED = 1 << 20  # kept blocks whose tokens are counted at once


@dataclass(frozen=True, slots=True)
class Piece:
    """Query blocks with equally many tokens and keys: where they are in the padded blocks of all heads, `[R,64*E]`."""

    query_G: Tensor  # query blocks
    key_X: Tensor  # their key blocks, one query block after the other
    tokens: int  # tokens of a query block
    is_token_X64: Tensor | None  # which slots of the key blocks are tokens; None: all

    def queries(self, x_RX: Tensor, width: int) -> Tensor:
        """Return `[G,L,E]`: rows of padded blocks of the query blocks."""
        return x_RX.index_select(0, self.query_G).unflatten(1, (-1, width))[:, : self.tokens]

    def keys(self, x_RX: Tensor, width: int) -> Tensor:
        """Return `[G,S,E]`: rows of padded blocks of the key blocks."""
        # Whole blocks are copied several times faster than single tokens.
        x_X64E = x_RX.index_select(0, self.key_X).unflatten(1, (-1, width))
        kept = x_X64E if self.is_token_X64 is None else x_X64E[self.is_token_X64]
        return kept.reshape(len(self.query_G), -1, width)

    def put(self, x_RX: Tensor, rows_GLE: Tensor) -> None:
        """Write rows of the query blocks into padded blocks; slots without a token stay as they are."""
        if self.tokens == BLOCK_TOK:
            x_RX.index_copy_(0, self.query_G, rows_GLE.flatten(1))
        else:
            x_RX.view(len(x_RX), BLOCK_TOK, -1)[self.query_G, : self.tokens] = rows_GLE

    def add_keys(self, x_RX: Tensor, rows_GSE: Tensor) -> None:
        """Add rows of the key blocks to padded blocks."""
        rows = rows_GSE.to(x_RX.dtype)
        if self.is_token_X64 is None:
            x_RX.index_add_(0, self.key_X, rows.reshape(len(self.key_X), -1))
            return
        blocks_X64E = rows.new_zeros(*self.is_token_X64.shape, rows.shape[-1])
        blocks_X64E[self.is_token_X64] = rows.flatten(0, 1)
        x_RX.index_add_(0, self.key_X, blocks_X64E.flatten(1))


def attend(q_BANE: Tensor, k_BANE: Tensor, v_BANE: Tensor, layout: BlockLayout) -> Tensor:
    """Return attention of tile-ordered `q_BANE`, `k_BANE`, `v_BANE` over the kept blocks only."""
    width = q_BANE.shape[-1]
    q_RX, k_RX, v_RX = (_blocks(x, layout) for x in (q_BANE, k_BANE, v_BANE))
    out_RX = torch.empty_like(q_RX)
    for piece in pieces(layout, _gather_tokens(k_BANE)):
        parts = (piece.queries(q_RX, width), piece.keys(k_RX, width), piece.keys(v_RX, width))
        out_G1LE = F.scaled_dot_product_attention(*(part.unsqueeze(1) for part in parts))
        piece.put(out_RX, out_G1LE.squeeze(1))
    return _tokens(out_RX, q_BANE, layout)


def gradients(
    q_BANE: Tensor, k_BANE: Tensor, v_BANE: Tensor, out_BANE: Tensor, grad_BANE: Tensor, layout: BlockLayout
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; the selection itself has none. Weights are computed anew, piece by piece."""
    width = q_BANE.shape[-1]
    q_RX, k_RX, v_RX, out_RX, grad_RX = (_blocks(x, layout) for x in (q_BANE, k_BANE, v_BANE, out_BANE, grad_BANE))
    exact = torch.promote_types(q_RX.dtype, torch.float32)
    grad_q_RX = torch.zeros_like(q_RX)
    # Many query blocks add to one key block: in 16 bits small parts would be lost.
    grad_k_RX, grad_v_RX = torch.zeros_like(k_RX, dtype=exact), torch.zeros_like(v_RX, dtype=exact)
    scale = width**-0.5
    for piece in pieces(layout, _gather_tokens(k_BANE)):
        q_GLE, out_GLE, grad_GLE = (piece.queries(x, width) for x in (q_RX, out_RX, grad_RX))
        k_GSE, v_GSE = piece.keys(k_RX, width), piece.keys(v_RX, width)
        weight_GLS = torch.softmax(q_GLE * scale @ k_GSE.mT, -1, dtype=exact).to(q_GLE.dtype)
        own_GL1 = (grad_GLE * out_GLE).sum(-1, keepdim=True)
        score_GLS = weight_GLS * (grad_GLE @ v_GSE.mT - own_GL1) * scale
        piece.put(grad_q_RX, score_GLS @ k_GSE)
        piece.add_keys(grad_k_RX, score_GLS.mT @ q_GLE)
        piece.add_keys(grad_v_RX, weight_GLS.mT @ grad_GLE)
    return (
        _tokens(grad_q_RX, q_BANE, layout),
        _tokens(grad_k_RX, k_BANE, layout).to(k_BANE.dtype),
        _tokens(grad_v_RX, v_BANE, layout).to(v_BANE.dtype),
    )


def pieces(layout: BlockLayout, gather_tok: int) -> Iterator[Piece]:
    """Yield all query blocks, in pieces of at most `gather_tok` gathered keys (at least one query block)."""
    tiles = layout.tiles
    lengths_K = tiles.lengths_K
    counts_R = layout.counts_R
    own_R = lengths_K.repeat(layout.batch * layout.heads)
    seen_R = _seen(layout)
    # Query blocks alike in key blocks, keys and own tokens come to lie together. One number instead of three: not every
    # device can sort rows.
    kinds_U, kind_R, members_U = (
        (counts_R * KEYS + seen_R).mul(2 * BLOCK_TOK).add(own_R).unique(return_inverse=True, return_counts=True)
    )
    sorted_R = kind_R.argsort(stable=True)
    slot_64 = torch.arange(BLOCK_TOK, device=counts_R.device)
    for kind, alike_R in zip(kinds_U.tolist(), sorted_R.split(members_U.tolist()), strict=True):
        count_seen, own = divmod(kind, 2 * BLOCK_TOK)
        count, seen = divmod(count_seen, KEYS)
        place_C = torch.arange(count, device=counts_R.device)
        for query_G in alike_R.split(max(1, gather_tok // seen)):
            column_GC = layout.columns_M[layout.starts_R1[query_G].unsqueeze(1) + place_C].long()
            head_G1 = query_G.unsqueeze(1) // tiles.blocks
            is_token = None
            if seen < count * BLOCK_TOK:
                is_token = slot_64 < lengths_K[column_GC.flatten()].unsqueeze(1)
            yield Piece(query_G, (head_G1 * tiles.blocks + column_GC).flatten(), own, is_token)


def _seen(layout: BlockLayout) -> Tensor:
    """Return how many key tokens each query block sees, `[R]`."""
    if layout.tiles.is_whole:
        return layout.counts_R * BLOCK_TOK
    # Some rows after the other: in long integers a list of all kept blocks is several times as large as their keys.
    lengths_K, starts_R1 = layout.tiles.lengths_K, layout.starts_R1
    step = max(1, COUNTED // layout.tiles.blocks)
    seen = []
    for first in range(0, len(starts_R1) - 1, step):
        start_R1 = starts_R1[first : first + step + 1]
        columns_M = layout.columns_M[start_R1[0] : start_R1[-1]]
        seen.append(starts(lengths_K[columns_M.long()])[start_R1 - start_R1[0]].diff())
    return torch.cat(seen)


def _blocks(x_BANE: Tensor, layout: BlockLayout) -> Tensor:
    """Return the padded blocks of all heads as rows, `[R,64*E]`."""
    return layout.tiles.pad(x_BANE).reshape(-1, BLOCK_TOK * x_BANE.shape[-1])


def _tokens(x_RX: Tensor, like_BANE: Tensor, layout: BlockLayout) -> Tensor:
    return layout.tiles.unpad(x_RX.view(*like_BANE.shape[:2], -1, like_BANE.shape[-1]))


def _gather_tokens(k: Tensor) -> int:
    return (GATHER_BYTES if k.is_cpu else DEVICE_GATHER_BYTES) // (2 * k.shape[-1] * k.element_size())
