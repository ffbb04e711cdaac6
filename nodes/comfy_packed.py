"""Packed weights (GGUF blocks, fp8 of the text encoders) in ComfyUI: layers that core's memory management moves, and a
patcher under which LoRAs apply to them.

Core's own quantised layers know neither GGUF nor a change of formats by layer. These keep what the file stores; core
brings it to the device like any weight, and it is unpacked there, with the patches of LoRA loaders, while it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import comfy.lora
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kandinsky_core.errors import KandinskyError
from ..kandinsky_core.packed.layers import (
    PackedEmbedding,
    PackedLinear,
    PackedWeight,
    Packing,
    packed_linear,
    unpack,
)


class _Hosted(comfy.ops.CastWeightBiasOp):
    """What core's patcher looks for in a layer; it puts LoRA patches into `weight_function`."""

    comfy_cast_weights = True

    @contextmanager
    def stored_on(self, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """Packed weight, scale and bias (in `dtype`) on `device`, brought by core where they lie elsewhere."""
        # Core would apply the patches to the bytes; it is shown a layer without any for the weight.
        stored = SimpleNamespace(
            weight=self.weight, bias=self.bias, weight_function=[], bias_function=self.bias_function
        )
        scale = None if self.weight_scale is None else self.weight_scale.to(device)
        with comfy.ops.CastBiasWeightContext(
            stored, dtype=self.weight.dtype, device=device, bias_dtype=dtype, offloadable=True
        ) as (packed, bias):
            yield packed, scale, bias

    def patched(self, packed: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return the unpacked weight with its patches."""
        weight = unpack(packed, scale, self.packing, dtype)
        for function in self.weight_function:
            weight = function(weight)
        return weight


class HostedPackedLinear(PackedLinear, _Hosted):
    """A packed linear layer under core's memory management."""

    def forward(self, x_ND: Tensor) -> Tensor:
        """Apply the layer, patches included, in the dtype of `x_ND`."""
        comfy.ops.run_every_op()
        with self.stored_on(x_ND.device, x_ND.dtype) as (packed, scale, bias_R):
            if self.weight_function:
                return F.linear(x_ND, self.patched(packed, scale, x_ND.dtype), bias_R)
            return packed_linear(x_ND, bias_R, packed, scale, self.packing)


class HostedPackedEmbedding(PackedEmbedding, _Hosted):
    """A packed table under core's memory management."""

    bias = None  # core asks every layer for one

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of `ids`, patches included."""
        comfy.ops.run_every_op()
        with self.stored_on(ids.device, self.dtype) as (packed, scale, _):
            if self.weight_function:
                return F.embedding(ids, self.patched(packed, scale, self.dtype))
            return self.rows(packed, scale, ids)


def hosted_layer(layer: nn.Module, packing: Packing, dtype: torch.dtype) -> PackedWeight:
    """Return the packed counterpart of a layer, without memory for its tensors."""
    if isinstance(layer, nn.Embedding):
        return HostedPackedEmbedding(packing, dtype=dtype)
    return HostedPackedLinear(packing, bias=layer.bias is not None)


def formats(model: nn.Module) -> list[str]:
    """Return the formats of a model's packed weights."""
    return sorted({layer.packing.format for layer in model.modules() if isinstance(layer, PackedWeight)})


class PackedPatcher(comfy.model_patcher.ModelPatcher):
    """Core's patcher, for models with packed weights: it never writes patched numbers over packed ones.

    Not the patcher of dynamic VRAM, which computes with the stored numbers themselves.
    """

    def patch_weight_to_device(
        self, key: str, device_to: Any = None, inplace_update: bool = False, return_weight: bool = False,
        force_cast: bool = False,
    ) -> Any:  # fmt: skip
        """Leave a packed weight as it is; give it unpacked and patched to who asks for it."""
        layer = self._packed(key)
        if layer is None or return_weight and key not in self.patches:
            return super().patch_weight_to_device(key, device_to, inplace_update, return_weight, force_cast)
        if return_weight:
            weight = unpack(layer.weight, layer.weight_scale, layer.packing, torch.float32)
            return comfy.lora.calculate_weight(self.patches[key], weight.to(device_to or weight.device), key)
        return None  # `_patch_packed` has the patches applied on use

    def load(self, *args: Any, **options: Any) -> None:
        """Load as core does, with the patches of packed layers wherever these are."""
        super().load(*args, **options)
        self._patch_packed()

    def partially_unload(self, *args: Any, **options: Any) -> Any:
        """Unload as core does; patches of packed layers stay."""
        freed = super().partially_unload(*args, **options)
        self._patch_packed()
        return freed

    def get_key_patches(self, filter_prefix: str | None = None) -> Any:
        """Refuse to lend the weights to nodes that merge models, and to LoRA hooks, which write over them."""
        if formats(self.model):
            raise KandinskyError(
                "Packed weights (GGUF, fp8 text encoders) can neither be merged into another model nor take LoRA hooks "
                "(scheduled LoRAs). Use a plain LoRA loader, or the bf16 file of the model."
            )
        return super().get_key_patches(filter_prefix)

    def model_state_dict_for_saving(self, *args: Any, **options: Any) -> Any:
        """Refuse to save: what others would read as numbers are packed bytes."""
        if formats(self.model):
            raise KandinskyError(
                "Packed weights (GGUF, fp8 text encoders) cannot be saved from ComfyUI. Convert the file with "
                "'kandinsky5 convert', or load the bf16 file and save that."
            )
        return super().model_state_dict_for_saving(*args, **options)

    def _patch_packed(self) -> None:
        """Give packed layers their patches once: core drops them where a layer stays, and adds where one goes."""
        patch = comfy.model_patcher.LowVramPatch
        for name, layer in self.model.named_modules():
            if isinstance(layer, PackedWeight):
                key = f"{name}.weight"
                others = [function for function in layer.weight_function if not isinstance(function, patch)]
                layer.weight_function = [patch(key, self.patches), *others] if key in self.patches else others

    def _packed(self, key: str) -> PackedWeight | None:
        """Return the layer whose packed weight `key` names."""
        owner, _, kind = key.rpartition(".")
        layer = comfy.utils.get_attr(self.model, owner) if kind == "weight" else None
        return layer if isinstance(layer, PackedWeight) else None
