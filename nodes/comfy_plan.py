"""Memory plans inside ComfyUI: core moves the weights, a plan cuts the work into pieces.

A plan is an attachment of the MODEL; a wrapper around the network puts its pieces in force for the time of one call, so
that clones with other plans, which share the network, are not touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.memory_management
import comfy.model_management
import comfy.patcher_extension
import torch

from ..kandinsky_core.memory.estimate import precision_of
from ..kandinsky_core.memory.plan import Plan
from ..kandinsky_core.model import Regime
from .comfy_model import HostedCrossDiT
from .comfy_packed import formats
from .host import MemoryMode

KEY = "kandinsky5_plan"
MEASURES = "kandinsky5_measures"
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")

_NOTES = {
    "HIGH_VRAM": "models stay on the device once they are there",
    "NORMAL_VRAM": "ComfyUI loads as many weights as fit beside the work, the rest visits when it is needed",
    "LOW_VRAM": "ComfyUI loads as many weights as fit beside the work, the rest visits when it is needed",
    "NO_VRAM": "all weights visit when they are needed",
    "DISABLED": "everything is computed on the processor",
    "SHARED": "the device shares the main memory",
}


def mode() -> MemoryMode:
    """Return the mode core's loader is in."""
    if comfy.memory_management.aimdo_enabled:
        note = "ComfyUI brings weights in as they are used and drops them under pressure"
        return MemoryMode("dynamic VRAM", note, host_moves_weights=True)
    name = comfy.model_management.vram_state.name
    return MemoryMode(name.lower().replace("_", " "), _NOTES[name], host_moves_weights=True)


def free_bytes() -> int:
    """Return what is free once core has evicted the models that are loaded."""
    device = comfy.model_management.get_torch_device()
    free = comfy.model_management.get_free_memory(device)
    if comfy.model_management.is_device_cpu(device):
        return int(free)
    loaded = (entry for entry in comfy.model_management.current_loaded_models if entry.device == device)
    return int(free + sum(entry.model_loaded_memory() for entry in loaded))


def patched(model: Any, plan: Plan, measures: bool) -> Any:
    """Return a clone of a MODEL patcher that runs in the plan's pieces."""
    clone = model.clone()
    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    clone.remove_wrappers_with_key(kind, KEY)
    if isinstance(clone.model.diffusion_model, HostedCrossDiT):
        clone.add_wrapper_with_key(kind, KEY, _around_network(plan))
    clone.set_attachments(KEY, plan)
    clone.set_attachments(MEASURES, measures)
    return clone


def plan_of(model: Any) -> Plan | None:
    """Return the plan that `patched` gave this MODEL or one it was cloned from."""
    return model.get_attachment(KEY)


def measures(model: Any) -> bool:
    """Return whether the runs of this MODEL are counted on a processor."""
    return bool(model.get_attachment(MEASURES))


def weights_of(model: Any) -> str:
    """Return how the weights are held."""
    network = model.model.diffusion_model
    if packed := formats(network):
        return precision_of(packed)
    dtype = str(model.model.get_dtype()).removeprefix("torch.")
    if dtype in FLOAT8:
        return "fp8"
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    name = names.get(dtype, "bf16")
    modulation = network.visual_transformer_blocks[0].visual_modulation.out_layer.weight
    return "published" if name == "bf16" and modulation.dtype == torch.float32 else name


def _around_network(plan: Plan) -> Callable[..., Any]:
    def wrapper(executor: Any, *rest: Any, **more: Any) -> Any:
        network = executor.class_obj
        before = network.regime
        network.set_regime(
            Regime(dtype=before.dtype, hidden_pieces=plan.hidden_pieces, head_groups=plan.head_groups)
        )
        try:
            return executor(*rest, **more)
        finally:
            network.set_regime(before)

    return wrapper
