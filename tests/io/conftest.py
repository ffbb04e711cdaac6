"""Small weights files for the loader tests: a whole CrossDiT of tiny width, and headers without data."""

from __future__ import annotations

import contextlib
import json
import resource
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.model.crossdit import CrossDiT
from comfyui_kandinsky5.kandinsky_core.variants import NANO_VIDEO, CrossDiTSpec


def _shapes(spec: CrossDiTSpec) -> dict[str, torch.Tensor]:
    return CrossDiT(spec, device="meta", dtype=torch.bfloat16).state_dict()


def _weights(spec: CrossDiTSpec = NANO_VIDEO, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(tensor.shape).to(dtype) for name, tensor in _shapes(spec).items()}


def _write_header(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> Path:
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, tensor in tensors.items():
        end = position + prod(tensor.shape) * 2
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        stream.truncate(8 + len(raw) + position)
    return path


@contextlib.contextmanager
def _file_size_limit(limit_bytes: int) -> Iterator[None]:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.fixture(scope="session")
def shapes():
    """Meta tensors under the official names: `shapes(spec)`."""
    return _shapes


@pytest.fixture(scope="session")
def weights():
    """Random tensors under the official names: `weights(spec, dtype)`."""
    return _weights


@pytest.fixture(scope="session")
def write_header():
    """Write a bf16 safetensors file of any size as a hole on disk: a real header, no bytes behind it."""
    return _write_header


@pytest.fixture(scope="session")
def file_size_limit():
    """Let the system refuse writes beyond a size, as a full disk would: `with file_size_limit(bytes)`."""
    return _file_size_limit
