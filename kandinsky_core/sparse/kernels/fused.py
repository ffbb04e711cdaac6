"""Block-sparse attention and NABLA's threshold as Triton kernels: nothing is gathered, padded or written between.

Importing this module does not import Triton. Forward only.

Shapes: B batch, A heads, N visual tokens, E head width, K blocks, R = B*A*K query blocks, P = B*A*ceil(K/2) pairs of
query blocks, U key blocks in the lists of all pairs; C rows, G pairs and M kept blocks of those treated at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from subprocess import CalledProcessError
from types import ModuleType

import torch
from torch import Tensor

from ...errors import BackendUnavailable
from ..layout import BlockLayout, starts

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 128
MAX_BLOCKS = 8192  # what a program's registers hold of one row
PAIRED_BLOCKS = 1 << 22  # places of the block mask looked at together: 8 bytes each, 30 where all are kept


def attend(q_BANE: Tensor, k_BANE: Tensor, v_BANE: Tensor, layout: BlockLayout) -> Tensor:
    """Return attention of tile-ordered `q_BANE`, `k_BANE`, `v_BANE` over the kept blocks only, strided like `q_BANE`.

    Any strides do; of blocks at the edge of a ragged grid only their tokens are read.
    """
    width, blocks = q_BANE.shape[-1], layout.tiles.blocks
    if q_BANE.dtype not in DTYPES or width > MAX_WIDTH:
        raise BackendUnavailable(
            f"The triton kernel takes head widths up to {MAX_WIDTH} in float32, bfloat16 or float16, not {width} in "
            f"{q_BANE.dtype}. Set kernel to auto."
        )
    out_BANE = torch.empty_like(q_BANE)
    tensors = (q_BANE, k_BANE, v_BANE, out_BANE)
    with _programs(q_BANE) as programs:
        programs.attend_pair[(-(-blocks // 2), layout.batch * layout.heads)](
            *tensors,
            *(stride for x in tensors for stride in x.stride()),
            *paired(layout),
            starts(layout.tiles.lengths_K).int(),
            layout.heads,
            blocks,
            width**-0.5 * math.log2(math.e),
            WIDTH=width,
            CHANNELS=max(16, _power_of_two(width)),
            IS_WHOLE=layout.tiles.is_whole,
            # At 128 channels of 16 bits: 64 KB of shared memory, which every card has, and no spilled registers.
            num_warps=8,
            num_stages=2,
        )
    return out_BANE


def paired(layout: BlockLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Return the key blocks that query blocks 2i and 2i + 1 of a head see between them, as lists.

    Pair p sees `columns[starts[p]:starts[p + 1]]`, ascending; `halves` (uint8) has bit 0 set where the even query block
    keeps the column, bit 1 where the odd one does. With odd K the last pair of a head has no odd one.
    """
    blocks, device = layout.tiles.blocks, layout.columns_M.device
    index_K = torch.arange(blocks, dtype=layout.columns_M.dtype, device=device)
    counts, columns, halves = [], [], []
    for (pair, row, entry), (next_pair, next_row, next_entry) in pairwise(_bounds(layout)):
        row_C = torch.arange(row, next_row, device=device)
        slot_C = row_C + row_C // blocks * (blocks % 2) - 2 * pair  # as if every head had an even number of rows
        slot_M = slot_C.repeat_interleave(layout.counts_R[row:next_row], output_size=next_entry - entry)
        keeps_G2K = torch.zeros(next_pair - pair, 2, blocks, dtype=torch.uint8, device=device)
        keeps_G2K.flatten(0, 1)[slot_M, layout.columns_M[entry:next_entry].long()] = 1
        halves_GK = keeps_G2K[:, 0] + 2 * keeps_G2K[:, 1]
        is_seen_GK = halves_GK > 0
        counts.append(is_seen_GK.sum(-1))
        columns.append(index_K.expand_as(is_seen_GK).masked_select(is_seen_GK))
        halves.append(halves_GK.masked_select(is_seen_GK))
    return starts(torch.cat(counts)), torch.cat(columns), torch.cat(halves)


def threshold(weight_RCK: Tensor, dropped: float) -> Tensor:
    """Return for each row of float32 weights (sum 1) a value `[R,C,1]`: entries up to it sum to less than `dropped`.

    It is the largest such value but for the sum's rounding, and below the row's largest entry.
    """
    blocks = weight_RCK.shape[-1]
    if blocks > MAX_BLOCKS:
        raise BackendUnavailable(
            f"The triton threshold takes up to {MAX_BLOCKS} blocks, not {blocks}. Make the clip shorter or smaller, or "
            "use selection.threshold."
        )
    threshold_RC1 = weight_RCK.new_empty(*weight_RCK.shape[:-1], 1)
    slots = _power_of_two(blocks)
    with _programs(weight_RCK) as programs:
        programs.threshold_row[(threshold_RC1.numel(),)](
            weight_RCK.contiguous(), threshold_RC1, dropped, blocks, SLOTS=slots, num_warps=min(8, max(1, slots // 256))
        )
    return threshold_RC1


def _bounds(layout: BlockLayout) -> list[list[int]]:
    """Return where each piece of `paired` starts, and the last ends: pair, its first row, that one's first entry."""
    blocks = layout.tiles.blocks
    pairs = -(-blocks // 2)
    total = layout.batch * layout.heads * pairs
    edges = [*range(0, total, max(1, PAIRED_BLOCKS // (2 * blocks))), total]
    pair_P = torch.tensor(edges, device=layout.starts_R1.device)
    row_P = pair_P // pairs * blocks + pair_P % pairs * 2
    return torch.stack((pair_P, row_P, layout.starts_R1[row_P]), dim=1).tolist()


@contextmanager
def _programs(x: Tensor) -> Iterator[ModuleType]:
    """Give the module of programs, for launches on the device of `x`; what Triton raises comes out as ours."""
    try:
        from . import fused_triton
    except ImportError as error:
        raise BackendUnavailable(
            f"The triton kernel needs the package triton: {error}. pip install triton (on Windows triton-windows), or "
            "set kernel to auto."
        ) from error
    if x.is_cpu and not fused_triton.IS_INTERPRETED:
        raise BackendUnavailable(
            f"The triton kernel needs tensors on a GPU, not on {x.device}. Set kernel to auto; to check the kernel "
            "without a GPU, set the environment variable TRITON_INTERPRET=1 before Python starts."
        )
    # Triton launches on the current device, whatever device its arguments are on.
    with nullcontext() if x.is_cpu else torch.get_device_module(x.device).device(x.device):
        try:
            yield fused_triton
        except (fused_triton.TritonError, CalledProcessError) as error:  # the latter: no C compiler that works
            # The text of a compile error begins with a place in our file; the attribute says what is wrong there.
            reason, _, _ = (getattr(error, "error_message", None) or str(error)).strip().partition("\n")
            raise BackendUnavailable(
                f"Triton cannot build or start its kernel here: {type(error).__name__}: {reason}. Set kernel to auto."
            ) from error


def _power_of_two(count: int) -> int:
    """Return the smallest power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()
