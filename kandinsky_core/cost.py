"""What a variant costs by arithmetic alone: parameters and floating-point operations, from its dimensions.

A multiplication and an addition are two operations. Norms, activations, embeddings and modulation are left out: they
are under one per cent of a published model's forward.

N visual tokens, L text tokens, D width, F feed-forward width; performance reference §1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from .variants import CrossDiTSpec, TextSpec, TowerSpec, VAESpec

PIXEL_CHANNELS = 3
VISION_PATCH = 3 * 2 * 14 * 14  # values of one vision patch: channels, frames, rows, columns
VISION_MERGE = 4  # patches that become one text position


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """Operations by what carries them out: devices run matrix products, attention and convolutions at other rates."""

    product: int = 0
    attention: int = 0
    convolution: int = 0

    @property
    def total(self) -> int:
        """All operations."""
        return self.product + self.attention + self.convolution

    def __add__(self, other: Flops) -> Flops:
        return Flops(**{part.name: getattr(self, part.name) + getattr(other, part.name) for part in fields(self)})

    def __mul__(self, factor: float) -> Flops:
        return Flops(**{part.name: round(getattr(self, part.name) * factor) for part in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardFlops:
    """Operations of one forward of a transformer, batch 1."""

    self_attention: int
    cross_attention: int
    projections: int  # queries, keys, values and outputs of both attentions
    feed_forward: int
    text: int  # the text blocks

    @property
    def total(self) -> int:
        """All operations."""
        return self.self_attention + self.cross_attention + self.projections + self.feed_forward + self.text

    @property
    def flops(self) -> Flops:
        """The same by what carries them out; the text blocks count as products."""
        return Flops(
            product=self.projections + self.feed_forward + self.text,
            attention=self.self_attention + self.cross_attention,
        )


def forward_flops(spec: CrossDiTSpec, visual_tok: int, text_tok: int, *, kept: float = 1.0) -> ForwardFlops:
    """Operations of one forward; `kept` is the share of visual self-attention that is computed (1: dense)."""
    width, inner, blocks = spec.model_dim, spec.ff_dim, spec.num_visual_blocks
    return ForwardFlops(
        self_attention=round(4 * visual_tok**2 * width * blocks * kept),
        cross_attention=4 * visual_tok * text_tok * width * blocks,
        projections=(12 * visual_tok + 4 * text_tok) * width**2 * blocks,
        feed_forward=4 * visual_tok * width * inner * blocks,
        text=(8 * width**2 + 4 * width * inner + 4 * text_tok * width) * text_tok * spec.num_text_blocks,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Parameters of a transformer by where they are needed."""

    block: int  # of one visual block, its modulation left out
    modulation: int  # of one visual block's modulation
    text_block: int  # of one text block, its modulation left out
    text_modulation: int  # of one text block's modulation
    rest: int  # embeddings and output layer
    blocks: int  # visual blocks
    text_blocks: int

    @property
    def all_modulation(self) -> int:
        """Parameters of the modulation of all blocks."""
        return self.blocks * self.modulation + self.text_blocks * self.text_modulation

    @property
    def total(self) -> int:
        """All parameters."""
        return self.blocks * self.block + self.text_blocks * self.text_block + self.all_modulation + self.rest


def parameters(spec: CrossDiTSpec) -> Parameters:
    """Count the parameters of a transformer."""
    width, time = spec.model_dim, spec.time_dim
    attention = 4 * _linear(width, width) + 2 * spec.head_dim
    feed_forward = 2 * width * spec.ff_dim
    patch = math.prod(spec.patch_size)
    rest = (
        _linear(width, time) + _linear(time, time)
        + _linear(spec.in_text_dim, width) + 2 * width
        + _linear(spec.in_text_dim2, time) + 2 * time
        + _linear(patch * spec.visual_embed_dim, width)
        + _linear(time, 2 * width) + _linear(width, patch * spec.out_visual_dim)
    )  # fmt: skip
    return Parameters(
        block=2 * attention + feed_forward,
        modulation=_linear(time, 9 * width),
        text_block=attention + feed_forward,
        text_modulation=_linear(time, 6 * width),
        rest=rest,
        blocks=spec.num_visual_blocks,
        text_blocks=spec.num_text_blocks,
    )


def tower_layer_parameters(tower: TowerSpec) -> int:
    """Parameters of one layer of Qwen2.5-VL's text tower."""
    keys = tower.kv_heads * tower.head_dim
    queries = tower.heads * tower.head_dim
    products = _linear(tower.width, queries) + 2 * _linear(tower.width, keys) + queries * tower.width
    return products + 3 * tower.width * tower.ff_dim + 2 * tower.width


def clip_parameters(clip: TowerSpec) -> int:
    """Parameters of CLIP's text tower."""
    layer = 4 * _linear(clip.width, clip.width) + 4 * clip.width
    layer += _linear(clip.width, clip.ff_dim) + _linear(clip.ff_dim, clip.width)
    return (clip.vocabulary + clip.positions) * clip.width + clip.layers * layer + 2 * clip.width


def vision_parameters(text: TextSpec) -> int:
    """Parameters of Qwen2.5-VL's vision tower with the merger in front of the text tower."""
    vision, merged = text.vision, VISION_MERGE * text.vision.width
    layer = _linear(vision.width, 3 * vision.width) + _linear(vision.width, vision.width) + 2 * vision.width
    layer += 2 * _linear(vision.width, vision.ff_dim) + _linear(vision.ff_dim, vision.width)
    merger = vision.width + _linear(merged, merged) + _linear(merged, text.qwen.width)
    return VISION_PATCH * vision.width + vision.layers * layer + merger


def text_flops(text: TextSpec, tokens: int, vision_patches: int = 0) -> Flops:
    """Operations of encoding one prompt of `tokens` (template and pictures included) by both towers."""
    qwen, clip = text.qwen, text.clip
    return Flops(
        product=2 * tokens * qwen.layers * tower_layer_parameters(qwen)
        + 2 * clip.positions * clip.layers * (4 * clip.width**2 + 2 * clip.width * clip.ff_dim)
        + 2 * vision_patches * vision_parameters(text),
        attention=4 * tokens**2 * qwen.heads * qwen.head_dim * qwen.layers,
    )


def decode_flops(spec: VAESpec, latent_thw: tuple[int, int, int]) -> Flops:
    """Operations of decoding one clip in one pass without overlap."""
    return _autoencoder_flops(spec, latent_thw, resnets=spec.layers_per_block + 1, is_decoder=True)


def encode_flops(spec: VAESpec, latent_thw: tuple[int, int, int]) -> Flops:
    """Operations of encoding one clip in one pass without overlap."""
    return _autoencoder_flops(spec, latent_thw, resnets=spec.layers_per_block, is_decoder=False)


def autoencoder_parameters(spec: VAESpec, *, is_decoder: bool) -> int:
    """Parameters of one half of an autoencoder."""
    taps = 27 if spec.kind == "hunyuan" else 9
    total = 0
    for layer in _layers(spec, resnets=spec.layers_per_block + is_decoder, is_decoder=is_decoder):
        total += layer.channels_in * layer.channels_out * (taps if layer.is_wide else 1) + layer.channels_out
        total += 2 * layer.norm
    if spec.kind == "hunyuan":
        latents = spec.latent_channels * (1 if is_decoder else 2)
        total += _linear(latents, latents)
    return total


@dataclass(frozen=True, slots=True)
class _Layer:
    """A convolution (or a product with one tap) on the grid of one level, 0 the pixels."""

    channels_in: int
    channels_out: int
    level: int
    is_wide: bool = True
    norm: int = 0  # channels of the norm before it
    is_step: bool = False  # between two levels: up to this one, or down from it


def _layers(spec: VAESpec, *, resnets: int, is_decoder: bool) -> list[_Layer]:
    """The convolutions and products of one half, in any order."""
    widths = spec.block_out_channels
    last = len(widths) - 1
    deep = widths[-1]
    found = [_Layer(deep, deep, last, norm=deep) for _ in range(4)]  # the middle: two residual blocks
    found += [_Layer(deep, deep, last, is_wide=False, norm=deep if index == 0 else 0) for index in range(4)]
    levels = list(enumerate(widths))
    for place, (level, width) in enumerate(levels[::-1] if is_decoder else levels):
        before = width if place == 0 else widths[level + (1 if is_decoder else -1)]
        for index in range(resnets):
            given = before if index == 0 else width
            found += [_Layer(given, width, level, norm=given), _Layer(width, width, level, norm=width)]
            if given != width:
                found.append(_Layer(given, width, level, is_wide=False))
        if (level > 0) if is_decoder else (level < last):
            found.append(_Layer(width, width, level - 1 if is_decoder else level + 1, is_step=True))
    if is_decoder:
        found += [_Layer(spec.latent_channels, deep, last), _Layer(widths[0], PIXEL_CHANNELS, 0, norm=widths[0])]
    else:
        found += [
            _Layer(PIXEL_CHANNELS, widths[0], 0),
            _Layer(deep, 2 * spec.latent_channels, last, norm=deep),
        ]
    return found


def _autoencoder_flops(
    spec: VAESpec, latent_thw: tuple[int, int, int], *, resnets: int, is_decoder: bool
) -> Flops:
    frames, rows, columns = latent_thw
    last = len(spec.block_out_channels) - 1
    is_video = spec.kind == "hunyuan"
    taps = 27 if is_video and frames > 1 else 9  # one frame needs a third of a video convolution's taps

    def cells(level: int) -> int:
        # The first of three steps changes space only: from the latent when decoding, from the pixels when encoding.
        steps = last - level
        doublings = (max(steps - 1, 0) if is_decoder else min(steps, last - 1)) if is_video else 0
        return ((frames - 1) * 2**doublings + 1) * rows * columns * 4 ** (last - level)

    total = sum(
        2 * layer.channels_in * layer.channels_out * (taps if layer.is_wide else 1) * cells(layer.level)
        for layer in _layers(spec, resnets=resnets, is_decoder=is_decoder)
    )
    # A frame sees the frames up to its own.
    pairs = (rows * columns) ** 2 * frames * (frames + 1) // 2
    return Flops(convolution=total, attention=4 * pairs * spec.block_out_channels[-1])


def _linear(given: int, made: int) -> int:
    return given * made + made
