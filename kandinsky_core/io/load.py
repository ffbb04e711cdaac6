"""Build a model without memory for its weights, then map them in from disk: never a second copy."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..model.crossdit import CrossDiT
from ..packed.blocks import BLOCKS
from ..packed.layers import packed_layer
from ..vae.flux import FluxVAE
from ..vae.hunyuan import HunyuanVideoVAE
from ..vae.layout import fit, identify_vae
from ..variants import VAESpec, Variant
from .checkpoint import Checkpoint, open_checkpoint
from .identity import Identity, identify
from .listing import some
from .quant import (
    FP8,
    PackedLayer,
    check_formats,
    hold_packed,
    is_finite_packed,
    is_quant_entry,
    packed_entries,
    packing_of,
    read,
    scaled_weights,
)
from .signature import OTHER_VAE, VAE, describe, recognise

FULL_SCAN_BYTES = 256_000_000  # files up to this size are searched for NaN and Inf completely
SAMPLE = 4096  # larger files: elements looked at at both ends of every tensor

VAES = {"hunyuan": HunyuanVideoVAE, "flux": FluxVAE}
VAE_KEY = "kandinsky5.vae"  # safetensors metadata: JSON of VAESpec


class LoadedCrossDiT(NamedTuple):
    """A transformer with its weights, the settings it is meant to run with, and how it was recognised."""

    model: CrossDiT
    variant: Variant
    identity: Identity


class LoadedVAE(NamedTuple):
    """An autoencoder with its weights and its numbers."""

    vae: HunyuanVideoVAE | FluxVAE
    spec: VAESpec


def load_crossdit(
    path: str | os.PathLike[str],
    *,
    ops: Any = nn,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    variant: str | None = None,
    check_finite: bool | None = None,
) -> LoadedCrossDiT:
    """Load a CrossDiT from a safetensors or GGUF file, a sharded index or a diffusers folder.

    `dtype` None keeps the dtype of every stored tensor (mixed files stay mixed); weights that are stored packed (fp8,
    GGUF blocks) stay so whatever it says, in layers that unpack them on use. `device` None leaves the weights mapped
    from disk, so that the operating system shares and evicts them. `variant` overrides the guess of `identify`.
    `check_finite` True searches all weights for NaN and Inf, False none, None all up to 256 MB and samples beyond.
    """
    checkpoint = open_checkpoint(path)
    identity = identify(checkpoint, variant)
    model = CrossDiT(identity.spec, ops=ops, device="meta")
    expected = model if ops is nn else CrossDiT(identity.spec, device="meta")
    fill(model, checkpoint, expected, dtype=dtype, device=device, check_finite=check_finite)
    return LoadedCrossDiT(model, identity.variant, identity)


def load_vae(
    path: str | os.PathLike[str],
    *,
    ops: Any = nn,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    check_finite: bool | None = None,
) -> LoadedVAE:
    """Load a HunyuanVideo or FLUX autoencoder in any layout: diffusers folder or file, original, ComfyUI.

    Small autoencoders of the same kind need `norm_num_groups` in their config.json or, as JSON, in the metadata entry
    `kandinsky5.vae`. The other arguments are those of `load_crossdit`.
    """
    checkpoint = open_checkpoint(path, part="vae")
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    try:
        spec, names = identify_vae(shapes, settings=_vae_settings(checkpoint))
    except CheckpointError as error:
        found = recognise(shapes)
        place = f" {describe(shapes)}" if found is not None and found.advice not in (VAE, OTHER_VAE) else ""
        raise CheckpointError(f"{checkpoint.path}: {error}{place}") from error
    kind = VAES[spec.kind]
    vae = kind(spec, ops=ops, device="meta")
    expected = vae if ops is nn else kind(spec, device="meta")
    fill(
        vae,
        checkpoint,
        expected,
        names=names,
        adapt=fit,
        dtype=dtype,
        device=device,
        check_finite=check_finite,
    )
    return LoadedVAE(vae, spec)


def fill(
    model: nn.Module,
    checkpoint: Checkpoint,
    expected: nn.Module,
    *,
    names: Mapping[str, str] | None = None,
    adapt: Callable[[Tensor, tuple[int, ...]], Tensor] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    check_finite: bool | None = None,
    layer: PackedLayer | None = None,
) -> None:
    """Assign a checkpoint's tensors to a model built on the meta device.

    `expected` is the same model made of torch.nn layers: it says which names and shapes must come. `names` maps
    the stored names to use to the model's; `adapt` may view a stored tensor in the model's shape without a copy.
    `layer` makes what takes a layer's place whose weight is stored packed; None: ours for a model of torch.nn layers,
    and a host's layers are left to take such weights up themselves.
    Any difference raises one `CheckpointError` that lists all of them.
    """
    names = names or {name: name for name in checkpoint.tensors}
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.state_dict().items()}
    # Layers of a host that know these take them up while loading.
    extras = {name for name in names if is_quant_entry(name)}
    weights = {stored: name for stored, name in names.items() if stored not in extras}
    found = {
        name: _fitted_shape(checkpoint.shape(stored), wanted.get(name, ()), adapt is not None)
        for stored, name in weights.items()
    }
    if model is expected:
        layer = layer or packed_layer
    compare_names(checkpoint, wanted, found, packed=() if layer else scaled_weights(names.values()))
    held = {}
    if layer:
        check_formats(checkpoint, weights)
        held = hold_packed(model, expected, checkpoint, weights, dtype, layer)
    whole = checkpoint.nbytes <= FULL_SCAN_BYTES if check_finite is None else check_finite
    tensors = {}
    for stored, name in (weights if layer else names).items():
        if check_finite is not False and not _is_finite_stored(checkpoint, stored, whole):
            raise CheckpointError(f"{checkpoint.path}: {stored} contains NaN or Inf. The file is damaged or its "
                                  "training diverged; use another one.")  # fmt: skip
        if stored in held:
            tensors |= {key: value.to(device) for key, value in packed_entries(checkpoint, stored, name)}
            continue
        # A weight with a scale means nothing in another dtype; the host's layer that knows the scale converts it.
        is_theirs = stored in extras or (extras and not layer and checkpoint.dtype(stored) in FP8)
        tensor = checkpoint.tensor(stored) if is_theirs or not layer else read(checkpoint, stored, dtype)
        if adapt is not None and stored not in extras:
            tensor = adapt(tensor, wanted[name])
        if not is_theirs:
            tensor = tensor.to(device=device, dtype=_target_dtype(tensor, dtype or (torch.bfloat16 if held else None)))
        tensors[name] = tensor
    try:
        outcome = model.load_state_dict(tensors, strict=False, assign=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reasons = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise CheckpointError(_report(checkpoint, {"refused by their layers": reasons})) from error
    if outcome.missing_keys or outcome.unexpected_keys:
        raise CheckpointError(_report(checkpoint, {
            "missing": outcome.missing_keys, "unexpected": outcome.unexpected_keys,
        }))  # fmt: skip


def compare_names(
    checkpoint: Checkpoint,
    wanted: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    *,
    packed: Collection[str] = (),
) -> None:
    """Raise one `CheckpointError` with every missing, unexpected and wrongly shaped tensor.

    The shapes of `packed` weights are left to the layers that know their format.
    """
    differences = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {list(found[name])} instead of {list(wanted[name])}"
            for name in sorted((wanted.keys() & found.keys()).difference(packed))
            if found[name] != wanted[name]
        ],
    }
    if any(differences.values()):
        raise CheckpointError(_report(checkpoint, differences))


def is_finite(tensor: Tensor, whole: bool) -> bool:
    """Whether a tensor is free of NaN and Inf; not `whole` looks at both ends only."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    flat = tensor.reshape(-1)
    parts = (flat,) if whole or flat.numel() <= 2 * SAMPLE else (flat[:SAMPLE], flat[-SAMPLE:])
    # min and max carry NaN and Inf along without a mask as large as the tensor.
    return all(
        torch.isfinite(bound).item()
        for part in parts
        for bound in torch.aminmax(part.to(torch.float16) if part.dtype in FP8 else part)
    )


def _vae_settings(checkpoint: Checkpoint) -> dict[str, object]:
    """Numbers that no tensor shape shows: config.json, overruled by the file's own metadata."""
    try:
        own = json.loads(checkpoint.metadata.get(VAE_KEY, "{}"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{checkpoint.path}: its metadata '{VAE_KEY}' is not JSON: {error}.") from error
    if not isinstance(own, dict):
        raise CheckpointError(f"{checkpoint.path}: its metadata '{VAE_KEY}' is not a JSON object.")
    return {**checkpoint.config, **own}


def _fitted_shape(stored: tuple[int, ...], wanted: tuple[int, ...], adaptable: bool) -> tuple[int, ...]:
    """`wanted` when the two differ only by trailing ones that `adapt` may drop, else what is stored."""
    same = adaptable and stored[: len(wanted)] == wanted and all(side == 1 for side in stored[len(wanted) :])
    return wanted if same else stored


def _is_finite_stored(checkpoint: Checkpoint, name: str, whole: bool) -> bool:
    tensor = checkpoint.tensor(name)
    if checkpoint.tensors[name].dtype in BLOCKS:
        return is_finite_packed(tensor, packing_of(checkpoint, name), None if whole else SAMPLE)
    return is_finite(tensor, whole)


def _target_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _report(checkpoint: Checkpoint, differences: Mapping[str, list[str]]) -> str:
    lines = [f"{checkpoint.path} does not fit the model:"]
    lines += [f"  {len(names)} {what}: {some(names)}" for what, names in differences.items() if names]
    lines.append("The file is incomplete, altered or of another version; download it again.")
    return "\n".join(lines)
