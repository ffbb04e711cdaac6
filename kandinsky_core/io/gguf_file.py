"""GGUF files, through the `gguf` package: what they hold and where, without touching the data; and writing them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendUnavailable, CheckpointError
from ..packed.blocks import BLOCKS
from .header import TORCH_DTYPES, TensorInfo

MAGIC = b"GGUF"
SUFFIX = ".gguf"
ARCHITECTURE = "kandinsky5"  # what our files call themselves; read are all that hold the right tensors
# Converters that regroup a tensor's elements note its shape under this key and the tensor's name.
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."


def is_gguf(path: Path) -> bool:
    """Whether a file begins like GGUF, whatever its name is."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_gguf(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and textual metadata of a GGUF file; a broken one raises `CheckpointError`."""
    gguf = _package(path)
    try:
        reader = gguf.GGUFReader(path)
        # A file of the other byte order would need every number turned round.
        if reader.byte_order != "I":
            raise CheckpointError(f"{path} was written on a machine of another byte order. Convert it on this one.")
        tensors = {tensor.name: _info(path, reader, tensor) for tensor in reader.tensors}
        metadata = {
            name: field.contents()
            for name, field in reader.fields.items()
            if field.types == [gguf.GGUFValueType.STRING]
        }
    except CheckpointError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError) as error:
        raise CheckpointError(
            f"{path} is a damaged or incomplete GGUF file ({type(error).__name__}: {error}). Download it again."
        ) from error
    return tensors, metadata


def map_gguf(path: Path) -> Tensor:
    """All bytes of a file, memory-mapped; what is written to them never reaches the file."""
    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)


def take(mapped: Tensor, info: TensorInfo) -> Tensor:
    """One tensor out of the mapped file: its numbers, or uint8 `[blocks, bytes]` where it is packed."""
    raw = mapped[info.offset : info.offset + info.nbytes]
    if info.dtype in BLOCKS:
        return raw.view(-1, BLOCKS[info.dtype].nbytes)
    return raw.view(TORCH_DTYPES[info.dtype]).view(info.shape)


def write_gguf(
    path: Path, infos: Iterable[TensorInfo], tensors: Iterable[Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a GGUF file; `tensors` come one by one, in the order of `infos`, as `take` gives them."""
    gguf = _package(path)
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    for key, value in metadata.items():
        writer.add_string(key, value)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for info in infos:
        kind = gguf.GGMLQuantizationType[info.dtype]
        # Any dtype but uint8 means: the shape is that of the numbers.
        writer.add_tensor_info(info.key, info.shape, None, info.nbytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    finally:
        writer.close()


def _info(path: Path, reader: Any, tensor: Any) -> TensorInfo:
    shape = tuple(reversed(tensor.shape.tolist()))
    if (field := reader.get_field(ORIGINAL_SHAPE + tensor.name)) is not None:
        shape = tuple(field.contents())
    return TensorInfo(
        path, tensor.name, shape, tensor.tensor_type.name, int(tensor.n_bytes), int(tensor.data_offset)
    )


def _package(path: Path) -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise BackendUnavailable(
            f"{path} is a GGUF file, which needs the gguf package ({error}). Install it with: pip install gguf"
        ) from error
    return gguf
