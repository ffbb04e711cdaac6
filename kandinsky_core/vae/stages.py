"""The video autoencoder as a row of stages, each holding one convolution (or the attention) and its past.

A stage takes a `Flow`, the activation and for the second half of a residual block also the block's input, and returns
the next one. Stages carry no state: what they remember travels as `caches`, written in place after all that can fail.

Shape legend: B batch, C channels, T/H/W frames, rows, columns, S = H*W, N = T*S.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..shapes import VAE_SPATIAL, VAE_TEMPORAL
from .blocks import FrameCausalAttention, MidBlock, ResBlock
from .causal import Finish, StreamedConv, StreamedUp
from .hunyuan import HunyuanVideoVAE, level_factors
from .region import Region
from .statistics import Norm, Normalise, Seen, Source, in_slices

Flow = tuple[Tensor, ...]
Caches = tuple[Tensor | None, ...]  # None where nothing need be remembered
SLABS = 8  # rows of a frame go through a shortcut in so many pieces, whose output is never whole
INDEX_LIMIT = 2**31  # elements of the largest tensor: 32-bit indices of convolution kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class Now:
    """Where a stage stands: frames taken before, what it remembers of them, its piece of the frame, its norms."""

    at: int
    caches: Caches | None
    core: Region  # of the activation: the piece without its context
    rate: int
    source: Source
    last: bool  # nothing comes after: nothing need be remembered


class Layer(Protocol):
    """What a stage computes."""

    reach: int  # cells to each side that one output cell sees
    channels: int  # of its widest tensor

    def __call__(self, flow: Flow, now: Now) -> tuple[Flow, Caches]:
        """Compute one piece of time."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A layer and where it stands in the network."""

    layer: Layer
    grid: int  # cells per latent cell along a side, at its input
    rate: int  # frames per latent frame, at its input
    zoom: int = 1  # along a side
    stride: int = 1  # frames taken per frame given
    halo: int = 0  # cells of context around a piece at its input that this and all later stages need

    def frames_at_once(self, latents: int, at: int, height: int, width: int, batch: int) -> int:
        """Return how many frames it may take next: those of `latents` latent frames, fewer where indices overflow."""
        if not at and self.rate > 1:
            latents = max(latents - 1, 0) * self.rate + 1
        else:
            latents *= self.rate
        area = batch * self.layer.channels * (height * self.zoom + 2) * (width * self.zoom + 2)
        growth = 2 if self.zoom > 1 else 1  # frames an upsampler may give for one
        most = max((INDEX_LIMIT // area - 2) // growth, self.stride)
        if most >= latents:
            return latents
        return most // self.stride * self.stride + (0 if at or self.stride == 1 else 1 - self.stride)


class Inlet:
    """The first convolution, behind the latents' own 1 x 1 x 1 one where there is one."""

    reach = 1

    def __init__(self, conv: StreamedConv, channels: int, before: Callable[[Tensor], Tensor] | None) -> None:
        self.channels = channels
        self._conv = conv
        self._before = before

    def __call__(self, flow: Flow, now: Now) -> tuple[Flow, Caches]:
        """Convolve."""
        (x,) = flow
        x = x if self._before is None else self._before(x)
        out, cache = self._conv(
            lambda view: view.copy_(x), x, x.shape[1], now.caches and now.caches[0], keep=not now.last
        )
        return (out,), (cache,)


class NormConv:
    """Norm, SiLU, convolution; what the norm gives is written into the tensor the convolution reads."""

    reach = 1

    def __init__(self, norm: Norm, conv: StreamedConv, channels: int) -> None:
        self.channels = channels
        self._norm = norm
        self._conv = conv

    def convolved(self, x: Tensor, now: Now, finish: Finish | None = None) -> tuple[Tensor, Caches]:
        """Return the convolution's finished output and the caches."""
        norm = self._norm
        moments = now.source.moments(Seen(norm.name, norm.groups, x, now.core, now.rate))
        out, cache = self._conv(
            lambda view: norm.write(x, moments, view, silu=True),
            x,
            x.shape[1],
            now.caches and now.caches[0],
            finish,
            keep=not now.last,
        )
        return out, (cache,)


class ResFirst(NormConv):
    """First half of a residual block: its input travels on beside the activation."""

    def __call__(self, flow: Flow, now: Now) -> tuple[Flow, Caches]:
        """Convolve and keep the input."""
        (x,) = flow
        out, caches = self.convolved(x, now)
        return (out, x), caches


class ResSecond(NormConv):
    """Second half of a residual block: adds the block's input, through its shortcut where it has one."""

    def __init__(
        self, norm: Norm, conv: StreamedConv, channels: int, shortcut: Callable[[Tensor], Tensor] | None
    ) -> None:
        super().__init__(norm, conv, channels)
        self._shortcut = shortcut

    def __call__(self, flow: Flow, now: Now) -> tuple[Flow, Caches]:
        """Convolve and add."""
        h, skip = flow
        out, caches = self.convolved(h, now, lambda out: self._added(out, skip))
        return (out,), caches

    def _added(self, out: Tensor, skip: Tensor) -> Tensor:
        if self._shortcut is None:
            return out.add_(skip)
        step = -(-out.shape[3] // SLABS)
        for frame in range(out.shape[2]):
            for row in range(0, out.shape[3], step):
                slab = (..., slice(frame, frame + 1), slice(row, row + step), slice(None))
                out[slab] += self._shortcut(skip[slab])
        return out


class Outlet(NormConv):
    """The last norm and convolution, before the moments' own 1 x 1 x 1 one where there is one."""

    def __init__(
        self, norm: Norm, conv: StreamedConv, channels: int, after: Callable[[Tensor], Tensor] | None
    ) -> None:
        super().__init__(norm, conv, channels)
        self._after = after

    def __call__(self, flow: Flow, now: Now) -> tuple[Flow, Caches]:
        """Convolve."""
        out, caches = self.convolved(flow[0], now, self._after)
        return (out,), caches


class Attend:
    """Frame-causal attention over the clip so far.

    Kept are the normalised frames, in a tensor that holds the whole clip's; keys and values are made of them again:
    half the bytes through the levels that need most, for a few per cent of this layer's work.
    """

    reach = 0

    def __init__(self, attention: FrameCausalAttention, norm: Norm, frames: int, channels: int) -> None:
        self.channels = channels
        self._attention = attention
        self._norm = norm
        self._frames = frames

    def __call__(self, flow: Flow, now: Now) -> tuple[Flow, Caches]:
        """Attend frame by frame to the frames so far."""
        (x,) = flow
        batch, channels, frames, *sides = x.shape
        norm, layers, end = self._norm, self._attention, now.at + frames
        (kept_BTHWC,) = now.caches or (x.new_empty(batch, self._frames, *sides, channels),)
        moments = now.source.moments(Seen(norm.name, norm.groups, x, now.core, now.rate))
        norm.write(x, moments, kept_BTHWC[:, now.at : end].movedim(-1, 1), silu=False)
        frame_tok = sides[0] * sides[1]
        h_BNC = kept_BTHWC[:, :end].flatten(1, 3)
        keys, values = (to(h_BNC).unsqueeze(1) for to in (layers.to_k, layers.to_v))
        q_BNC = layers.to_q(h_BNC[:, now.at * frame_tok :])
        out_BNC = torch.empty_like(q_BNC)
        for frame in range(frames):
            here = slice(frame * frame_tok, (frame + 1) * frame_tok)
            seen = slice(0, (now.at + frame + 1) * frame_tok)
            out_BNC[:, here] = F.scaled_dot_product_attention(
                q_BNC[:, here].unsqueeze(1), keys[:, :, seen], values[:, :, seen]
            ).squeeze(1)
        out_BNC = layers.to_out[0](out_BNC)
        return (x + out_BNC.transpose(1, 2).reshape(x.shape),), (kept_BTHWC,)


class Step:
    """From one level to the next: a strided convolution, or an upsampler."""

    reach = 1

    def __init__(self, conv: StreamedConv | StreamedUp, channels: int) -> None:
        self.channels = channels
        self._conv = conv

    def __call__(self, flow: Flow, now: Now) -> tuple[Flow, Caches]:
        """Change the grid."""
        (x,) = flow
        cache = now.caches and now.caches[0]
        if isinstance(self._conv, StreamedUp):
            out, cache = self._conv(x, cache, keep=not now.last)
        else:
            out, cache = self._conv(lambda view: view.copy_(x), x, x.shape[1], cache, keep=not now.last)
        return (out,), (cache,)


@dataclass(frozen=True, slots=True)
class Builder:
    """Makes the stages of one half of the autoencoder; `like` has the device and type it computes in."""

    half: torch.nn.Module
    like: Tensor
    frames: int
    normalise: Normalise = in_slices

    def norm(self, module: torch.nn.Module) -> Norm:
        """Name a norm after its place in the half."""
        name = next(name for name, other in self.half.named_modules() if other is module)
        return Norm(name, module, self.like, self.normalise)

    def block(self, block: ResBlock) -> list[Layer]:
        """Split a residual block at its second norm."""
        inside, outside = block.norm1.num_channels, block.norm2.num_channels
        return [
            ResFirst(self.norm(block.norm1), StreamedConv(block.conv1), max(inside, outside)),
            ResSecond(
                self.norm(block.norm2), StreamedConv(block.conv2), max(inside, outside), block.conv_shortcut
            ),
        ]

    def middle(self, middle: MidBlock) -> list[Layer]:
        """Residual block, attention, residual block."""
        attention = middle.attentions[0]
        channels = attention.group_norm.num_channels
        attend = Attend(attention, self.norm(attention.group_norm), self.frames, channels)
        return [*self.block(middle.resnets[0]), attend, *self.block(middle.resnets[1])]


def decoder_stages(
    vae: HunyuanVideoVAE, like: Tensor, frames: int, normalise: Normalise = in_slices
) -> list[Stage]:
    """Return the decoder for a clip of `frames` latent frames; upsamplers' kernels are merged here, once.

    Valid until the autoencoder moves to another device.
    """
    decoder, spec = vae.decoder, vae.spec
    widths = spec.block_out_channels[::-1]
    build = Builder(decoder, like, frames, normalise)
    inlet = Inlet(StreamedConv(decoder.conv_in), widths[0], vae.post_quant_conv)
    stages = _standing([inlet, *build.middle(decoder.mid_block)], grid=1, rate=1)
    grid = rate = 1
    for level, block in enumerate(decoder.up_blocks):
        for resnet in block.resnets:
            stages += _standing(build.block(resnet), grid=grid, rate=rate)
        for up in block.upsamplers:
            time, zoom, _ = up.factors
            stages.append(Stage(layer=Step(StreamedUp(up), widths[level]), grid=grid, rate=rate, zoom=zoom))
            grid, rate = grid * zoom, rate * time
    outlet = Outlet(build.norm(decoder.conv_norm_out), StreamedConv(decoder.conv_out), widths[-1], None)
    return _with_halos([*stages, *_standing([outlet], grid=grid, rate=rate)])


def encoder_stages(vae: HunyuanVideoVAE, like: Tensor, frames: int) -> list[Stage]:
    """Return the encoder for a clip of `frames` latent frames; valid until the autoencoder moves."""
    encoder, widths = vae.encoder, vae.spec.block_out_channels
    build = Builder(encoder, like, frames)
    grid, rate = VAE_SPATIAL, VAE_TEMPORAL
    stages = _standing([Inlet(StreamedConv(encoder.conv_in), widths[0], None)], grid=grid, rate=rate)
    for level, block in enumerate(encoder.down_blocks):
        for resnet in block.resnets:
            stages += _standing(build.block(resnet), grid=grid, rate=rate)
        for down in block.downsamplers:
            time, zoom, _ = level_factors(level)
            stages.append(
                Stage(layer=Step(StreamedConv(down.conv), widths[level]), grid=grid, rate=rate, stride=time)
            )
            grid, rate = grid // zoom, rate // time
    outlet = Outlet(
        build.norm(encoder.conv_norm_out), StreamedConv(encoder.conv_out), widths[-1], vae.quant_conv
    )
    return stages + _standing([*build.middle(encoder.mid_block), outlet], grid=grid, rate=rate)


def late_index(stages: Sequence[Stage]) -> int:
    """Return the stage at which late tiles begin: the upsampler that leaves the grid of twice the latent's."""
    return next(index for index, stage in enumerate(stages) if stage.grid == 2 and stage.zoom > 1)


def _standing(layers: Sequence[Layer], *, grid: int, rate: int) -> list[Stage]:
    return [Stage(layer=layer, grid=grid, rate=rate) for layer in layers]


def _with_halos(stages: list[Stage]) -> list[Stage]:
    """Say how much context each stage must be given: its need, or what the last upsampler gives where that is more."""
    need, needs = 0, []
    for stage in reversed(stages):
        need = math.ceil((need + stage.layer.reach) / stage.zoom)
        needs.append(need)
    placed, have = [], 0
    for stage, need in zip(stages, reversed(needs), strict=True):
        have = need if stage.zoom > 1 or not placed else have
        placed.append(replace(stage, halo=have))
        have *= stage.zoom
    return placed
