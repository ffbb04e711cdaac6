"""Pictures for Qwen2.5-VL's vision tower: the released halving, its size rule, and patches in its order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import TextError

PATCH_PX = 14
MERGE = 2  # patches per side that become one token
CELL_PX = PATCH_PX * MERGE
FRAMES_PER_PATCH = 2  # a still is repeated to fill a patch in time
MIN_PIXELS = 4 * CELL_PX**2
MAX_PIXELS = 16384 * CELL_PX**2
MAX_ASPECT = 200
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class Patches:
    """One picture cut into vision-tower patches."""

    values_NP: Tensor  # N patches, each 3 × 2 × 14 × 14 normalised values; merged cells are neighbours
    rows: int  # patches
    columns: int

    @property
    def tokens(self) -> int:
        """Text positions the picture takes: one per 2 × 2 patches."""
        return self.rows * self.columns // MERGE**2


def vision_size(height_px: int, width_px: int) -> tuple[int, int]:
    """(height, width) in pixels that Qwen2.5-VL resizes a picture to: multiples of 28, area within its limits."""
    if max(height_px, width_px) > MAX_ASPECT * min(height_px, width_px):
        raise TextError(f"A picture of {width_px}×{height_px} is too narrow: its sides may differ {MAX_ASPECT}-fold.")
    sides = height_px, width_px
    height, width = (round(side / CELL_PX) * CELL_PX for side in sides)
    if height * width > MAX_PIXELS:
        shrink = math.sqrt(height_px * width_px / MAX_PIXELS)
        height, width = (max(1, math.floor(side / shrink / CELL_PX)) * CELL_PX for side in sides)
    elif height * width < MIN_PIXELS:
        grow = math.sqrt(MIN_PIXELS / (height_px * width_px))
        height, width = (math.ceil(side * grow / CELL_PX) * CELL_PX for side in sides)
    return height, width


def patches(image_CHW: Tensor) -> Patches:
    """Patches of one picture `[3,H,W]` in -1…1, halved first as in the released editing pipeline."""
    if image_CHW.ndim != 3 or image_CHW.shape[0] != 3 or min(image_CHW.shape[1:]) < 2:
        raise TextError(f"An image for the text encoder must be [3, height, width], not {list(image_CHW.shape)}.")
    pixels_1CHW = _whole((image_CHW[None].detach().cpu().float() + 1) * 127.5)
    _, _, height, width = pixels_1CHW.shape
    # 8-bit between the steps, and the second in 8-bit arithmetic: so did the released pipeline.
    halved = F.interpolate(pixels_1CHW, (height // 2, width // 2), mode="bilinear", antialias=True)
    size = vision_size(height // 2, width // 2)
    resized = F.interpolate(_whole(halved).to(torch.uint8), size, mode="bicubic", antialias=True).float()
    mean_C11, std_C11 = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    x_CHW = (resized[0] / 255 - mean_C11) / std_C11
    rows, columns = x_CHW.shape[1] // PATCH_PX, x_CHW.shape[2] // PATCH_PX
    cells = x_CHW.reshape(3, rows // MERGE, MERGE, PATCH_PX, columns // MERGE, MERGE, PATCH_PX)
    ordered = cells.permute(1, 4, 2, 5, 0, 3, 6)  # cell row, cell column, patch row, patch column, channel, y, x
    framed = ordered[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, FRAMES_PER_PATCH, -1, -1)
    return Patches(framed.reshape(rows * columns, -1), rows, columns)


def _whole(pixels: Tensor) -> Tensor:
    return pixels.round().clamp(0, 255)
