"""The model family as data: the only home of architecture and preset numbers. Adding a variant is adding a row.

Sources: the published YAML configurations and paper (arXiv 2511.14993) tables 3 and 5.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .errors import VariantError

# (height, width) in pixels, as published.
SIZES_512 = ((512, 512), (512, 768), (768, 512))
SIZES_1024 = (
    (1024, 1024), (640, 1408), (1408, 640), (768, 1280), (1280, 768), (896, 1152), (1152, 896),
)  # fmt: skip

VIDEO_NEGATIVE = (
    "Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, low quality, ugly, "
    "deformed, walking backwards"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossDiTSpec:
    """Dimensions of one CrossDiT; field names are those of the published configuration files."""

    model_dim: int
    ff_dim: int
    time_dim: int
    num_text_blocks: int
    num_visual_blocks: int
    axes_dims: tuple[int, int, int]  # time, height, width; the sum is the head width
    in_text_dim: int = 3584
    in_text_dim2: int = 768
    in_visual_dim: int = 16
    out_visual_dim: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    visual_cond: bool = False  # 33 channels: [latent | zeros | mask]
    instruct_type: str | None = None  # "channel": 33 channels: [latent | edit latent | mask]

    def __post_init__(self) -> None:
        if self.model_dim % self.head_dim:
            raise VariantError(
                f"model_dim {self.model_dim} is not a multiple of the head width {self.head_dim} "
                f"(the sum of axes_dims {self.axes_dims})."
            )
        if any(axis % 2 for axis in self.axes_dims):
            raise VariantError(f"axes_dims {self.axes_dims} must be even: rotary pairs need two channels each.")
        if self.instruct_type not in (None, "channel"):
            raise VariantError(f"instruct_type {self.instruct_type!r} is unknown; use None or 'channel'.")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return sum(self.axes_dims)

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.model_dim // self.head_dim

    @property
    def visual_embed_dim(self) -> int:
        """Channels per latent cell entering the transformer: 16, or 33 with condition and mask channels."""
        extra = self.visual_cond or self.instruct_type == "channel"
        return 2 * self.in_visual_dim + 1 if extra else self.in_visual_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class VAESpec:
    """An autoencoder: architecture numbers and the scale between its latents and the transformer's."""

    kind: str  # "hunyuan" (3-D causal, 4x8x8) or "flux" (2-D, 8x8)
    scaling_factor: float
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    latent_channels: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Visual self-attention policy the weights were trained with."""

    kind: str = "full"  # "full" or "nabla"
    P: float = 0.0  # kept probability mass (NABLA, alg. 1)
    wT: int = 0  # sliding-tile window in latent frames and 8x8-token tiles
    wH: int = 0
    wW: int = 0


FULL = Attention()


def nabla(P: float) -> Attention:
    """Published NABLA settings: mass P joined with an 11/3/3 sliding-tile window."""
    return Attention(kind="nabla", P=P, wT=11, wH=3, wW=3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One published checkpoint together with the settings it is meant to run with."""

    name: str
    title: str
    family: str  # rows of one family share architecture: lite_video, pro_video, lite_t2i, lite_i2i, nano_video
    tasks: tuple[str, ...]  # of: t2v, i2v, t2i, i2i
    files: tuple[str, ...]  # published file names; used as a hint only
    spec: CrossDiTSpec
    vae: VAESpec
    steps: int
    guidance: float
    shift: float
    qwen_tokens: int  # user tokens kept after the template is cropped
    rope_scale: tuple[float, float, float]
    sizes: tuple[tuple[int, int], ...]  # (height, width) in pixels
    frames: tuple[int, ...]
    fps: int = 24
    attention: Attention = FULL
    negative: str = ""
    first_frame_norm: bool = False  # image-to-video: normalise the first latent frames (released sampler)
    clip_tokens: int = 77
    repo: str = ""  # where the file is published
    tags: tuple[str, ...] = field(default=())  # sft, pretrain, nocfg, distilled, sd, hd, 5s, 10s
