"""Text-encoder weights into meta-initialised towers: names of every layout, fp8 scales, one report of what is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..io.checkpoint import Checkpoint
from ..io.listing import some
from ..io.quant import check_formats, hold_packed, is_quant_entry, packed_entries, read, replace_layer
from ..io.signature import describe
from ..packed.layers import Packing, packed_layer
from ..packed.nf4 import NF4
from ..packed.quantise import pack_blocks


@dataclass(frozen=True, slots=True)
class Layout:
    """How one tower's tensors are named in files."""

    title: str
    tower: re.Pattern[str]  # group "name" is the tower's own name for a tensor
    ignored: re.Pattern[str]  # parts of the same model that this tower does not use
    spelling: tuple[tuple[re.Pattern[str], str], ...] = ()  # other names of the same tensors, brought into the usual


def tower_names(checkpoint: Checkpoint, layout: Layout) -> dict[str, str]:
    """File names by the tower's own names; a file of another model raises `CheckpointError`."""
    found, unexpected = {}, []
    for name in checkpoint.tensors:
        usual = name
        for pattern, replacement in layout.spelling:
            usual = pattern.sub(replacement, usual)
        if match := layout.tower.match(usual):
            found[match["name"]] = name
        elif not layout.ignored.match(usual) and not is_quant_entry(name):
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


def assign(
    tower: nn.Module, checkpoint: Checkpoint, layout: Layout, dtype: torch.dtype | None, *, nf4: bool = False
) -> None:
    """Give the parameters of a meta-initialised `tower` the file's memory-mapped tensors.

    Only what must change its dtype is copied, one tensor at a time; what is stored packed stays so. `dtype` None keeps
    what is stored (beside packed weights all else becomes bfloat16). `nf4` packs the linear layers' weights, also of a
    file that has them packed another way. Missing, unexpected and wrong shapes raise one `CheckpointError` before any
    data is read.
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
    check_formats(checkpoint, names.values())
    to_nf4 = _linear_weights(tower, names) if nf4 else set()
    others = {source: name for name, source in names.items() if name not in to_nf4}
    held = hold_packed(tower, tower, checkpoint, others, dtype)
    stored = {}
    for name, source in names.items():
        if name in to_nf4:
            stored[name] = _pack_nf4(tower, name, read(checkpoint, source, torch.float32))
        elif source in held:
            stored |= packed_entries(checkpoint, source, name)
        else:
            stored[name] = read(checkpoint, source, dtype or (torch.bfloat16 if held or nf4 else None))
    tower.load_state_dict(stored, strict=True, assign=True)
    tower.requires_grad_(False)
    tower.eval()


def _linear_weights(tower: nn.Module, names: Iterable[str]) -> set[str]:
    """Weights of linear layers that make whole NF4 blocks."""
    layers = {f"{name}.weight": layer for name, layer in tower.named_modules() if isinstance(layer, nn.Linear)}
    return {name for name in names if name in layers and layers[name].weight.numel() % NF4.elements == 0}


def _pack_nf4(tower: nn.Module, name: str, values: Tensor) -> Tensor:
    """Pack one weight and give its layer the form that takes it."""
    owner = name.removesuffix(".weight")
    layer = tower.get_submodule(owner)
    replace_layer(tower, owner, packed_layer(layer, Packing("NF4", tuple(values.shape)), values.dtype))
    return pack_blocks(values, "NF4")


def _with_prefix_of(expected: Iterable[str], names: Mapping[str, str]) -> dict[str, str]:
    """Names as this version of transformers has them: older ones keep CLIP's tower under `text_model.`."""
    prefix = "text_model." if all(name.startswith("text_model.") for name in expected) else ""
    return {prefix + name: source for name, source in names.items()}


def _listing(title: str, entries: list[str]) -> list[str]:
    return [f"{len(entries)} {title}: {some(entries)}"] if entries else []
