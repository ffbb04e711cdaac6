"""The model family as data: the only home of architecture and preset numbers. Adding a variant is adding a row.

Sources: the published YAML configurations and paper (arXiv 2511.14993) tables 3 and 5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from .errors import VariantError
from .shapes import VAE_SPATIAL

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
        numbers = (self.model_dim, self.ff_dim, self.time_dim, self.in_text_dim, self.in_text_dim2)
        if min(*numbers, self.in_visual_dim, self.out_visual_dim, *self.axes_dims, *self.patch_size) < 1:
            raise VariantError(f"Every dimension of a CrossDiT must be at least 1; got {self}.")
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
class TowerSpec:
    """Dimensions of one transformer tower of the text encoders; `heads` share `kv_heads` keys and values."""

    width: int
    ff_dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int = 0
    positions: int = 0  # learned position vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSpec:
    """The text encoders that go with a transformer: Qwen2.5-VL's text and vision towers and CLIP's text tower."""

    qwen: TowerSpec
    vision: TowerSpec
    clip: TowerSpec


QWEN_VL_7B = TextSpec(
    qwen=TowerSpec(
        width=3584, ff_dim=18944, layers=28, heads=28, kv_heads=4, head_dim=128, vocabulary=152064
    ),
    vision=TowerSpec(width=1280, ff_dim=3420, layers=32, heads=16, kv_heads=16, head_dim=80),
    clip=TowerSpec(
        width=768, ff_dim=3072, layers=12, heads=12, kv_heads=12, head_dim=64, vocabulary=49408, positions=77
    ),
)


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
    family: str  # rows of one family share architecture: lite_video, pro_video, lite_t2i, lite_i2i, nano_…
    tasks: tuple[str, ...]  # of: t2v, i2v, t2i, i2i
    files: tuple[str, ...]  # published file names; used as a hint only
    spec: CrossDiTSpec
    vae: VAESpec
    text: TextSpec = QWEN_VL_7B
    steps: int
    guidance: float
    shift: float
    qwen_tokens: int  # user tokens kept after the template is cropped
    rope_scale: tuple[float, float, float]  # divisors of the positions along time, height, width
    sizes: tuple[tuple[int, int], ...]  # (height, width) in pixels
    frames: tuple[int, ...]
    fps: int = 24
    attention: Attention = FULL
    negative: str = ""
    first_frame_norm: bool = False  # image-to-video: normalise the first latent frames (released sampler)
    rope_side_px: int | None = None  # rope_scale holds at this side and grows with the picture; None: at every size
    clip_tokens: int = 77
    repo: str = ""  # where the file is published
    tags: tuple[str, ...] = field(default=())  # sft, pretrain, nocfg, distilled, sd, hd, 5s, 10s

    @property
    def needs_image(self) -> bool:
        """Whether every run begins with a picture."""
        return not {"t2v", "t2i"}.intersection(self.tasks)

    def rope_at(self, rows: int, columns: int) -> tuple[float, float, float]:
        """Divisors of the positions along time, height, width for a latent of `rows` x `columns` cells."""
        if self.rope_side_px is None:
            return self.rope_scale
        factor = math.sqrt(rows * columns) * VAE_SPATIAL / self.rope_side_px
        t, h, w = self.rope_scale
        return (t, h * factor, w * factor)


HUNYUAN_VAE = VAESpec(kind="hunyuan", scaling_factor=0.476986)
FLUX_VAE = VAESpec(kind="flux", scaling_factor=0.3611)  # the published shift 0.1159 is not used by Kandinsky

VIDEO_LITE = CrossDiTSpec(
    model_dim=1792, ff_dim=7168, time_dim=512, num_text_blocks=2, num_visual_blocks=32,
    axes_dims=(16, 24, 24), visual_cond=True,
)  # fmt: skip
IMAGE_T2I = CrossDiTSpec(
    model_dim=2560, ff_dim=10240, time_dim=512, num_text_blocks=2, num_visual_blocks=50, axes_dims=(32, 48, 48)
)
IMAGE_EDIT = replace(IMAGE_T2I, instruct_type="channel")
VIDEO_PRO = CrossDiTSpec(
    model_dim=4096, ff_dim=16384, time_dim=1024, num_text_blocks=4, num_visual_blocks=60,
    axes_dims=(32, 48, 48), visual_cond=True,
)  # fmt: skip

SD_ROPE = (1.0, 2.0, 2.0)
HD_ROPE = (1.0, 3.16, 3.16)  # 3.16 literally, not sqrt(10)
IMAGE_ROPE = (1.0, 1.0, 1.0)

# Schedule shifts follow the published usage notes: Lite 5 for five seconds, 10 for ten seconds and image-to-video;
# Pro 5, and 10 for image-to-video in SD; images 3. The configuration files carry a value that no released code reads.
_LITE_5S = Variant(
    name="lite_t2v_5s_sft",
    title="Video Lite 2B, text to video, 5 s",
    family="lite_video",
    tasks=("t2v", "t2i"),
    files=("kandinsky5lite_t2v_sft_5s.safetensors",),
    repo="kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s",
    tags=("sft", "5s", "sd"),
    spec=VIDEO_LITE,
    vae=HUNYUAN_VAE,
    steps=50,
    guidance=5.0,
    shift=5.0,
    qwen_tokens=256,
    rope_scale=SD_ROPE,
    sizes=((512, 768), (512, 512), (768, 512)),
    frames=(121,),
    negative=VIDEO_NEGATIVE,
)
_LITE_10S = replace(
    _LITE_5S,
    name="lite_t2v_10s_sft",
    title="Video Lite 2B, text to video, 10 s",
    files=("kandinsky5lite_t2v_sft_10s.safetensors",),
    repo="kandinskylab/Kandinsky-5.0-T2V-Lite-sft-10s",
    tags=("sft", "10s", "sd"),
    shift=10.0,
    frames=(241,),
    attention=nabla(0.9),
)
_PRO_5S_SD = replace(
    _LITE_5S,
    name="pro_t2v_5s_sd",
    title="Video Pro 19B, text to video, 5 s, SD",
    family="pro_video",
    files=("kandinsky5pro_t2v_sft_5s.safetensors",),
    repo="kandinskylab/Kandinsky-5.0-T2V-Pro-sft-5s",
    spec=VIDEO_PRO,
)
_HD = dict(rope_scale=HD_ROPE, sizes=((768, 1280), *(s for s in SIZES_1024 if s != (768, 1280))))
_T2I = Variant(
    name="lite_t2i",
    title="Image Lite 6B, text to image",
    family="lite_t2i",
    tasks=("t2i",),
    files=("kandinsky5lite_t2i.safetensors",),
    repo="kandinskylab/Kandinsky-5.0-T2I-Lite",
    tags=("sft", "hd"),
    spec=IMAGE_T2I,
    vae=FLUX_VAE,
    steps=50,
    guidance=3.5,
    shift=3.0,
    qwen_tokens=512,
    rope_scale=IMAGE_ROPE,
    sizes=SIZES_1024,
    frames=(1,),
)


def _row(base: Variant, name: str, title: str, files: str, repo: str, tags: str, **changes: object) -> Variant:
    return replace(
        base, name=name, title=title, files=(files,), repo=f"kandinskylab/{repo}", tags=tuple(tags.split()), **changes
    )


# The nano family is built in: same classes, trained from nothing by kandinsky_core.nano.
NANO_VIDEO = CrossDiTSpec(
    model_dim=128, ff_dim=512, time_dim=128, num_text_blocks=1, num_visual_blocks=4, axes_dims=(16, 24, 24),
    in_text_dim=96, in_text_dim2=64, visual_cond=True,
)  # fmt: skip
NANO_IMAGE = replace(NANO_VIDEO, visual_cond=False)
NANO_EDIT = replace(NANO_IMAGE, instruct_type="channel", num_visual_blocks=5)  # so that no shape fits the video one too
NANO_VAE = VAESpec(
    kind="hunyuan", scaling_factor=0.5, block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=4
)
NANO_IMAGE_VAE = replace(NANO_VAE, kind="flux")
NANO_TEXT = TextSpec(
    qwen=TowerSpec(width=96, ff_dim=192, layers=2, heads=4, kv_heads=2, head_dim=24, vocabulary=780),
    vision=TowerSpec(width=32, ff_dim=64, layers=2, heads=2, kv_heads=2, head_dim=16),
    clip=TowerSpec(
        width=64, ff_dim=128, layers=2, heads=4, kv_heads=4, head_dim=16, vocabulary=502, positions=77
    ),
)

_NANO_VIDEO = Variant(
    name="nano_video", title="Nano, text to video and image to video, built in", family="nano_video",
    tasks=("t2v", "i2v", "t2i"), files=("k5_nano_video.safetensors",), tags=("nano",),
    spec=NANO_VIDEO, vae=NANO_VAE, text=NANO_TEXT, steps=8, guidance=3.0, shift=5.0, qwen_tokens=256,
    rope_scale=IMAGE_ROPE, rope_side_px=64,
    sizes=((64, 64), (128, 128), (256, 256)), frames=(17, 49), fps=8,
)  # fmt: skip
_NANO_IMAGE = replace(
    _NANO_VIDEO, name="nano_image", title="Nano, text to image, built in", family="nano_image",
    tasks=("t2i",), files=("k5_nano_image.safetensors",), spec=NANO_IMAGE, vae=NANO_IMAGE_VAE, qwen_tokens=512,
    sizes=((128, 128), (256, 256)), frames=(1,),
)  # fmt: skip

_ROWS = (
    _LITE_5S,
    _row(
        _LITE_5S, "lite_t2v_5s_pretrain", "Video Lite 2B, text to video, 5 s, pre-trained",
        "kandinsky5lite_t2v_pretrain_5s.safetensors", "Kandinsky-5.0-T2V-Lite-pretrain-5s", "pretrain 5s sd",
    ),
    _row(
        _LITE_5S, "lite_t2v_5s_nocfg", "Video Lite 2B, text to video, 5 s, guidance-distilled",
        "kandinsky5lite_t2v_nocfg_5s.safetensors", "Kandinsky-5.0-T2V-Lite-nocfg-5s", "nocfg 5s sd", guidance=1.0,
    ),
    _row(
        _LITE_5S, "lite_t2v_5s_distilled16", "Video Lite 2B, text to video, 5 s, 16 steps",
        "kandinsky5lite_t2v_distilled16steps_5s.safetensors", "Kandinsky-5.0-T2V-Lite-distilled16steps-5s",
        "distilled 5s sd", guidance=1.0, steps=16,
    ),
    _LITE_10S,
    _row(
        _LITE_10S, "lite_t2v_10s_pretrain", "Video Lite 2B, text to video, 10 s, pre-trained",
        "kandinsky5lite_t2v_pretrain_10s.safetensors", "Kandinsky-5.0-T2V-Lite-pretrain-10s", "pretrain 10s sd",
    ),
    _row(
        _LITE_10S, "lite_t2v_10s_nocfg", "Video Lite 2B, text to video, 10 s, guidance-distilled",
        "kandinsky5lite_t2v_nocfg_10s.safetensors", "Kandinsky-5.0-T2V-Lite-nocfg-10s", "nocfg 10s sd", guidance=1.0,
    ),
    _row(
        _LITE_10S, "lite_t2v_10s_distilled16", "Video Lite 2B, text to video, 10 s, 16 steps",
        "kandinsky5lite_t2v_distilled16steps_10s.safetensors", "Kandinsky-5.0-T2V-Lite-distilled16steps-10s",
        "distilled 10s sd", guidance=1.0, steps=16,
    ),
    _row(
        _LITE_5S, "lite_i2v_5s", "Video Lite 2B, image to video, 5 s",
        "kandinsky5lite_i2v_5s.safetensors", "Kandinsky-5.0-I2V-Lite-5s", "sft 5s sd",
        tasks=("i2v",), shift=10.0, first_frame_norm=True,
    ),
    _PRO_5S_SD,
    _row(
        _PRO_5S_SD, "pro_t2v_5s_hd", "Video Pro 19B, text to video, 5 s, HD",
        "kandinsky5pro_t2v_sft_5s.safetensors", "Kandinsky-5.0-T2V-Pro-sft-5s", "sft 5s hd",
        attention=nabla(0.8), **_HD,
    ),
    _row(
        _PRO_5S_SD, "pro_t2v_5s_pretrain", "Video Pro 19B, text to video, 5 s, pre-trained",
        "kandinsky5pro_t2v_pretrain_5s.safetensors", "Kandinsky-5.0-T2V-Pro-pretrain-5s", "pretrain 5s sd",
    ),
    _row(
        _PRO_5S_SD, "pro_t2v_10s_sd", "Video Pro 19B, text to video, 10 s, SD",
        "kandinsky5pro_t2v_sft_10s.safetensors", "Kandinsky-5.0-T2V-Pro-sft-10s", "sft 10s sd",
        frames=(241,), attention=nabla(0.9),
    ),
    _row(
        _PRO_5S_SD, "pro_t2v_10s_hd", "Video Pro 19B, text to video, 10 s, HD",
        "kandinsky5pro_t2v_sft_10s.safetensors", "Kandinsky-5.0-T2V-Pro-sft-10s", "sft 10s hd",
        frames=(241,), attention=nabla(0.7), **_HD,
    ),
    _row(
        _PRO_5S_SD, "pro_t2v_10s_pretrain", "Video Pro 19B, text to video, 10 s, pre-trained",
        "kandinsky5pro_t2v_pretrain_10s.safetensors", "Kandinsky-5.0-T2V-Pro-pretrain-10s", "pretrain 10s sd",
        frames=(241,), attention=nabla(0.9),
    ),
    _row(
        _PRO_5S_SD, "pro_i2v_5s_sd", "Video Pro 19B, image to video, 5 s, SD",
        "kandinsky5pro_i2v_sft_5s.safetensors", "Kandinsky-5.0-I2V-Pro-sft-5s", "sft 5s sd",
        tasks=("i2v",), shift=10.0, first_frame_norm=True,
    ),
    _row(
        _PRO_5S_SD, "pro_i2v_5s_hd", "Video Pro 19B, image to video, 5 s, HD",
        "kandinsky5pro_i2v_sft_5s.safetensors", "Kandinsky-5.0-I2V-Pro-sft-5s", "sft 5s hd",
        tasks=("i2v",), attention=nabla(0.8), first_frame_norm=True, **_HD,
    ),
    _T2I,
    _row(
        _T2I, "lite_t2i_pretrain", "Image Lite 6B, text to image, pre-trained",
        "kandinsky5lite_t2i_pretrain.safetensors", "Kandinsky-5.0-T2I-Lite-pretrain", "pretrain hd",
    ),
    _row(
        _T2I, "lite_i2i", "Image Lite 6B, image editing",
        "kandinsky5lite_i2i.safetensors", "Kandinsky-5.0-I2I-Lite", "sft hd",
        family="lite_i2i", tasks=("i2i", "t2i"), spec=IMAGE_EDIT,
    ),
    _row(
        _T2I, "lite_i2i_pretrain", "Image Lite 6B, image editing, pre-trained",
        "kandinsky5lite_i2i_pretrain.safetensors", "Kandinsky-5.0-I2I-Lite-pretrain", "pretrain hd",
        family="lite_i2i", tasks=("i2i", "t2i"), spec=IMAGE_EDIT,
    ),
    _NANO_VIDEO,
    _NANO_IMAGE,
    replace(
        _NANO_IMAGE, name="nano_edit", title="Nano, image editing, built in", family="nano_edit",
        tasks=("i2i", "t2i"), files=("k5_nano_edit.safetensors",), spec=NANO_EDIT,
    ),
)  # fmt: skip

VARIANTS: dict[str, Variant] = {row.name: row for row in _ROWS}


def variant(name: str) -> Variant:
    """The row called `name`; an unknown name raises `VariantError` with the legal ones."""
    try:
        return VARIANTS[name]
    except KeyError:
        raise VariantError(f"Unknown variant {name!r}. Known: {', '.join(VARIANTS)}.") from None


def family(name: str) -> tuple[Variant, ...]:
    """All rows that share one architecture, the default row first."""
    return tuple(row for row in _ROWS if row.family == name)
