"""Whether this machine has what torch.compile needs: tests of compiling expect its fallback where not."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def can_compile() -> bool:
    """Try the smallest function."""
    try:
        return torch.compile(_compiled_plus_one, dynamic=True)(torch.zeros(2, 3)).sum().item() == 6
    except RuntimeError:  # what dynamo and inductor raise
        return False


def _compiled_plus_one(x: Tensor) -> Tensor:
    return x + 1 if torch.compiler.is_compiling() else x
