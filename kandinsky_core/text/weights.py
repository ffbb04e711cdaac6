"""Text-encoder weights into meta-initialised towers: names of every layout, fp8 scales, one report of what is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..io.checkpoint import Checkpoint
from ..io.signature import describe

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # safetensors names of what can be a plain weight
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = ("scale_weight", "weight_scale")  # ComfyUI's older and newer name of one fp8 weight's scale
QUANTISATION_KEYS = re.compile(r"(^|\.)(scaled_fp8|comfy_quant|scale_weight|weight_scale|scale_input|input_scale)$")
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
        elif not layout.ignored.match(name) and not QUANTISATION_KEYS.search(name):
            unexpected.append(name)
    if not any(name.endswith(".weight") for name in found):
        raise CheckpointError(f"{checkpoint.path} is not {layout.title}. {looks_like(checkpoint)}")
    if unexpected:
        raise CheckpointError(
            f"{checkpoint.path} is not {layout.title} alone: {len(unexpected)} tensors do not belong to it "
            f"({_some(unexpected)}). {looks_like(checkpoint)}"
        )
    return found


def looks_like(checkpoint: Checkpoint) -> str:
    """One sentence on what the file is; language models keep most of their names under `model.`."""
    return describe(name.removeprefix("model.") for name in checkpoint.tensors)


def assign(tower: nn.Module, checkpoint: Checkpoint, layout: Layout, dtype: torch.dtype | None) -> None:
    """Give the parameters of a meta-initialised `tower` the file's memory-mapped tensors.

    Only what must change its dtype is copied, one tensor at a time. `dtype` None keeps what is stored (fp8 becomes
    bfloat16). Missing, unexpected and wrong shapes raise one `CheckpointError` before any data is read.
    """
    names = {name: source for name, source in tower_names(checkpoint, layout).items() if not _is_scale(name)}
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
    scale = _scale(checkpoint, name)
    values = tensor.float()
    if scale is not None:
        per_row = scale.float().reshape(-1, *[1] * (values.ndim - 1)) if scale.numel() > 1 else scale.float()
        values = values.mul_(per_row)
    return values.to(dtype or torch.bfloat16)


def _is_scale(name: str) -> bool:
    return QUANTISATION_KEYS.search(name) is not None


def _with_prefix_of(expected: Iterable[str], names: Mapping[str, str]) -> dict[str, str]:
    """Names as this version of transformers has them: older ones keep CLIP's tower under `text_model.`."""
    prefix = "text_model." if all(name.startswith("text_model.") for name in expected) else ""
    return {prefix + name: source for name, source in names.items()}


def _scale(checkpoint: Checkpoint, name: str) -> Tensor | None:
    """Scale of one fp8 weight: a single value or one per output row; None where the file has none."""
    stem = name.removesuffix("weight")
    for suffix in SCALES:
        if stem + suffix in checkpoint.tensors:
            return checkpoint.tensor(stem + suffix)
    return None


def _check_formats(checkpoint: Checkpoint, sources: Iterable[str]) -> None:
    """Refuse weights in a quantised format other than scaled fp8, before any is read."""
    declared = {}
    for name in checkpoint.tensors:
        if name.endswith("comfy_quant"):
            declared[name] = json.loads(bytes(checkpoint.tensor(name).tolist()))
    layers = json.loads(checkpoint.metadata.get("_quantization_metadata", "{}")).get("layers", {})
    formats = {str(entry.get("format")) for entry in (*declared.values(), *layers.values())}
    foreign = formats - set(FP8_FORMATS)
    foreign |= {stored for stored in (checkpoint.tensors[name].dtype for name in sources) if stored not in FLOATS}
    if foreign:
        raise CheckpointError(
            f"{checkpoint.path} is quantised as {', '.join(sorted(foreign))}, which this loader does not read. "
            "Use the bf16, fp16 or fp8_scaled file."
        )


def _listing(title: str, entries: list[str]) -> list[str]:
    return [f"{len(entries)} {title}: {_some(entries)}"] if entries else []


def _some(names: Iterable[str], limit: int = 4) -> str:
    listed = list(names)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")
