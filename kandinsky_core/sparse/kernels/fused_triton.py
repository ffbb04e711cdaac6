"""The Triton programs of `fused`, which alone imports this module, and only when a kernel is asked for.

Shapes, in programs: S slots of a program's query rows, L slots of a key block, E head width filled up to a power of
two, K blocks filled up likewise.
"""

# No `from __future__ import annotations`: older Tritons do not know a `tl.constexpr` that is a string.

import triton
import triton.language as tl
from triton.errors import TritonError

__all__ = ["IS_INTERPRETED", "TritonError", "attend_pair", "threshold_row"]

# The score before any key was seen. It is finite so that its difference to itself is 0, not NaN.
LOWEST = tl.constexpr(-1e38)
KEYS = tl.constexpr(64)


@triton.jit
def _load_block(x, offset_LE, is_key_LE, is_masked: tl.constexpr):
    if is_masked:
        return tl.load(x + offset_LE, mask=is_key_LE, other=0.0)
    else:
        return tl.load(x + offset_LE)


@triton.jit
def _dot(a, b, add):
    if IS_INTERPRETED:  # the interpreter multiplies the bit patterns of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, add, input_precision="ieee")


# Triton decides it by TRITON_INTERPRET when a function is decorated, its own ones included.
IS_INTERPRETED = tl.constexpr(not isinstance(_dot, triton.JITFunction))


@triton.jit
def attend_pair(
    q, k, v, out,
    q_batch, q_head, q_token, q_channel,
    k_batch, k_head, k_token, k_channel,
    v_batch, v_head, v_token, v_channel,
    out_batch, out_head, out_token, out_channel,
    starts, columns, halves, firsts,
    heads, blocks, scale,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """Attend two consecutive query blocks of one head to the union of their key blocks, by online softmax.

    Program (i, h) has query blocks 2i and 2i + 1 of head h of all batches. Tokens of both follow each other in tile
    order, so 128 rows from the first one's first token hold them also where blocks have fewer than 64. `scale` is the
    softmax's, times log2(e).
    """
    pair, head = tl.program_id(0), tl.program_id(1)
    batch, own = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    q += batch * q_batch + own * q_head
    k += batch * k_batch + own * k_head
    v += batch * v_batch + own * v_head
    out += batch * out_batch + own * out_head

    channel_E = tl.arange(0, CHANNELS)
    is_channel_E = channel_E < WIDTH
    token_S = tl.load(firsts + 2 * pair) + tl.arange(0, 2 * KEYS)
    is_token_S = token_S < tl.load(firsts + tl.minimum(2 * pair + 2, blocks))
    # Rows without a token count to the first block: every row then sees a key, and none divides by zero.
    is_second_S = (token_S >= tl.load(firsts + 2 * pair + 1)) & is_token_S
    is_row_SE = is_token_S[:, None] & is_channel_E[None, :]
    wide_S = token_S.to(tl.int64)  # a token's offset may pass 2^31, one inside a block does not
    q_SE = tl.load(q + wide_S[:, None] * q_token + channel_E[None, :] * q_channel, mask=is_row_SE, other=0.0)

    slot_L = tl.arange(0, KEYS)
    k_offset_LE = slot_L[:, None] * k_token + channel_E[None, :] * k_channel
    v_offset_LE = slot_L[:, None] * v_token + channel_E[None, :] * v_channel
    place = head * tl.num_programs(0) + pair
    start = tl.load(starts + place)
    top_S = tl.full([2 * KEYS], LOWEST, tl.float32)
    total_S = tl.zeros([2 * KEYS], tl.float32)
    sum_SE = tl.zeros([2 * KEYS, CHANNELS], tl.float32)
    for at in range((tl.load(starts + place + 1) - start).to(tl.int32)):
        column = tl.load(columns + start + at).to(tl.int32)
        seen_by = tl.load(halves + start + at).to(tl.int32)
        if IS_WHOLE:
            first, length = column * KEYS, KEYS
        else:
            first = tl.load(firsts + column)
            length = tl.load(firsts + column + 1) - first
        is_key_L = slot_L < length
        is_masked: tl.constexpr = not IS_WHOLE or WIDTH != CHANNELS
        is_key_LE = is_key_L[:, None] & is_channel_E[None, :]
        k_LE = _load_block(k + first.to(tl.int64) * k_token, k_offset_LE, is_key_LE, is_masked)
        score_SL = _dot(q_SE, tl.trans(k_LE), tl.zeros([2 * KEYS, KEYS], tl.float32))
        if not IS_WHOLE:
            score_SL = tl.where(is_key_L[None, :], score_SL, -float("inf"))
        sees_S = (seen_by >> is_second_S.to(tl.int32)) & 1 != 0
        new_S = tl.where(sees_S, tl.maximum(top_S, tl.max(score_SL, 1) * scale), top_S)
        # A row that does not keep this block: subtracting infinity makes all its weights 0, at no cost per score.
        weight_SL = tl.exp2(score_SL * scale - tl.where(sees_S, new_S, float("inf"))[:, None])
        shrink_S = tl.exp2(top_S - new_S)
        total_S = total_S * shrink_S + tl.sum(weight_SL, 1)
        v_LE = _load_block(v + first.to(tl.int64) * v_token, v_offset_LE, is_key_LE, is_masked)
        sum_SE = _dot(weight_SL.to(v_LE.dtype), v_LE, sum_SE * shrink_S[:, None])
        top_S = new_S

    out_SE = (sum_SE / total_S[:, None]).to(out.dtype.element_ty)
    tl.store(out + wide_S[:, None] * out_token + channel_E[None, :] * out_channel, out_SE, mask=is_row_SE)


@triton.jit
def threshold_row(weight, out, dropped, blocks, SLOTS: tl.constexpr):
    """Find a row's threshold by bisection of the float32 bit patterns, whose order is that of positive numbers."""
    row = tl.program_id(0).to(tl.int64)
    slot_K = tl.arange(0, SLOTS)
    # Slots past the row's end are 0, so they add nothing to any sum.
    weight_K = tl.load(weight + row * blocks + slot_K, mask=slot_K < blocks, other=0.0)
    bits_K = weight_K.to(tl.int32, bitcast=True)
    low, high = tl.min(bits_K, 0) * 0, tl.max(bits_K, 0)
    for _ in range(31):
        middle = low + (high - low) // 2
        is_low = tl.sum(tl.where(bits_K <= middle, weight_K, 0.0), 0) < dropped
        low, high = tl.where(is_low, middle, low), tl.where(is_low, high, middle)
    tl.store(out + row, low.to(tl.float32, bitcast=True))
