"""Flow times of the released sampler: equal steps from 1 to 0, then shifted towards noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import KandinskyError


def timesteps(steps: int, shift: float, denoise: float = 1.0) -> Tensor:
    """Flow times t, float32 `[steps + 1]`, from pure noise (1, or less when `denoise` < 1) down to exactly 0.

    u = 1 - i/N, t = s*u / (1 + (s - 1)*u). With `denoise` < 1, N is round(steps / denoise) and only the last
    `steps` of the N steps are used.
    """
    if steps < 1:
        raise KandinskyError(f"steps is {steps}; at least 1 is needed.")
    if not (math.isfinite(shift) and shift > 0):
        raise KandinskyError(f"shift is {shift}; it must be above 0 (published values: 3, 5, 10).")
    if not 0 < denoise <= 1:
        raise KandinskyError(f"denoise is {denoise}; it must be above 0 and at most 1.")
    u = torch.arange(steps, -1, -1, dtype=torch.float32) / round(steps / denoise)
    return shift * u / (1 + (shift - 1) * u)
