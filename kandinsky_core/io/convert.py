"""Write a transformer's weights in another format, one tensor in memory at a time."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import CheckpointError
from ..model.crossdit import CrossDiT
from ..packed.blocks import BLOCKS
from ..packed.quantise import PACKERS, fp8_scale, pack_blocks, to_fp8
from .checkpoint import Checkpoint, open_checkpoint, write_safetensors
from .gguf_file import SUFFIX, write_gguf
from .header import TORCH_DTYPES, TensorInfo
from .identity import SPEC_KEY, VARIANT_KEY, Identity, identify, spec_metadata
from .listing import some
from .load import compare_names
from .quant import check_formats, is_quant_entry, read
from .whole_file import whole_file

GGUF = "gguf-"
FLOATS = {"bf16": "BF16", "fp16": "F16"}
TARGETS = ("fp8", *FLOATS, *(GGUF + name for name in (*PACKERS, "F16")))

# What is packed: the matrices of the blocks' attention and feed-forward, nine tenths of all weights. Embeddings, norms
# and the last projection are small and felt everywhere; modulation and time need their precision.
PACKED = re.compile(r"\w+_blocks\.\d+\.(?:\w+_attention|feed_forward)\.(?:to_\w+|in_layer|out_layer)\.weight")
FLOAT32 = re.compile(r"(?:.+\.)?(?:time_embeddings|\w*modulation)\.")  # left in float32 where the source has it

Entry = tuple[TensorInfo, Callable[[], Tensor]]


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written: tensors by format, the matrices that could not have it, bytes before and after."""

    identity: Identity
    counts: dict[str, int]
    unpacked: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    is_named: bool  # whether the file says which variant it is

    def report(self) -> str:
        """A few lines for the user."""
        formats = ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items()))
        lines = [
            f"{self.identity.variant.title}: {self.bytes_before:,} bytes became {self.bytes_after:,}.",
            f"Tensors: {formats}.",
        ]
        if self.unpacked:
            lines.append(f"Kept as F16, since their rows are no whole blocks: {some(self.unpacked)}.")
        if not self.is_named:
            lines.append(f"The file does not say which variant it is, {self.identity.hint} Name it with --variant.")
        return "\n".join(lines)


def convert(
    source: Path,
    target: Path,
    to: str,
    *,
    variant: str | None = None,
    on_tensor: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Write the transformer in `source` to `target` as `to`, one of `TARGETS`; `on_tensor(done, total)` may cancel."""
    _check_target(source, target, to)
    checkpoint = open_checkpoint(source)
    identity = identify(checkpoint, variant)
    weights = [name for name in checkpoint.tensors if not is_quant_entry(name)]
    wanted = {name: tuple(tensor.shape) for name, tensor in CrossDiT(identity.spec, device="meta").named_parameters()}
    compare_names(checkpoint, wanted, {name: checkpoint.shape(name) for name in weights})
    check_formats(checkpoint, weights)
    metadata = metadata_of(checkpoint, identity)
    entries = list(_entries(checkpoint, weights, to))
    wants_blocks = to.removeprefix(GGUF) in BLOCKS
    unpacked = [info.key for info, _ in entries if wants_blocks and info.dtype == "F16" and _is_packed(info.key)]
    write = write_gguf
    if not to.startswith(GGUF):
        write = write_safetensors
        entries.sort(key=lambda entry: -TORCH_DTYPES[entry[0].dtype].itemsize)  # so that all lie aligned
    needed = sum(info.nbytes for info, _ in entries)
    try:
        with whole_file(target) as partial:
            write(partial, [info for info, _ in entries], _made(entries, on_tensor), metadata)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{target} ({needed:,} bytes) cannot be written: {error}.") from error
    counts = Counter(info.dtype for info, _ in entries if not is_quant_entry(info.key))
    return Conversion(
        identity, dict(counts), tuple(unpacked), checkpoint.nbytes, target.stat().st_size, VARIANT_KEY in metadata
    )


def _check_target(source: Path, target: Path, to: str) -> None:
    if to not in TARGETS:
        raise CheckpointError(f"Weights cannot be converted to {to!r}. Possible: {', '.join(TARGETS)}.")
    suffix = SUFFIX if to.startswith(GGUF) else ".safetensors"
    if target.suffix.lower() != suffix:
        raise CheckpointError(f"{target}: {to} makes a {suffix} file. Let its name end so.")
    if target.exists():
        raise CheckpointError(f"{target} exists already. Remove it or choose another name; {source} stays as it is.")


def metadata_of(checkpoint: Checkpoint, identity: Identity) -> dict[str, str]:
    """What lets the new file be recognised as the old one was, its own name aside."""
    own = {key: checkpoint.metadata[key] for key in (SPEC_KEY, VARIANT_KEY) if key in checkpoint.metadata}
    is_published = checkpoint.path.name in identity.variant.files
    return own | (spec_metadata(identity.variant) if identity.certain or is_published else {})


def _entries(checkpoint: Checkpoint, names: Sequence[str], to: str) -> Iterator[Entry]:
    """All tensors of the new file, and how to make each."""
    for name in names:
        shape, stored = checkpoint.shape(name), checkpoint.tensors[name].dtype

        def value(name: str = name) -> Tensor:
            return read(checkpoint, name, torch.float32)

        if to == "fp8" and _is_packed(name):
            yield from _fp8(name, shape, value)
            continue
        kind = _kind(name, shape, stored, to)
        if kind in BLOCKS:
            yield _info(name, shape, kind), lambda kind=kind, value=value: pack_blocks(value(), kind)
        else:
            yield _info(name, shape, kind), lambda kind=kind, value=value: value().to(TORCH_DTYPES[kind])


def _is_packed(name: str) -> bool:
    return PACKED.fullmatch(name) is not None


def _kind(name: str, shape: tuple[int, ...], stored: str, to: str) -> str:
    """Format of one tensor that is not fp8."""
    if FLOAT32.match(name) and stored in ("F32", "F64"):
        return "F32"
    if not to.startswith(GGUF):
        return FLOATS.get(to, "BF16")
    kind = to.removeprefix(GGUF)
    if len(shape) == 1:
        return "F32"  # as GGUF's readers expect of biases and norms
    has_blocks = _is_packed(name) and kind in BLOCKS and shape[-1] % BLOCKS[kind].elements == 0
    return kind if has_blocks else "F16"


def _fp8(name: str, shape: tuple[int, ...], value: Callable[[], Tensor]) -> Iterator[Entry]:
    """A weight with its scale and the note that makes ComfyUI's layers use it."""
    def weight() -> Tensor:
        values = value()
        return to_fp8(values, fp8_scale(values))

    note = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    stem = name.removesuffix("weight")
    yield _info(name, shape, "F8_E4M3"), weight
    yield _info(f"{stem}weight_scale", (), "F32"), lambda: fp8_scale(value())  # read again: nothing is kept
    yield _info(f"{stem}comfy_quant", tuple(note.shape), "U8"), lambda: note


def _info(name: str, shape: tuple[int, ...], kind: str) -> TensorInfo:
    count = math.prod(shape)
    nbytes = BLOCKS[kind].packed_bytes(count) if kind in BLOCKS else count * TORCH_DTYPES[kind].itemsize
    return TensorInfo(Path(), name, shape, kind, nbytes)


def _made(entries: Sequence[Entry], on_tensor: Callable[[int, int], None] | None) -> Iterator[Tensor]:
    for done, (_, make) in enumerate(entries):
        if on_tensor is not None:
            on_tensor(done, len(entries))
        yield make()
