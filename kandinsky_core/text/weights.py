"""Text-encoder weights into meta-initialised towers: names of every layout, fp8 scales, one report of what is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..io.checkpoint import Checkpoint
from ..io.listing import some
from ..io.quant import FP8, is_quant_entry
from ..io.signature import describe

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # safetensors names of what can be a plain weight
SCALES = ("scale_weight", "weight_scale")  # ComfyUI's older and newer name of one fp8 weight's scale
FP8_FORMATS = ("float8_e4m3fn", "float8_e5m2")

@dataclass(frozen=True, slots=True)
class Layout:
    """How one tower's tensors are named in files."""

    title: str
    tower: re.Pattern[str]  # group "name" is the tower's own name for a tensor
    ignored: re.Pattern[str]  # parts of the same model that this tower does not use


def tower_names(checkpoint: Checkpoint, layout: Layout) -> dict[str, str]:
    """File names by the tower's own names; a file of another model raises `CheckpointError`."""
    found, unexpected = {}, []
    for name in checkpoint.tensors:
        if match := layout.tower.match(name):
            found[match["name"]] = name
        elif not layout.ignored.match(name) and not is_quant_entry(name):
            unexpected.append(name)
    if not any(name.endswith(".weight") for name in found):
        raise CheckpointError(f"{checkpoint.path} is not {layout.title}. {looks_like(checkpoint)}")
    if unexpected:
        raise CheckpointError(
            f"{checkpoint.path} is not {layout.title} alone: {len(unexpected)} tensors do not belong to it "
            f"({some(unexpected)}). {looks_like(checkpoint)}"
        )
    return found


def looks_like(checkpoint: Checkpoint) -> str:
    """One sentence on what the file is; language models keep most of their names under `model.`."""
    return describe(name.removeprefix("model.") for name in checkpoint.tensors)


@contextmanager
def building(checkpoint: Checkpoint) -> Iterator[None]:
    """Report a model that transformers refuses to build as `CheckpointError`."""
    from huggingface_hub import errors

    # Newer transformers check a configuration's types and raise this, older ones fail wherever a value is used.
    refused = getattr(errors, "StrictDataclassError", TypeError)
    try:
        yield
    except CheckpointError:
        raise
    except (
        refused, ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError
    ) as error:  # fmt: skip
        source = "config.json" if checkpoint.config else "tensor shapes"
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(
            f"{checkpoint.path}: no model can be built from its {source} ({reason}). "
            "Give the folder with the config.json that came with the weights."
        ) from error


def assign(tower: nn.Module, checkpoint: Checkpoint, layout: Layout, dtype: torch.dtype | None) -> None:
    """Give the parameters of a meta-initialised `tower` the file's memory-mapped tensors.

    Only what must change its dtype is copied, one tensor at a time. `dtype` None keeps what is stored (fp8 becomes
    bfloat16). Missing, unexpected and wrong shapes raise one `CheckpointError` before any data is read.
    """
    names = {name: source for name, source in tower_names(checkpoint, layout).items() if not is_quant_entry(name)}
    expected = {name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
    names = _with_prefix_of(expected, names)
    problems = [
        *_listing("missing", sorted(set(expected) - set(names))),
        *_listing("unexpected", sorted(names[name] for name in set(names) - set(expected))),
        *_listing(
            "wrong shape",
            [
                f"{names[name]} is {list(checkpoint.shape(names[name]))}, needs {list(shape)}"
                for name, shape in expected.items()
                if name in names and checkpoint.shape(names[name]) != shape
            ],
        ),
    ]
    if problems:
        raise CheckpointError(
            f"{checkpoint.path} does not fit {layout.title}: {'; '.join(problems)}. "
            "The file is incomplete, altered or of another model; download it again."
        )
    _check_formats(checkpoint, names.values())
    tower.load_state_dict(
        {name: read(checkpoint, source, dtype) for name, source in names.items()}, strict=True, assign=True
    )
    tower.requires_grad_(False)
    tower.eval()


def read(checkpoint: Checkpoint, name: str, dtype: torch.dtype | None) -> Tensor:
    """One tensor in `dtype` (None: as stored), fp8 multiplied by its scale in float32."""
    tensor = checkpoint.tensor(name)
    if tensor.dtype not in FP8:
        return tensor if dtype is None else tensor.to(dtype)
    scale_name = _scale_name(checkpoint, name)
    values = tensor.float()
    if scale_name is not None:
        scale = checkpoint.tensor(scale_name)
        per_row = scale.float().reshape(-1, *[1] * (values.ndim - 1)) if scale.numel() > 1 else scale.float()
        values = values.mul_(per_row)
    return values.to(dtype or torch.bfloat16)


def _with_prefix_of(expected: Iterable[str], names: Mapping[str, str]) -> dict[str, str]:
    """Names as this version of transformers has them: older ones keep CLIP's tower under `text_model.`."""
    prefix = "text_model." if all(name.startswith("text_model.") for name in expected) else ""
    return {prefix + name: source for name, source in names.items()}


def _scale_name(checkpoint: Checkpoint, name: str) -> str | None:
    """Name of an fp8 weight's scale, a single value or one per output row; None where the file has none."""
    stem = name.removesuffix("weight")
    return next((stem + suffix for suffix in SCALES if stem + suffix in checkpoint.tensors), None)


def _check_formats(checkpoint: Checkpoint, sources: Iterable[str]) -> None:
    """Refuse weights in a quantised format other than scaled fp8, and fp8 without its scale, before any is read."""
    sources = list(sources)
    foreign = _declared_formats(checkpoint) - set(FP8_FORMATS)
    foreign |= {stored for stored in (checkpoint.tensors[name].dtype for name in sources) if stored not in FLOATS}
    if foreign:
        raise CheckpointError(
            f"{checkpoint.path} is quantised as {', '.join(sorted(foreign))}, which this loader does not read. "
            "Use the bf16, fp16 or fp8_scaled file."
        )
    # ComfyUI's scaled files keep embeddings, norms, convolutions and biases in 16 bit: what is fp8 there is scaled.
    is_scaled = any(name.rpartition(".")[2] == "scaled_fp8" for name in checkpoint.tensors)
    unscaled = [
        name
        for name in sources
        if is_scaled and checkpoint.dtype(name) in FP8 and _scale_name(checkpoint, name) is None
    ]
    if unscaled:
        raise CheckpointError(
            f"{checkpoint.path} is marked as scaled fp8, but {len(unscaled)} fp8 weights have no scale: "
            f"{some(unscaled)}. The file is incomplete or altered; download it again."
        )


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


def _listing(title: str, entries: list[str]) -> list[str]:
    return [f"{len(entries)} {title}: {some(entries)}"] if entries else []
