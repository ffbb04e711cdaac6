"""NABLA (arXiv 2511.14993, section on neighbourhood adaptive block-level attention) over one sampling run.

Shapes: B batch, A heads, N visual tokens, E head width, K blocks.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..errors import KandinskyError
from ..shapes import PATCH, VAE_SPATIAL, latent_frames
from ..variants import VARIANTS, Attention, Variant
from .kernels.choice import AUTO, DENSE, NAMES, Kernels
from .record import Record
from .selection import select
from .tiles import Tiles
from .window import sliding_window

logger = logging.getLogger("kandinsky5")

ON, OFF = "on", "off"
MODES = (AUTO, ON, OFF)
MIN_TOK = 4096  # below this the selection costs about what it saves
GROUP_BYTES = 1 << 28  # float32 scores of the heads whose block lists exist at the same time

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class AttentionForward(Protocol):
    """Visual self-attention of one network evaluation."""

    tiles: Tiles

    def attend(
        self, q_BANE: Tensor, k_BANE: Tensor, v_BANE: Tensor, *, block: int, dense: Attend, is_ordered: bool = True
    ) -> Tensor:
        """Attend in visual block `block`; `is_ordered` False: tokens come, and the result goes, in raster order."""
        ...


class AttentionRun(Protocol):
    """What a host asks for the attention of a sampling run: NABLA, or a measurement of it."""

    def begin(self, sigmas: Sequence[float]) -> None:
        """Start a run over these flow times, falling from 1 to 0."""
        ...

    def forward(
        self, token_thw: tuple[int, int, int], blocks: int, sigma: float, device: torch.device
    ) -> AttentionForward | None:
        """Prepare one evaluation of a network of `blocks` visual blocks; None when all of it is to be dense."""
        ...


def options(forward: AttentionForward | None, blocks: int, dense: Attend) -> dict[str, object]:
    """Return what `CrossDiT.forward` is given for one evaluation: the token order and one attention a block."""
    if forward is None:
        return {}
    attends = [partial(forward.attend, block=block, dense=dense) for block in range(blocks)]
    return {"order_N": forward.tiles.order_N, "attend": attends}


@dataclass(frozen=True, slots=True, kw_only=True)
class NablaSettings:
    """What a user can set. `mode` auto follows the variant table and ignores `mass` and the window."""

    mode: str = AUTO
    mass: float = 0.9  # P: softmax mass that is kept
    window_thw: tuple[int, int, int] = (11, 3, 3)  # latent frames, tile rows, tile columns
    kernel: str = AUTO
    dense_first_steps: int = 0
    dense_last_steps: int = 0
    dense_first_blocks: int = 0
    dense_last_blocks: int = 0
    min_tok: int = MIN_TOK
    exact: bool = False  # the published selection to the bit, with its sorts

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise KandinskyError(f"NABLA mode '{self.mode}' is unknown. Possible: {', '.join(MODES)}.")
        if self.kernel not in NAMES:
            raise KandinskyError(f"NABLA kernel '{self.kernel}' is unknown. Possible: {', '.join(NAMES)}.")
        if not 0 <= self.mass <= 1:
            raise KandinskyError(f"NABLA keeps a share P, 0 to 1, of the attention; got {self.mass:g}. Try 0.9.")
        counts = (self.dense_first_steps, self.dense_last_steps, self.dense_first_blocks, self.dense_last_blocks)
        if min(*self.window_thw, *counts, self.min_tok) < 0:
            raise KandinskyError(f"Windows and counts of NABLA are 0 or more; got {self}.")


def policy(
    settings: NablaSettings, row: Variant | None, token_thw: tuple[int, int, int], is_assumed: bool = False
) -> Attention:
    """Return the attention that `settings` mean for a clip of this size: what was trained, what is set, or full."""
    if settings.mode == OFF or math.prod(token_thw) < settings.min_tok:
        return Attention()
    if settings.mode == ON:
        t, h, w = settings.window_thw
        return Attention(kind="nabla", P=settings.mass, wT=t, wH=h, wW=w)
    return Attention() if row is None else trained(row, token_thw, is_assumed).attention


def trained(row: Variant, token_thw: tuple[int, int, int], is_assumed: bool = False) -> Variant:
    """Return the row whose published size and length are nearest, among those that the weights may be.

    One file serves SD and HD. When the row is only assumed from the model's width, the clip's length decides between
    the 5 s and the 10 s weights, too.
    """
    t, rows, columns = token_thw
    area_px = rows * columns * (VAE_SPATIAL * PATCH[1]) ** 2

    def distance(other: Variant) -> float:
        size = min(abs(math.log(height * width / area_px)) for height, width in other.sizes)
        return size + min(abs(math.log(latent_frames(frames) / t)) for frames in other.frames)

    def fits(other: Variant) -> bool:
        return other.family == row.family if is_assumed else (other.files, other.tasks) == (row.files, row.tasks)

    return min(filter(fits, VARIANTS.values()), key=distance, default=row)


@dataclass(slots=True)
class Nabla:
    """Block-sparse visual self-attention of one model; `begin` starts a run, `forward` each network evaluation."""

    settings: NablaSettings
    row: Variant | None
    is_assumed: bool = False  # the row is a guess by the model's width
    sigmas: tuple[float, ...] = ()
    record: Record = field(default_factory=Record)
    kernels: Kernels = field(default_factory=Kernels)

    def begin(self, sigmas: Sequence[float]) -> None:
        """Start a run over these flow times, falling from 1 to 0; what was recorded before is dropped."""
        self.sigmas = tuple(sigmas)
        self.record = Record(steps=max(0, len(self.sigmas) - 1))
        self.kernels = Kernels(self.settings.kernel)

    def step_of(self, sigma: float) -> int:
        """Return the step that an evaluation at flow time `sigma` belongs to; some samplers look between two times."""
        return max(0, sum(time >= sigma - 1e-6 for time in self.sigmas[:-1]) - 1)

    def forward(
        self, token_thw: tuple[int, int, int], blocks: int, sigma: float, device: torch.device
    ) -> Forward | None:
        """Prepare one evaluation of a network of `blocks` visual blocks; None when all of it is to be dense."""
        settings = self.settings
        attention = policy(settings, self.row, token_thw, self.is_assumed)
        step = self.step_of(sigma)
        is_dense = step < settings.dense_first_steps or step >= len(self.sigmas) - 1 - settings.dense_last_steps
        self.record.see(token_thw, blocks, attention)
        if attention.kind == "full":
            return None
        if self.sigmas and is_dense:
            self.record.dense.update((step, block) for block in range(blocks))
            return None
        tiles = Tiles(token_thw, device)
        window_KK = sliding_window(tiles, (attention.wT, attention.wH, attention.wW))
        return Forward(self, tiles, window_KK, attention.P, blocks, step)


@dataclass(frozen=True)
class Forward:
    """Attention of one network evaluation."""

    nabla: Nabla
    tiles: Tiles
    window_KK: Tensor
    mass: float
    blocks: int
    step: int

    def attend(
        self, q_BANE: Tensor, k_BANE: Tensor, v_BANE: Tensor, *, block: int, dense: Attend, is_ordered: bool = True
    ) -> Tensor:
        """Attend in visual block `block`; `is_ordered` False: tokens come, and the result goes, in raster order."""
        settings = self.nabla.settings
        if block < settings.dense_first_blocks or block >= self.blocks - settings.dense_last_blocks:
            self.nabla.record.dense.add((self.step, block))
            return dense(q_BANE, k_BANE, v_BANE)
        sparse = self._attend_exactly
        if "torch._dynamo" in sys.modules:  # only a process that compiles has it, and importing it takes seconds
            sparse = torch.compiler.disable(sparse)
        out_BANE = sparse(q_BANE, k_BANE, v_BANE, block, is_ordered)
        if out_BANE is None:  # no kernel works, or dense is wanted
            self.nabla.kernels.used[DENSE] += 1
            return dense(q_BANE, k_BANE, v_BANE)
        return out_BANE

    def _attend_exactly(
        self, q_BANE: Tensor, k_BANE: Tensor, v_BANE: Tensor, block: int, is_ordered: bool
    ) -> Tensor | None:
        """Take autocast's dtype once, and none of its casts: blocks are chosen in float32."""
        device = q_BANE.device.type
        if not torch.is_autocast_enabled(device):
            return self._attend_groups(q_BANE, k_BANE, v_BANE, block, is_ordered)
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return self._attend_groups(*(x.to(dtype) for x in (q_BANE, k_BANE, v_BANE)), block, is_ordered)

    def _attend_groups(
        self, q_BANE: Tensor, k_BANE: Tensor, v_BANE: Tensor, block: int, is_ordered: bool
    ) -> Tensor | None:
        """Treat as many heads together as keep the block lists within bounds; None when no kernel is left."""
        if not self.nabla.kernels.candidates(q_BANE):
            return None
        heads = max(1, GROUP_BYTES // (4 * len(q_BANE) * self.tiles.blocks**2))
        groups = list(zip(*(x.split(heads, dim=1) for x in (q_BANE, k_BANE, v_BANE)), strict=True))
        if len(groups) == 1:
            return self._attend_heads(*groups[0], block, is_ordered)
        parts = []
        out_BANE = None if torch.is_grad_enabled() else torch.empty_like(q_BANE)
        for index, group in enumerate(groups):
            part_BANE = self._attend_heads(*group, block, is_ordered, is_first=index == 0)
            if part_BANE is None:
                return None
            if out_BANE is None:
                parts.append(part_BANE)
            else:
                out_BANE[:, index * heads : index * heads + part_BANE.shape[1]] = part_BANE
        return torch.cat(parts, dim=1) if out_BANE is None else out_BANE

    def _attend_heads(
        self, q_BANE: Tensor, k_BANE: Tensor, v_BANE: Tensor, block: int, is_ordered: bool, is_first: bool = True
    ) -> Tensor | None:
        if not is_ordered:
            q_BANE, k_BANE, v_BANE = (x.index_select(2, self.tiles.order_N) for x in (q_BANE, k_BANE, v_BANE))
        with torch.no_grad():
            layout = select(
                q_BANE, k_BANE, self.tiles, self.mass, self.window_KK, exact=self.nabla.settings.exact,
                find=self.nabla.kernels.threshold,
            )  # fmt: skip
        out_BANE = self.nabla.kernels.attend(q_BANE, k_BANE, v_BANE, layout)
        if out_BANE is None:
            return None
        self.nabla.record.add(self.step, block, layout, q_BANE.shape[-1], is_first)
        return out_BANE if is_ordered else out_BANE.index_select(2, self.tiles.inverse_N)
