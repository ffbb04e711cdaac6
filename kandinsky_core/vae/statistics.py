"""GroupNorm's statistics as values: measured, merged by counts, given to the layers.

They are all that ties the pieces of a clip together: with given statistics a GroupNorm is one affine map per channel,
and the rest of the network is local in space and causal in time.

Shape legend: B batch, C channels, G groups, T/H/W frames, rows, columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ShapeError
from .region import Region

SLICES = 8  # a norm is computed in so many groups of channels: its temporaries are an eighth of its input
RUNNING_LATENTS = 17  # shorter running windows flicker


@dataclass(frozen=True, slots=True)
class GroupMoments:
    """How many values a group had, their mean and the sum of their squared deviations, `[B,G]` in float32 or more."""

    count: int
    mean_BG: Tensor
    spread_BG: Tensor

    def merged(self, other: GroupMoments) -> GroupMoments:
        """Pool with other values of the same groups."""
        count = self.count + other.count
        step_BG = other.mean_BG - self.mean_BG
        return GroupMoments(
            count,
            self.mean_BG + step_BG * (other.count / count),
            self.spread_BG + other.spread_BG + step_BG.square() * (self.count * other.count / count),
        )

    def weighing(self, count: int) -> GroupMoments:
        """Let them stand for so many values."""
        return GroupMoments(count, self.mean_BG, self.spread_BG * (count / self.count))

    def to(self, device: torch.device) -> GroupMoments:
        """Move to a device."""
        return GroupMoments(self.count, self.mean_BG.to(device), self.spread_BG.to(device))


@dataclass(frozen=True, slots=True)
class Statistics:
    """The moments every norm of an encoder or a decoder uses, by the norm's name there."""

    moments: Mapping[str, GroupMoments]

    def to(self, device: torch.device) -> Statistics:
        """Move to a device."""
        return Statistics({name: moments.to(device) for name, moments in self.moments.items()})


def measure(x: Tensor, groups: int) -> GroupMoments:
    """Take the moments of each group of channels of `[B,C,T,H,W]` over time and space."""
    wide = torch.promote_types(x.dtype, torch.float32)
    parts = [
        torch.var_mean(part.to(wide).reshape(x.shape[0], -1, part[0].numel() // count), dim=2, correction=0)
        for part, count in _group_slices(x, groups)
    ]
    count = x[0].numel() // groups
    spread_BG = torch.cat([variance for variance, _ in parts], 1) * count
    return GroupMoments(count, torch.cat([mean for _, mean in parts], 1), spread_BG)


def _group_slices(x: Tensor, groups: int) -> list[tuple[Tensor, int]]:
    step = -(-groups // SLICES)
    width = x.shape[1] // groups
    return [
        (x[:, first * width : (first + step) * width], min(step, groups - first))
        for first in range(0, groups, step)
    ]


@dataclass(frozen=True, slots=True)
class Seen:
    """What a norm is about to normalise: `x` with context, of which `core` belongs to the piece itself."""

    name: str
    groups: int
    x: Tensor
    core: Region
    rate: int  # frames per latent frame

    @property
    def whole(self) -> bool:
        """Whether it is whole frames: a tile has context around."""
        return self.core.size == tuple(self.x.shape[-2:])


class Source(Protocol):
    """Where a norm's moments come from. What it learns counts from `commit` on; a failed step is forgotten."""

    def begin(self) -> None:
        """Forget what was seen since the last commit."""
        ...

    def commit(self) -> None:
        """Keep what was seen since `begin`."""
        ...

    def moments(self, seen: Seen) -> GroupMoments:
        """Return the moments to normalise with."""
        ...

    def to(self, device: torch.device) -> None:
        """Move to the device on which the network goes on."""
        ...


class Given:
    """Fixed statistics."""

    def __init__(self, statistics: Statistics) -> None:
        self.statistics = statistics

    def begin(self) -> None:
        """Nothing is learned."""

    def commit(self) -> None:
        """Nothing is learned."""

    def moments(self, seen: Seen) -> GroupMoments:
        """Look the norm up."""
        if seen.name not in self.statistics.moments:
            raise ShapeError(
                f"The given statistics know no norm {seen.name!r}; take them from the same network."
            )
        return self.statistics.moments[seen.name]

    def to(self, device: torch.device) -> None:
        """Move to a device."""
        self.statistics = self.statistics.to(device)


class Recorded:
    """Pools all that is seen, and normalises whole frames with their own moments, tiles with the pool so far.

    In one pass over a whole clip both are exactly what GroupNorm itself computes.
    """

    def __init__(self) -> None:
        self._kept: dict[str, GroupMoments] = {}
        self._draft: dict[str, GroupMoments] = {}

    @property
    def statistics(self) -> Statistics:
        """All that was seen."""
        return Statistics(dict(self._kept))

    def begin(self) -> None:
        """Forget what was seen since the last commit."""
        self._draft = {}

    def commit(self) -> None:
        """Keep what was seen since `begin`."""
        self._kept |= self._draft

    def moments(self, seen: Seen) -> GroupMoments:
        """Add to the pool."""
        new = measure(seen.core.crop(seen.x), seen.groups)
        old = self._kept.get(seen.name)
        self._draft[seen.name] = new if old is None else old.merged(new)
        return new if seen.whole else self._draft[seen.name]

    def to(self, device: torch.device) -> None:
        """Move to a device."""
        self._kept = {name: moments.to(device) for name, moments in self._kept.items()}


class Sampled:
    """Pools windows of a clip, and normalises them with what the pool will be, as far as that is known.

    A look at the first latent frame of each window stands for what has not been run yet. So windows and tiles are
    normalised nearly alike from the start on, as the decode itself will be.

    Normalised with their own moments alone, whole frames would lose what sets them apart from others; with the pool
    alone, an error in it would grow from layer to layer. So they count once more, at half the pool's weight. A tile's
    own moments tell little of the frame: tiles take the pool.
    """

    def __init__(self, latents: Sequence[int]) -> None:
        self._latents = latents  # of each window
        self._looks: list[dict[str, GroupMoments]] = [{} for _ in latents]
        self._kept: list[dict[str, GroupMoments]] = [{} for _ in latents]
        self._draft: dict[str, GroupMoments] = {}
        self._window = 0
        self._present = self._looks

    @property
    def statistics(self) -> Statistics:
        """All that was seen of the windows, without the looks."""
        return Statistics(
            {name: _pooled([kept[name] for kept in self._kept if name in kept]) for name in self._kept[0]}
        )

    def enter(self, window: int, *, is_look: bool) -> None:
        """Say what is run next; all looks come before the windows."""
        self._window = window
        self._present = self._looks if is_look else self._kept

    def begin(self) -> None:
        """Forget what was seen since the last commit."""
        self._draft = {}

    def commit(self) -> None:
        """Keep what was seen since `begin`."""
        self._present[self._window] |= self._draft

    def moments(self, seen: Seen) -> GroupMoments:
        """Add to the pool."""
        new = measure(seen.core.crop(seen.x), seen.groups)
        old = self._present[self._window].get(seen.name)
        self._draft[seen.name] = new if old is None else old.merged(new)
        windows = range(len(self._latents))
        if self._present is self._looks:
            looks = (self._found(seen.name, window) for window in windows)
            return _pooled(look for look in looks if look is not None)
        pool = _pooled(part for window in windows for part in self._parts(seen, window))
        return pool.merged(new.weighing(pool.count // 2)) if seen.whole else pool

    def _found(self, name: str, window: int) -> GroupMoments | None:
        return self._draft[name] if window == self._window else self._present[window].get(name)

    def _parts(self, seen: Seen, window: int) -> Iterator[GroupMoments]:
        """Yield what was seen of a window, and its look for the rest."""
        found, look = self._found(seen.name, window), self._looks[window][seen.name]
        if found is not None:
            yield found
        # The look is one frame on every level; latent frames after a window's first have `rate`.
        left = look.count * (1 + (self._latents[window] - 1) * seen.rate) - (0 if found is None else found.count)
        if left > 0:
            yield look.weighing(left)

    def to(self, device: torch.device) -> None:
        """Move to the device."""
        for store in (*self._looks, *self._kept):
            store |= {name: moments.to(device) for name, moments in store.items()}


class Running:
    """Normalises with the last 17 latent frames or more, the present ones included: causal, one pass."""

    def __init__(self) -> None:
        self._kept: dict[str, list[tuple[int, GroupMoments]]] = {}  # (frames, their moments)
        self._draft: dict[str, list[tuple[int, GroupMoments]]] = {}

    @property
    def statistics(self) -> Statistics:
        """The present windows."""
        return Statistics({name: _windowed(window) for name, window in self._kept.items()})

    def begin(self) -> None:
        """Forget what was seen since the last commit."""
        self._draft = {}

    def commit(self) -> None:
        """Keep what was seen since `begin`."""
        self._kept |= self._draft

    def moments(self, seen: Seen) -> GroupMoments:
        """Move the window on."""
        window = [*self._kept.get(seen.name, ()), (seen.x.shape[2], measure(seen.x, seen.groups))]
        while sum(frames for frames, _ in window[1:]) >= RUNNING_LATENTS * seen.rate:
            del window[0]
        self._draft[seen.name] = window
        return _windowed(window)

    def to(self, device: torch.device) -> None:
        """Move to a device."""
        for window in self._kept.values():
            window[:] = [(frames, moments.to(device)) for frames, moments in window]


def _windowed(window: list[tuple[int, GroupMoments]]) -> GroupMoments:
    return _pooled(moments for _, moments in window)


def _pooled(parts: Iterable[GroupMoments]) -> GroupMoments:
    return reduce(GroupMoments.merged, parts)


@dataclass(frozen=True, slots=True)
class Affine:
    """What a norm with given moments does to each channel: `[B,C]` and `[C]` in float32 or more."""

    mean_BC: Tensor
    variance_BC: Tensor
    weight_C: Tensor
    bias_C: Tensor
    eps: float


class Normalise(Protocol):
    """Ways to compute a norm: write what `affine`, then SiLU if wished, makes of `x` to `out`, which may be a view."""

    def __call__(self, x_BCTHW: Tensor, affine: Affine, out_BCTHW: Tensor, *, silu: bool) -> None:
        """Fill `out`; no float32 copy of `x` is made."""
        ...


def in_slices(x_BCTHW: Tensor, affine: Affine, out_BCTHW: Tensor, *, silu: bool) -> None:
    """Compute a norm by torch's own kernels, some channels after the other."""
    channels = x_BCTHW.shape[1]
    step = -(-channels // SLICES)
    for sample in range(x_BCTHW.shape[0]):
        for first in range(0, channels, step):
            part = slice(first, first + step)
            # Evaluation-mode batch norm is this affine map in one kernel: 16-bit data, float32 parameters.
            y = F.batch_norm(
                x_BCTHW[sample : sample + 1, part],
                affine.mean_BC[sample, part],
                affine.variance_BC[sample, part],
                affine.weight_C[part],
                affine.bias_C[part],
                eps=affine.eps,
            )
            target = out_BCTHW[sample : sample + 1, part]
            if silu:
                torch.ops.aten.silu.out(y, out=target)
            else:
                target.copy_(y)


class Norm:
    """A GroupNorm layer with moments from outside.

    Only the layer's weights are read, so a host's layer may keep them elsewhere and in another type.
    """

    def __init__(self, name: str, layer: nn.Module, like: Tensor, normalise: Normalise = in_slices) -> None:
        self.name = name
        self.groups: int = layer.num_groups
        self._eps: float = layer.eps
        self._normalise = normalise
        wide = torch.promote_types(like.dtype, torch.float32)
        self._weight, self._bias = (
            value.detach().to(like.device, wide) for value in (layer.weight, layer.bias)
        )

    def write(self, x: Tensor, moments: GroupMoments, out: Tensor, *, silu: bool) -> None:
        """Write the normalised `x` to `out`, which may be a view; no float32 copy of `x` is made."""
        if moments.mean_BG.shape[1] != self.groups or moments.mean_BG.shape[0] not in (1, x.shape[0]):
            raise ShapeError(
                f"Statistics of {self.name} are {list(moments.mean_BG.shape)}; a batch of {x.shape[0]} in "
                f"{self.groups} groups needs [{x.shape[0]}, {self.groups}] or [1, {self.groups}]."
            )
        width = x.shape[1] // self.groups
        spread = (
            value.to(self._weight).repeat_interleave(width, 1).expand(x.shape[0], -1)
            for value in (moments.mean_BG, moments.spread_BG / moments.count)
        )
        self._normalise(x, Affine(*spread, self._weight, self._bias, self._eps), out, silu=silu)
