"""Bring a picture to the size a task needs: the resizing rules the published weights were trained with.

Legend: B batch, C channels, H/W rows/columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def area_size(height_px: int, width_px: int, area_px: int, multiple_px: int) -> tuple[int, int]:
    """(height, width) of about `area_px` pixels in multiples of `multiple_px`, aspect kept as far as that allows.

    Image-to-video: `area_px` is 512·768 or 1024², `multiple_px` 16, or 128 for block-sparse attention. Sides round
    half to even, but never below one multiple.
    """
    scale = math.sqrt(area_px / (height_px * width_px)) / multiple_px
    return max(1, round(height_px * scale)) * multiple_px, max(1, round(width_px * scale)) * multiple_px


def nearest_size(height_px: int, width_px: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) of `sizes` whose aspect ratio is nearest; the first of equals (editing)."""
    return min(sizes, key=lambda size: abs(size[0] / size[1] - height_px / width_px))


def resize(image_BCHW: Tensor, height_px: int, width_px: int) -> Tensor:
    """Resize to exactly (height, width), bilinear with antialiasing; uint8 goes through float32 and comes back rounded.

    PyTorch's own uint8 kernel is off by one level in a sixth of the pixels.
    """
    size = (height_px, width_px)
    if image_BCHW.dtype == torch.uint8:
        return resize(image_BCHW.float(), *size).round().clamp(0, 255).to(torch.uint8)
    return F.interpolate(image_BCHW, size, mode="bilinear", antialias=True, align_corners=False)


def cover(image_BCHW: Tensor, height_px: int, width_px: int) -> Tensor:
    """Scale until the target is covered, then crop its centre (editing).

    Sides are truncated as in the released code, which can leave one pixel too few; the side is then kept full
    instead of padded with black.
    """
    h, w = image_BCHW.shape[-2:]
    scale = min(h / height_px, w / width_px)
    scaled_h, scaled_w = max(height_px, int(h / scale)), max(width_px, int(w / scale))
    scaled_BCHW = resize(image_BCHW, scaled_h, scaled_w)
    top, left = round((scaled_h - height_px) / 2), round((scaled_w - width_px) / 2)
    return scaled_BCHW[..., top : top + height_px, left : left + width_px]


def to_uint8(image: Tensor) -> Tensor:
    """0…1 floats to 0…255, rounded to nearest: 255 levels are hit evenly and 8-bit pictures survive a round trip.

    The released code truncates, which darkens by half a level on average.
    """
    return image.float().clamp(0, 1).mul(255).round().to(torch.uint8)
