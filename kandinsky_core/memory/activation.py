"""Bytes that one forward of CrossDiT keeps alive at its peak, derived from the order of its tensors.

The moments below follow `model/crossdit.py`, `attention.py` and `layers.py` line by line, outside autograd: what is
alive at each, in bytes. Two places differ in the kernels there are and in how large a float32 piece may be: a processor
and any other device. Vectors without a token axis (time, modulation) are left out, but for weights widened to float32.

Shapes: B batch, N visual tokens, L text tokens, D width, F feed-forward width, A heads, E head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..model.attention import PACKED_KEY_BYTES
from ..model.layers import DEVICE_PIECE_BYTES, HIDDEN_PIECE_BYTES, MAX_HIDDEN_PIECES, PIECE_BYTES
from ..variants import CrossDiTSpec

FLOAT = 4  # bytes of a float32
PART_BYTES = 1 << 25


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Activations `[B,N,D]` of one kind of token, and the pieces they are treated in."""

    batch: int
    count: int
    width: int
    itemsize: int
    is_cpu: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return self.batch * self.count * self.width * self.itemsize

    @property
    def piece(self) -> int:
        """Tokens of a sample treated at once."""
        return min(self.count, max(1, (PIECE_BYTES if self.is_cpu else DEVICE_PIECE_BYTES) // (FLOAT * self.width)))

    @property
    def is_whole(self) -> bool:
        """Whether layers run as one expression over all tokens."""
        return self.count == self.piece

    @property
    def is_float(self) -> bool:
        """Whether the activations are float32 already, so that widening them is free."""
        return self.itemsize == FLOAT

    def wide(self, of_batch: bool = True) -> int:
        """Bytes of one float32 piece, of the whole batch or of one sample."""
        return FLOAT * self.width * self.piece * (self.batch if of_batch else 1)

    def in_turn(self, copies: int, *, of_batch: bool) -> int:
        """Bytes of `copies` float32 pieces, when one of the piece before lives until this one takes its place."""
        first = self.wide(of_batch)
        second = first * min(self.piece, self.count - self.piece) // self.piece
        return max(copies * first, first + copies * second)

    @property
    def norm(self) -> int:
        """What a modulated norm needs beyond its result."""
        if self.batch == 1 and (self.is_float or self.is_cpu):
            return 0
        copies = 1 if self.is_float else 2
        return copies * self.wide(of_batch=self.is_whole)

    def heads(self, *, turns: bool) -> int:
        """What splitting into normed (and rotated) heads needs beyond the projected tokens it starts from."""
        if self.is_whole:
            # The widened tokens and the normed ones; or those and the turned ones, and then the result.
            if self.is_float:
                return (1 + turns) * self.wide()
            return 2 * self.wide() + (self.nbytes if turns else 0)
        if self.is_cpu:
            return 0 if self.is_float else self.in_turn(1, of_batch=True)
        # Where PyTorch has no fused norm, that is two copies.
        return self.in_turn(2 if self.is_float else 3, of_batch=True)

    @property
    def residual(self) -> int:
        """What a gated residual needs beyond its two inputs."""
        if self.is_whole:
            return self.wide() if self.is_float else 3 * self.wide()
        return self.in_turn(1 if self.is_float else 2, of_batch=False)

    def part(self, nbytes: int) -> Tokens:
        """So many of the tokens as take at most `nbytes`."""
        return replace(self, count=min(self.count, max(1, nbytes * self.count // self.nbytes)))

    def hidden(self, ff_dim: int) -> int:
        """What a feed-forward needs beyond its input, its result included."""
        hidden = self.nbytes * ff_dim // self.width
        count = min(MAX_HIDDEN_PIECES, -(-hidden // HIDDEN_PIECE_BYTES))
        if count == 1:
            return hidden + self.nbytes
        rows = -(-self.batch * self.count // count)
        needed = self.nbytes + rows * (ff_dim + self.width) * self.itemsize
        # One token more can mean one piece more, and smaller ones; an estimate does not fall when a clip grows.
        full = HIDDEN_PIECE_BYTES * (ff_dim + (count - 1 + (count > 2)) * self.width) // ff_dim
        return max(needed, full)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """One evaluation of the network: its sizes and how it is run."""

    spec: CrossDiTSpec
    batch: int
    visual_tok: int
    text_tok: int
    itemsize: int  # bytes of an activation
    is_cpu: bool
    hidden_pieces: int = 1  # at least so many pieces of the hidden tensor
    head_groups: int = 1  # self-attention runs in so many groups of heads
    stream_itemsize: int | None = None  # bytes of the residual stream's activations; None: those of all others
    sparse: int | None = None  # what block-sparse attention needs besides q, k, v and its result; None: dense

    @property
    def visual(self) -> Tokens:
        """The visual tokens."""
        return Tokens(
            batch=self.batch, count=self.visual_tok, width=self.spec.model_dim, itemsize=self.itemsize,
            is_cpu=self.is_cpu,
        )  # fmt: skip

    @property
    def stream(self) -> int:
        """Bytes of the residual stream."""
        return self.visual.nbytes * (self.stream_itemsize or self.itemsize) // self.itemsize

    @property
    def added(self) -> int:
        """What a residual sum takes that cannot reuse its branch: a stream of another type."""
        return 0 if self.stream_itemsize in (None, self.itemsize) else self.stream

    @property
    def text(self) -> Tokens:
        """The text tokens."""
        return replace(self.visual, count=self.text_tok)

    def peak_bytes(self) -> int:
        """Most bytes alive at once beyond the inputs and the weights; never less than for fewer tokens."""
        # Cutting tokens into pieces begins at some length, and may save more than the last token before it cost.
        uncut = replace(self, visual_tok=self.visual.piece)
        return max(self._peak_bytes(), uncut._peak_bytes())

    def _peak_bytes(self) -> int:
        return max(self._text_phase(), self._embedding_phase(), self._block_phase(), self._output_phase())

    def _text_phase(self) -> int:
        text = self.text
        whole = replace(self, head_groups=1, hidden_pieces=1, stream_itemsize=None, sparse=None)
        blocks = max(whole._self_attention(text), text.nbytes + whole._feed_forward(text))
        return text.nbytes + max(text.nbytes, self._rope(text) + blocks)

    def _embedding_phase(self) -> int:
        patches = self.batch * self.visual_tok * self._patch * self.spec.visual_embed_dim * self.itemsize
        ordered = self.visual.nbytes + self._rope(self.visual) if self.sparse is not None else 0
        return self._carried + max(patches + self.visual.nbytes, self.visual.nbytes + ordered)

    def _block_phase(self) -> int:
        visual = self.visual
        # A block's caller has a name for its input. Python 3.10 keeps the first one's all along, which is not counted.
        held = self.stream
        later = self.stream + max(self._cross_attention(), self._feed_forward(visual))
        return self._carried + held + max(self._self_attention(visual), later)

    def _output_phase(self) -> int:
        cells = self.batch * self.visual_tok * self._patch * self.spec.out_visual_dim * self.itemsize
        visual = self.visual
        ordered = visual.nbytes if self.sparse is not None else 0
        return self._carried + self.stream + max(ordered, visual.nbytes + max(visual.norm, cells), 2 * cells)

    @property
    def _patch(self) -> int:
        return math.prod(self.spec.patch_size)

    @property
    def _carried(self) -> int:
        """The refined text and the rotary table, which all visual blocks read."""
        return self.text.nbytes + self._rope(self.visual)

    def _rope(self, tokens: Tokens) -> int:
        return tokens.count * self.spec.head_dim * FLOAT

    def _sums(self, tokens: Tokens) -> int:
        """Row sums that attention kernels return beside their result."""
        return tokens.batch * tokens.count * (tokens.width // self.spec.head_dim) * FLOAT

    def _attention(self, queries: Tokens, keys: Tokens) -> int:
        """What dense attention needs beyond q, k, v, its result included."""
        if not self.is_cpu or keys.nbytes <= PACKED_KEY_BYTES:
            return queries.nbytes + self._sums(queries)
        share = max(self.spec.head_dim / queries.width, PACKED_KEY_BYTES / keys.nbytes)  # of the heads, in whole ones
        return queries.nbytes + round((queries.nbytes + self._sums(queries)) * share)

    def _self_attention(self, x: Tokens) -> int:
        """Beyond `x` itself."""
        size, turned = x.nbytes, x.heads(turns=True)
        if self.head_groups > 1:
            return self._grouped_attention(x)
        if self.sparse is None:
            attended, merged = self._attention(x, x), 2 * size
        else:
            attended, merged = size + self.sparse, 3 * size
        summed = 2 * size + self.added + x.residual
        return max(size + x.norm, 3 * size + turned, 4 * size, 3 * size + attended, merged, summed)

    def _grouped_attention(self, x: Tokens) -> int:
        """Beyond `x`: the joined result, and of one group of heads at a time the rest; tokens projected in parts."""
        group = replace(x, width=-(-self.spec.heads // self.head_groups) * self.spec.head_dim)
        part = x.part(PART_BYTES)
        projecting = part.nbytes + max(part.norm, part.nbytes * group.width // x.width)
        three = 3 * group.nbytes
        if self.sparse is None:
            attended = self._attention(group, group)
        else:
            attended = group.nbytes + self.sparse
        inside = max(three + projecting, three + group.heads(turns=True), three + attended, 2 * group.nbytes)
        return x.nbytes + max(inside, part.nbytes, self.added + x.residual)

    def _cross_attention(self) -> int:
        """Beyond the block's input and what self-attention made of it."""
        x, text = self.visual, self.text
        size, pair = x.nbytes, 2 * text.nbytes
        if self.head_groups > 1:
            part = x.part(PART_BYTES)
            inside = max(part.norm, part.heads(turns=False) + part.nbytes, part.nbytes + self._attention(part, text))
            widest = max(pair + part.nbytes + inside, text.heads(turns=False) + pair, self.added + x.residual)
            return size + widest
        projected = max(2 * size + x.heads(turns=False), 2 * size + text.nbytes + text.heads(turns=False))
        attended = size + pair + self._attention(x, text)
        return max(size + x.norm, projected, 2 * size + pair, attended, 2 * size + self.added + x.residual)

    def _feed_forward(self, x: Tokens) -> int:
        """Beyond the tokens that come in."""
        size, summed = x.nbytes, self.added + x.residual
        if self.hidden_pieces > 1:
            part = replace(x, count=-(-x.count // self.hidden_pieces))
            return size + max(part.nbytes + max(part.norm, part.hidden(self.spec.ff_dim)), summed)
        return size + max(x.norm, x.hidden(self.spec.ff_dim), summed)
