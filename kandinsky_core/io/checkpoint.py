"""Open weights files and folders: header first, tensors mapped from disk one by one."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from ..packed.blocks import BLOCKS
from .gguf_file import SUFFIX, is_gguf, map_gguf, read_gguf, take
from .header import PICKLE_ADVICE, PICKLE_SUFFIXES, PREAMBLE_BYTES, TORCH_DTYPES, TensorInfo, read_header
from .listing import some
from .whole_file import whole_file

INDEX_SUFFIX = ".index.json"
DIFFUSERS_STEM = "diffusion_pytorch_model"

# Wrappers that training codes and ComfyUI put around a whole model's names, outermost first.
PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "first_stage_model.",
    "vae.",
    "model.",
    "module.",
)

# Names of one part inside an all-in-one file, by the diffusers folder name of that part.
BUNDLED = {"transformer": ("model.diffusion_model.",), "vae": ("vae.", "first_stage_model.")}


class Checkpoint:
    """Weights on disk: headers are in memory, `tensor` maps data without copying it.

    `path` is what the user gave, `files` the files behind it, `config` a diffusers config.json ({} if
    there is none), `prefix` what was stripped from every name.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], config: Mapping[str, object],
        *, part: str = "transformer",
    ) -> None:  # fmt: skip
        self.path = path
        self.metadata = dict(metadata)
        self.config = dict(config)
        self.prefix, self.tensors = _strip(tensors, part)
        self._open: dict[Path, safe_open | Tensor] = {}

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted({info.file for info in self.tensors.values()})

    @property
    def is_gguf(self) -> bool:
        """Whether the file is GGUF, packed or not."""
        return any(info.offset is not None for info in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of `name`; a missing tensor raises `CheckpointError`."""
        return self._info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of `name`; blocks of a GGUF file are bytes."""
        info = self._info(name)
        if info.dtype in BLOCKS:
            return torch.uint8
        try:
            return TORCH_DTYPES[info.dtype]
        except KeyError:
            raise CheckpointError(
                f"{info.file}: {name} is stored as {info.dtype}, which is not supported."
            ) from None

    def tensor(self, name: str) -> Tensor:
        """Tensor `name`, memory-mapped: no bytes are read until it is used, and it never changes the file.

        GGUF's packed tensors come as uint8 `[blocks, bytes]`.
        """
        info = self._info(name)
        self.dtype(name)
        try:
            if info.file not in self._open:
                is_packed = info.offset is not None
                self._open[info.file] = map_gguf(info.file) if is_packed else safe_open(info.file, framework="pt")
            opened = self._open[info.file]
            return opened.get_tensor(info.key) if info.offset is None else take(opened, info)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{info.file}: {name} cannot be read: {error}.") from error

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path} has no tensor {name!r}.") from None


def open_checkpoint(path: str | os.PathLike[str], *, part: str = "transformer") -> Checkpoint:
    """Read the header of a .safetensors or .gguf file, a sharded index, or a diffusers folder (`part` or its parent).

    `part` names the component wanted ("transformer", "vae"): the subfolder of a pipeline folder, or the prefix in an
    all-in-one file. Anything else raises `CheckpointError`, GGUF without its package `BackendUnavailable`.
    """
    given = Path(path).expanduser()
    if not given.exists():
        raise CheckpointError(f"{given} does not exist.")
    folder = given / part if (given / part).is_dir() else given
    weights = _weights_in(folder) if given.is_dir() else given
    sharded = weights.name.endswith(INDEX_SUFFIX)
    read = _read_shards if sharded else read_gguf if is_gguf(weights) else read_header
    tensors, metadata = read(weights)
    config_file = weights.parent / "config.json"
    has_config = given.is_dir() or sharded or weights.name.startswith(DIFFUSERS_STEM)
    config = _read_json(config_file) if has_config and config_file.is_file() else {}
    if not tensors:
        raise CheckpointError(f"{weights} holds no tensors.")
    return Checkpoint(given, tensors, metadata, config, part=part)


def save_checkpoint(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file in one step: a crash or a full disk never leaves half a file under its name."""
    target = Path(path)
    stored = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    needed = sum(tensor.nbytes for tensor in stored.values())
    try:
        with whole_file(target) as partial:
            save_file(stored, partial, metadata=dict(metadata or {}))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{target} ({needed:,} bytes) cannot be written: {error}.") from error


def write_safetensors(
    path: Path, infos: Sequence[TensorInfo], tensors: Iterable[Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file whose `tensors` come one by one, in the order of `infos`; only one is in memory."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for info in infos:
        end = position + info.nbytes
        header[info.key] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % PREAMBLE_BYTES)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        for tensor in tensors:
            stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _weights_in(folder: Path) -> Path:
    """The one index, safetensors or GGUF file that a folder's weights are in."""
    for pattern in (f"*.safetensors{INDEX_SUFFIX}", "*.safetensors", f"*{SUFFIX}"):
        found = sorted(folder.glob(pattern))
        plain = [file for file in found if file.name.startswith(f"{DIFFUSERS_STEM}.safetensors")]
        if len(found) == 1 or len(plain) == 1:
            return (plain or found)[0]
        if found:
            names = ", ".join(file.name for file in found[:6])
            raise CheckpointError(f"{folder} holds {len(found)} weights files ({names}). Choose one of them.")
    if any(file.suffix.lower() in PICKLE_SUFFIXES for file in folder.iterdir()):
        raise CheckpointError(f"{folder} holds only pickled weights. {PICKLE_ADVICE}")
    raise CheckpointError(
        f"{folder} holds no .safetensors or {SUFFIX} file. Choose a weights file or a diffusers folder."
    )


def _read_shards(index: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no 'weight_map' from tensor names to files.")
    shards = sorted(set(weight_map.values()))
    if outside := [name for name in shards if Path(name).name != name]:
        raise CheckpointError(f"{index} points outside its folder: {outside[0]}.")
    if missing := [name for name in shards if not (index.parent / name).is_file()]:
        raise CheckpointError(
            f"{index} needs {len(shards)} files, {len(missing)} missing in {index.parent}: "
            f"{some(missing)}. Download them."
        )
    headers = {name: read_header(index.parent / name) for name in shards}
    if absent := [name for name, shard in weight_map.items() if name not in headers[shard][0]]:
        raise CheckpointError(
            f"{index}: {len(absent)} tensors are not in the files it names: {some(absent)}."
        )
    metadata = {key: value for _, found in headers.values() for key, value in found.items()}
    return {name: headers[shard][0][name] for name, shard in weight_map.items()}, metadata


def _read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object.")
    return content


def _strip(tensors: Mapping[str, TensorInfo], part: str) -> tuple[str, dict[str, TensorInfo]]:
    """Drop the prefixes all names share, and the other parts of an all-in-one file."""
    kept = dict(tensors)
    for bundle in BUNDLED.get(part, ()):
        kept = {name: info for name, info in kept.items() if name.startswith(bundle)} or kept
    stripped = ""
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in kept)), ""):
        kept = {name.removeprefix(prefix): info for name, info in kept.items()}
        stripped += prefix
    return stripped, kept
