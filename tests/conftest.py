"""Shared fixtures: the golden tensors."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"


@cache
def _golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture
def golden():
    """Read one golden file: `golden("misc")["schedule.50.5"]`."""
    return _golden
