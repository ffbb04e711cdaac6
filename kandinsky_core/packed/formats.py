"""All ways to hold a weight packed, by name."""

from __future__ import annotations

import torch

from .blocks import BLOCKS
from .nf4 import NF4

FORMATS = {**BLOCKS, "NF4": NF4}  # blocks of bytes
FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # numbers, with a scale or without
