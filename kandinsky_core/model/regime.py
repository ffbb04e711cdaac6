"""How the blocks treat their tokens: all at once or in pieces, and in which dtype beside the residual stream.

Shapes: B batch, N visual tokens, L text tokens, D width, A heads, E head width, P = E/2 rotary pairs, V = 3 D.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attend, Attention
from .layers import FeedForward, gated_residual, modulated_norm, scaled_linear, traced

PIECE_BYTES = 1 << 24  # of tokens that are projected at a time where a block works in pieces
# What leaves a branch in float16 is divided by this before it is rounded, and multiplied by it in float32: a branch may
# pass float16's 65504 where the stream can hold it. A power of two keeps every digit.
FLOAT16_RANGE = 64.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """A policy for every block of a transformer; `CrossDiT.set_regime` applies it.

    `dtype` is what matrices and attention compute in; None means the dtype of the tokens. With float16 the residual
    stream is float32 between the layers, since its values pass float16's range; norms and modulation are float32 in
    any case.

    `hidden_pieces` > 1 runs norm and feed-forward over at least so many pieces of the tokens. `head_groups` > 1 runs
    visual self-attention by groups of heads, with queries, keys and values of one group at a time, and cross-attention
    by pieces of the tokens. Neither applies while gradients are recorded or a compiler traces. Results equal those of
    the whole to rounding (the same sums, possibly in another order), not to the bit.
    """

    dtype: torch.dtype | None = None
    hidden_pieces: int = 1
    head_groups: int = 1

    @property
    def stream_dtype(self) -> torch.dtype | None:
        """Dtype of the residual stream, None: that of the model's input."""
        return None if self.dtype is None else torch.float32

    @property
    def range(self) -> float:
        """What branches are divided by until they are float32."""
        return FLOAT16_RANGE if self.dtype == torch.float16 else 1.0

    def attend_own(
        self, attention: Attention, x_BND: Tensor, vectors_BV: Tensor, attend: Attend, rope_NP2: Tensor
    ) -> Tensor:
        """Return `x + gate * self-attention(norm(x))`."""
        shift_BD, scale_BD, gate_BD = vectors_BV.chunk(3, dim=-1)
        if self.head_groups > 1 and not traced():
            branch_BND = self._by_heads(attention, x_BND, shift_BD, scale_BD, attend, rope_NP2)
            return self._added(x_BND, branch_BND, gate_BD)
        # The normed tokens are gone before attention runs, then q, k, v.
        q, k, v = attention.project(modulated_norm(x_BND, shift_BD, scale_BD, self.dtype), None, rope_NP2)
        out_BANE = attend(q, k, v)
        del q, k, v
        return self._added(x_BND, attention.merge(out_BANE, 1 / self.range), gate_BD)

    def attend_text(
        self, attention: Attention, x_BND: Tensor, vectors_BV: Tensor, attend: Attend, text_BLD: Tensor
    ) -> Tensor:
        """Return `x + gate * cross-attention(norm(x), text)`."""
        shift_BD, scale_BD, gate_BD = vectors_BV.chunk(3, dim=-1)
        if self.head_groups > 1 and not traced():
            branch_BND = self._like(x_BND)
            k_BANE, v_BANE = attention.project_context(text_BLD)
            for part in _parts(x_BND):
                y_BND = modulated_norm(x_BND[:, part], shift_BD, scale_BD, self.dtype)
                out_BANE = attend(attention.project_query(y_BND), k_BANE, v_BANE)
                branch_BND[:, part] = attention.merge(out_BANE, 1 / self.range)
            return self._added(x_BND, branch_BND, gate_BD)
        q, k, v = attention.project(modulated_norm(x_BND, shift_BD, scale_BD, self.dtype), text_BLD)
        out_BANE = attend(q, k, v)
        del q, k, v
        return self._added(x_BND, attention.merge(out_BANE, 1 / self.range), gate_BD)

    def feed(self, feed_forward: FeedForward, x_BND: Tensor, vectors_BV: Tensor) -> Tensor:
        """Return `x + gate * feed_forward(norm(x))`."""
        shift_BD, scale_BD, gate_BD = vectors_BV.chunk(3, dim=-1)
        if self.hidden_pieces > 1 and not traced():
            branch_BND = self._like(x_BND)
            size = -(-x_BND.shape[1] // self.hidden_pieces)
            for x_part, branch_part in zip(x_BND.split(size, 1), branch_BND.split(size, 1), strict=True):
                y_BND = modulated_norm(x_part, shift_BD, scale_BD, self.dtype)
                branch_part.copy_(feed_forward(y_BND, 1 / self.range))
        else:
            branch_BND = feed_forward(modulated_norm(x_BND, shift_BD, scale_BD, self.dtype), 1 / self.range)
        return self._added(x_BND, branch_BND, gate_BD)

    def _by_heads(
        self, attention: Attention, x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor, attend: Attend, rope_NP2: Tensor
    ) -> Tensor:
        """Return the branch; besides it only one group's q, k, v and attention are there at a time."""
        branch_BND = self._like(x_BND)
        width, layers = attention.head_dim, (attention.to_query, attention.to_key, attention.to_value)
        heads = branch_BND.shape[-1] // width
        size = -(-heads // self.head_groups) * width
        for start in range(0, heads * width, size):
            rows = slice(start, min(start + size, heads * width))
            projected = [torch.empty_like(branch_BND[..., rows]) for _ in layers]
            for part in _parts(x_BND):
                y_BND = modulated_norm(x_BND[:, part], shift_BD, scale_BD, self.dtype)
                for target, layer in zip(projected, layers, strict=True):
                    target[:, part] = _rows_of(layer, y_BND, rows)
            v_BNAE = projected.pop().unflatten(-1, (-1, width))
            k_BNAE = attention.heads(projected.pop(), attention.key_norm, rope_NP2)
            q_BNAE = attention.heads(projected.pop(), attention.query_norm, rope_NP2)
            out_BANE = attend(*(x.transpose(1, 2) for x in (q_BNAE, k_BNAE, v_BNAE)))
            del q_BNAE, k_BNAE, v_BNAE
            branch_BND[..., rows] = out_BANE.transpose(1, 2).flatten(2)
            del out_BANE
        for part in _parts(x_BND):
            branch_BND[:, part] = scaled_linear(attention.out_layer, branch_BND[:, part], 1 / self.range)
        return branch_BND

    def _like(self, x_BND: Tensor) -> Tensor:
        return torch.empty_like(x_BND, dtype=self.dtype or x_BND.dtype)

    def _added(self, x_BND: Tensor, branch_BND: Tensor, gate_BD: Tensor) -> Tensor:
        return gated_residual(x_BND, branch_BND, gate_BD if self.range == 1 else gate_BD * self.range)


WHOLE = Regime()


def _parts(x_BND: Tensor) -> Iterator[slice]:
    """Yield slices of the token axis of `PIECE_BYTES`."""
    size = max(1, PIECE_BYTES // (len(x_BND) * x_BND.shape[2] * x_BND.element_size()))
    for start in range(0, x_BND.shape[1], size):
        yield slice(start, start + size)


def _rows_of(layer: nn.Linear, x_BND: Tensor, rows: slice) -> Tensor:
    """Return some output features. Only torch's own layer can compute them alone; of others the rest is thrown away."""
    if type(layer) is nn.Linear:
        return F.linear(x_BND, layer.weight[rows], layer.bias[rows])
    return layer(x_BND)[..., rows]
