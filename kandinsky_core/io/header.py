"""The safetensors header: names, shapes, dtypes and metadata of one file, without touching its data."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import CheckpointError

PREAMBLE_BYTES = 8  # little-endian length of the JSON header
HEADER_LIMIT_BYTES = 100_000_000  # the format's own limit

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
PICKLE_ADVICE = (
    "Pickle files can run code when they are opened, so only .safetensors is read. "
    "Download the .safetensors version, or convert the file on a machine you trust."
)

# First bytes of files that are often saved under a weights file's name.
FOREIGN_STARTS = (
    (b"PK\x03\x04", f"is a zip archive, most likely a pickled PyTorch file. {PICKLE_ADVICE}"),
    (b"\x80", f"is a pickle. {PICKLE_ADVICE}"),
    (
        b"version https://git-lfs",
        "is a Git LFS pointer, not the weights. Run 'git lfs pull' or download the file.",
    ),
    (b"<", "is a web page, so the download failed. Download it again (some files need you to be signed in)."),
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor: where it is and what it looks like."""

    file: Path
    key: str  # name inside the file, before any prefix is stripped
    shape: tuple[int, ...]  # of the numbers, however they are packed
    dtype: str  # safetensors' or GGUF's name: "BF16", "F32", "F8_E4M3", "Q8_0", ...
    nbytes: int
    offset: int | None = None  # first byte in a GGUF file


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of one safetensors file; a broken or foreign file raises `CheckpointError`."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise CheckpointError(f"{path}: a {path.suffix} file is a pickle. {PICKLE_ADVICE}")
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(32)
            _refuse_foreign(path, start, file_bytes)
            header_bytes = struct.unpack("<Q", start[:PREAMBLE_BYTES])[0]
            if header_bytes > HEADER_LIMIT_BYTES:
                raise CheckpointError(
                    f"{path} is not a safetensors file: its header claims {header_bytes:,} bytes."
                )
            if PREAMBLE_BYTES + header_bytes > file_bytes:
                raise _truncated(path, PREAMBLE_BYTES + header_bytes, file_bytes, "its header alone needs")
            stream.seek(PREAMBLE_BYTES)
            raw = stream.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    try:
        header = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file: its header is not JSON ({error})."
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is not a table of tensors.")

    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path} has a damaged header: its metadata is not a table of strings.")
    tensors = dict(_entries(path, header))
    expected = PREAMBLE_BYTES + header_bytes + sum(info.nbytes for info in tensors.values())
    if file_bytes < expected:
        raise _truncated(path, expected, file_bytes, "its tensors need")
    if file_bytes > expected:
        raise CheckpointError(f"{path} is damaged: {file_bytes:,} bytes on disk, {expected:,} expected.")
    return tensors, metadata


def _entries(path: Path, header: dict[str, object]) -> Iterator[tuple[str, TensorInfo]]:
    position = 0
    ordered = []
    for name, entry in header.items():
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
                all(type(side) is int and side >= 0 for side in shape) and 0 <= begin <= end
            ):
                ordered.append((begin, end, name, dtype, tuple(shape)))
            case _:
                raise CheckpointError(f"{path} has a damaged header: entry {name!r} is not a tensor.")
    for begin, end, name, dtype, shape in sorted(ordered):
        known = TORCH_DTYPES.get(dtype)
        if known is not None and math.prod(shape) * known.itemsize != end - begin:
            raise CheckpointError(
                f"{path} has a damaged header: {name!r} is {dtype} {list(shape)} but stores {end - begin:,} bytes."
            )
        if begin != position:
            raise CheckpointError(
                f"{path} has a damaged header: {name!r} does not follow the tensor before it."
            )
        position = end
        yield name, TensorInfo(path, name, shape, dtype, end - begin)


def _refuse_foreign(path: Path, start: bytes, file_bytes: int) -> None:
    for magic, reason in FOREIGN_STARTS:
        if start.startswith(magic) and not start[PREAMBLE_BYTES:].startswith(b"{"):
            raise CheckpointError(f"{path} {reason}")
    if file_bytes <= PREAMBLE_BYTES:
        what = "is empty" if not file_bytes else f"is only {file_bytes} bytes long"
        raise CheckpointError(f"{path} {what}. Download it again.")


def _truncated(path: Path, expected: int, actual: int, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is incomplete: {actual:,} bytes on disk, {what} {expected:,}. The download was cut off; repeat it."
    )
