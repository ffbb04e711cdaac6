"""How a quantised weights file shows, and its tensors as packed layers hold them.

Two kinds: safetensors with 8-bit floats, whose scales stand beside the weights under ComfyUI's older or newer names,
and GGUF, whose blocks carry their scales.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..packed.blocks import BLOCKS
from ..packed.formats import FORMATS
from ..packed.formats import FP8 as FP8_NAMES
from ..packed.layers import Packing, can_hold, packed_layer, unpack
from .checkpoint import Checkpoint
from .listing import some

FP8 = tuple(FP8_NAMES.values())
FLOATS = ("F64", "F32", "F16", "BF16")  # of a plain weight
FP8_FORMATS = ("float8_e4m3fn", "float8_e5m2")  # ComfyUI's names

# ComfyUI's older and newer names. Only with an entry of its own may a weight be packed into another shape.
SCALES = ("scale_weight", "weight_scale")
WEIGHT_ENTRIES = (*SCALES, "weight_scale_2", "comfy_quant")
OTHER_ENTRIES = ("scale_input", "input_scale", "scaled_fp8")

_ENTRY = re.compile(rf"(?:^|\.)(?:{'|'.join((*WEIGHT_ENTRIES, *OTHER_ENTRIES))})$")

PackedLayer = Callable[[nn.Module, Packing, torch.dtype], nn.Module]


def is_quant_entry(name: str) -> bool:
    """Whether a tensor is an extra of a quantised file and no weight."""
    return _ENTRY.search(name) is not None


def scaled_weights(names: Iterable[str]) -> set[str]:
    """Return the weights that have an entry of their own among `names`."""
    stems = (name.rpartition(".") for name in names)
    return {f"{stem}.weight" for stem, _, entry in stems if stem and entry in WEIGHT_ENTRIES}


def check_formats(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Refuse weights in a format that no layer here can hold, and fp8 without its scale, before any is read."""
    names = list(names)
    foreign = _declared_formats(checkpoint) - set(FP8_FORMATS)
    foreign |= {checkpoint.tensors[name].dtype for name in names}.difference(FLOATS, FP8_NAMES, BLOCKS)
    if foreign:
        raise CheckpointError(
            f"{checkpoint.path} is quantised as {', '.join(sorted(foreign))}, which this loader does not read. "
            f"Use the bf16, fp16 or fp8_scaled file, or a GGUF file of {', '.join(BLOCKS)}."
        )
    scaled = scaled_weights(checkpoint.tensors).intersection(names)
    wide = [name for name in scaled if checkpoint.dtype(name) not in FP8]
    if wide:
        raise CheckpointError(
            f"{checkpoint.path} has scales for {len(wide)} weights that are not fp8: {some(sorted(wide))}. "
            "The file is altered or of a format this loader does not know; use the bf16 file."
        )
    # ComfyUI's scaled files keep embeddings, norms, convolutions and biases in 16 bit: what is fp8 there is scaled.
    is_scaled = any(name.rpartition(".")[2] == "scaled_fp8" for name in checkpoint.tensors)
    unscaled = [
        name
        for name in names
        if is_scaled and checkpoint.dtype(name) in FP8 and _scale_name(checkpoint, name) is None
    ]
    if unscaled:
        raise CheckpointError(
            f"{checkpoint.path} is marked as scaled fp8, but {len(unscaled)} fp8 weights have no scale: "
            f"{some(unscaled)}. The file is incomplete or altered; download it again."
        )


def packed_formats(checkpoint: Checkpoint) -> list[str]:
    """Formats of the packed tensors, by name; empty where all are plain."""
    return sorted({info.dtype for info in checkpoint.tensors.values()} & {*BLOCKS, *FP8_NAMES})


def packing_of(checkpoint: Checkpoint, name: str) -> Packing | None:
    """How tensor `name` is packed; None for a plain one."""
    info = checkpoint.tensors[name]
    if info.dtype in BLOCKS:
        return Packing(info.dtype, info.shape)
    if info.dtype not in FP8_NAMES:
        return None
    scale = read_scale(checkpoint, name)
    return Packing(info.dtype, info.shape, None if scale is None else scale.numel())


def read_scale(checkpoint: Checkpoint, name: str) -> Tensor | None:
    """Scale of an fp8 weight in float32: one number, or one a row, shaped to be multiplied with it."""
    scale_name = _scale_name(checkpoint, name)
    if scale_name is None:
        return None
    scale = checkpoint.tensor(scale_name).float()
    shape = checkpoint.shape(name)
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.numel() != shape[0]:
        raise CheckpointError(
            f"{checkpoint.path}: {scale_name} holds {scale.numel()} scales, {name} has {shape[0]} rows. "
            "The file is damaged; download it again."
        )
    return scale.reshape(-1, *[1] * (len(shape) - 1))


def read(checkpoint: Checkpoint, name: str, dtype: torch.dtype | None) -> Tensor:
    """One tensor in `dtype` (None: as stored; packed ones become bfloat16), packed ones multiplied out in float32."""
    tensor = checkpoint.tensor(name)
    packing = packing_of(checkpoint, name)
    if packing is None:
        return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
    return unpack(tensor, read_scale(checkpoint, name), packing, dtype or torch.bfloat16)


def hold_packed(
    model: nn.Module,
    expected: nn.Module,
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    dtype: torch.dtype | None,
    layer: PackedLayer = packed_layer,
) -> dict[str, Packing]:
    """Replace the layers whose weights the file has packed; return these weights' stored names.

    `expected` is the model made of torch.nn layers, `names` maps stored names to the model's. What no layer holds
    packed is left to `read`.
    """
    held = {}
    for stored, name in names.items():
        owner, _, kind = name.rpartition(".")
        packing = packing_of(checkpoint, stored) if kind == "weight" else None
        if packing is None or not can_hold(plain := expected.get_submodule(owner), packing):
            continue
        replace_layer(model, owner, layer(plain, packing, dtype or torch.bfloat16))
        held[stored] = packing
    return held


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer where its dotted name says."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def packed_entries(checkpoint: Checkpoint, stored: str, name: str) -> Iterator[tuple[str, Tensor]]:
    """What a packed layer takes from the file, under the names of its state dict."""
    yield name, checkpoint.tensor(stored)
    if checkpoint.tensors[stored].dtype in FP8_NAMES and (scale := read_scale(checkpoint, stored)) is not None:
        yield f"{name}_scale", scale


def is_finite_packed(packed: Tensor, packing: Packing, sample: int | None) -> bool:
    """Whether blocks hold only finite numbers; `sample` limits the search to as many elements at both ends."""
    block = FORMATS[packing.format]
    rows = len(packed) if sample is None else -(-sample // block.elements)
    ends = (packed,) if len(packed) <= 2 * rows else (packed[:rows], packed[-rows:])
    return all(torch.isfinite(block.unpack(part)).all() for end in ends for part in end.split(1 << 16))


def _scale_name(checkpoint: Checkpoint, name: str) -> str | None:
    """Name of an fp8 weight's scale; None where the file has none."""
    stem = name.removesuffix("weight")
    return next((stem + suffix for suffix in SCALES if stem + suffix in checkpoint.tensors), None)


def _declared_formats(checkpoint: Checkpoint) -> set[str]:
    """Formats that ComfyUI's newer quantised files name, in a tensor of each layer or in the file's metadata."""
    place = f"{checkpoint.path}: _quantization_metadata"
    layers = _json_object(checkpoint.metadata.get("_quantization_metadata", "{}"), place).get("layers", {})
    entries = [_require_object(entry, place) for entry in _require_object(layers, place).values()]
    for name, info in checkpoint.tensors.items():
        if name.rpartition(".")[2] == "comfy_quant":
            text = bytes(checkpoint.tensor(name).flatten().view(torch.uint8).tolist())
            entries.append(_json_object(text, f"{info.file}: {name}"))
    return {str(entry.get("format")) for entry in entries}


def _json_object(text: str | bytes, place: str) -> dict[str, object]:
    try:
        return _require_object(json.loads(text), place)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{place} is not JSON: {error}. The file is damaged; download it again.") from error


def _require_object(found: object, place: str) -> dict[str, object]:
    if not isinstance(found, dict):
        raise CheckpointError(f"{place} is {found!r:.40}, not a JSON object. The file is damaged; download it again.")
    return found
