"""How a quantised weights file shows: fp8 tensors, and the entries that stand beside a weight or a whole model."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

# ComfyUI's older and newer names. Only with an entry of its own may a weight be packed into another shape.
WEIGHT_ENTRIES = ("scale_weight", "weight_scale", "weight_scale_2", "comfy_quant")
OTHER_ENTRIES = ("scale_input", "input_scale", "scaled_fp8")

_ENTRY = re.compile(rf"(?:^|\.)(?:{'|'.join((*WEIGHT_ENTRIES, *OTHER_ENTRIES))})$")


def is_quant_entry(name: str) -> bool:
    """Whether a tensor is an extra of a quantised file and no weight."""
    return _ENTRY.search(name) is not None


def scaled_weights(names: Iterable[str]) -> set[str]:
    """Return the weights that have an entry of their own among `names`."""
    stems = (name.rpartition(".") for name in names)
    return {f"{stem}.weight" for stem, _, entry in stems if stem and entry in WEIGHT_ENTRIES}
