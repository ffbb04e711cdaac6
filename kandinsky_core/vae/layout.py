"""Which autoencoder a weights file holds and what its tensors are called here: from names and shapes alone."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from ..errors import CheckpointError
from ..variants import FLUX_VAE, HUNYUAN_VAE, VAESpec
from .blocks import check_spec

Shapes = Mapping[str, tuple[int, ...]]
_Number = TypeVar("_Number", int, float)

LEVELS = len(HUNYUAN_VAE.block_out_channels)

_PREFIX = r"(?:(?:state_dict|vae|first_stage_model|module)\.)*"
_ENTRY = re.compile(rf"({_PREFIX})decoder\.conv_in(?:\.conv)?\.weight")

# Files without the decoder's first convolution, by the start of one of their names.
_STRANGERS = (
    (r"decoder\.middle\.0\.residual\.", "the Wan or Qwen-Image autoencoder"),
    (r"(taesd_)?decoder\.(layers\.)?[13]\.", "a tiny preview decoder"),
    (r"encoder\.conv_in\.", "an encoder without its decoder"),
    (r"visual_transformer_blocks\.", "a transformer, not an autoencoder"),
)

# Autoencoders with the very tensors of a published one, by the scaling factor in their config.json.
_TWINS = {1.5305: "the Stable Diffusion 3 autoencoder"}

# LDM (original FLUX, ComfyUI) and older names -> diffusers names, applied in this order.
_RENAMES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"^(?:encoder|decoder)\.((?:post_)?quant_conv)\.", r"\1."),
        (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
        (r"^encoder\.down\.(\d+)\.block\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
        (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
        (r"^(encoder|decoder)\.mid\.block_1\.", r"\1.mid_block.resnets.0."),
        (r"^(encoder|decoder)\.mid\.block_2\.", r"\1.mid_block.resnets.1."),
        (r"^(encoder|decoder)\.mid\.attn_1\.", r"\1.mid_block.attentions.0."),
        (r"\.attentions\.0\.norm\.", ".attentions.0.group_norm."),
        (r"\.attentions\.0\.(?:q|query)\.", ".attentions.0.to_q."),
        (r"\.attentions\.0\.(?:k|key)\.", ".attentions.0.to_k."),
        (r"\.attentions\.0\.(?:v|value)\.", ".attentions.0.to_v."),
        (r"\.attentions\.0\.(?:proj_out|proj_attn)\.", ".attentions.0.to_out.0."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
    )
)
# LDM numbers the decoder's levels from the widest grid, diffusers from the deepest.
_UP = re.compile(r"^decoder\.up\.(\d+)\.(block|upsample)\.")


def convert_name(name: str) -> str:
    """Translate a tensor name without prefix from any known layout to the model's own; others pass unchanged."""
    for pattern, new in _RENAMES:
        name = pattern.sub(new, name)
    return _UP.sub(_reversed_level, name)


def _reversed_level(match: re.Match[str]) -> str:
    level = LEVELS - 1 - int(match[1])
    return f"decoder.up_blocks.{level}." + ("resnets." if match[2] == "block" else "upsamplers.0.")


def fit(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """View a stored tensor in the model's shape if only trailing ones differ (attention kept as convolutions)."""
    extra = tensor.shape[len(shape) :]
    return tensor.reshape(shape) if tensor.shape[: len(shape)] == shape and extra.numel() == 1 else tensor


def identify_vae(
    shapes: Shapes, *, settings: Mapping[str, object] | None = None
) -> tuple[VAESpec, dict[str, str]]:
    """Read the specification of an autoencoder from tensor shapes; return it with {stored name: model's name}.

    `settings` are a file's metadata or a config.json: `norm_num_groups` (not visible in shapes, needed for widths other
    than the published) and `scaling_factor` (with the published widths, another one means another model); a
    `shift_factor` is ignored, as in the released pipelines.
    Files of other autoencoders raise `CheckpointError` with what they look like.
    """
    prefix = _prefix(shapes)
    names = {name: convert_name(name[len(prefix) :]) for name in shapes if name.startswith(prefix)}
    found = {ours: shapes[stored] for stored, ours in names.items()}
    if len(found) < len(names):
        twice = sorted(ours for ours in found if sum(ours == other for other in names.values()) > 1)
        raise CheckpointError(
            f"The file holds {twice[0]} under two names. Two layouts are mixed; use the original file."
        )
    _refuse_foreign({name[len(prefix) :] for name in names}, found)
    video = "decoder.conv_in.conv.weight" in found
    return _spec(HUNYUAN_VAE if video else FLUX_VAE, found, settings or {}), names


def _prefix(names: Collection[str]) -> str:
    for name in names:
        if match := _ENTRY.fullmatch(name):
            return match[1]
    for pattern, title in _STRANGERS:
        if any(re.match(_PREFIX + pattern, name) for name in names):
            raise _foreign(f"looks like {title}")
    raise _foreign(f"has no decoder.conv_in (its first tensor: {min(names, default='none')})")


def _refuse_foreign(stored: set[str], found: Shapes) -> None:
    entry = found.get("decoder.conv_in.conv.weight") or found["decoder.conv_in.weight"]
    latents, sides = (entry[1], len(entry)) if len(entry) > 1 else (0, len(entry))
    norms = [name for name in found if name.startswith("decoder.mid_block.resnets.0.norm1.")]
    if any("norm_layer" in name for name in norms):
        raise _foreign("looks like the CogVideoX autoencoder (norm_layer)")
    if any(name.endswith(".gamma") for name in norms):
        raise _foreign("looks like the Wan or Qwen-Image autoencoder (gamma)")
    if latents == 32 and sides == 5:
        raise _foreign("looks like the HunyuanVideo 1.5 autoencoder (32 latent channels)")
    if sides == 4 and "post_quant_conv.weight" in found:
        raise _foreign(
            f"looks like a Stable Diffusion or FLUX.2 autoencoder ({latents} latent channels, quant convolutions)"
        )
    if latents != HUNYUAN_VAE.latent_channels:
        raise _foreign(f"has {latents} latent channels; both autoencoders of Kandinsky 5 have 16")
    video = "decoder.conv_in.conv.weight" in found
    if sides != (5 if video else 4):
        raise _foreign(
            f"has {sides - 2}-dimensional convolutions under the names of a {'video' if video else '2-D'} one"
        )
    if video and found.get("post_quant_conv.weight", ())[:2] != (latents, latents):
        raise _foreign("has video layers but no 16-channel post_quant_conv")
    if "decoder.mid_block.attentions.0.to_q.weight" not in found:
        raise _foreign("has no attention in the decoder's middle")
    # The widest grid has no upsampler, so it tells how a file counts its levels even if all widths are equal.
    if any(name.startswith("decoder.up.0.upsample.") for name in stored):
        raise _foreign(
            "numbers the decoder's levels the other way round (decoder.up.0 is the deepest), as kandinsky.cpp"
        )


def _spec(published: VAESpec, found: Shapes, settings: Mapping[str, object]) -> VAESpec:
    conv = "conv1.conv.weight" if published.kind == "hunyuan" else "conv1.weight"
    try:
        widths = tuple(
            found[f"decoder.up_blocks.{level}.resnets.0.{conv}"][0] for level in reversed(range(LEVELS))
        )
    except KeyError as error:
        raise CheckpointError(
            f"The autoencoder's file lacks {error.args[0]}. It is incomplete; download it again."
        ) from None
    depth = sum(
        re.fullmatch(rf"decoder\.up_blocks\.0\.resnets\.\d+\.{re.escape(conv)}", name) is not None
        for name in found
    )
    own_widths = widths == published.block_out_channels
    if not own_widths and settings.get("norm_num_groups") is None:
        raise CheckpointError(
            f"An autoencoder of widths {widths} needs norm_num_groups, which shapes do not show. "
            "Put it into the file's metadata or a config.json beside it."
        )
    try:
        spec = replace(
            published,
            block_out_channels=widths,
            layers_per_block=depth - 1,
            norm_num_groups=_positive(int, settings, "norm_num_groups", published.norm_num_groups),
            scaling_factor=_positive(float, settings, "scaling_factor", published.scaling_factor),
        )
        check_spec(spec, published.kind)
    except ValueError as error:
        raise CheckpointError(f"The autoencoder's metadata contradicts its tensors: {error}") from error
    if own_widths and not math.isclose(spec.scaling_factor, published.scaling_factor, rel_tol=1e-3):
        twins = (title for factor, title in _TWINS.items() if math.isclose(spec.scaling_factor, factor))
        raise _foreign(
            f"looks like {next(twins, 'another autoencoder')} with the shapes of ours: its settings say "
            f"scaling_factor {spec.scaling_factor:g}, ours has {published.scaling_factor:g}"
        )
    return spec


def _positive(number: type[_Number], settings: Mapping[str, object], name: str, default: _Number) -> _Number:
    """Read a setting as a finite number above zero; others raise `ValueError`."""
    given = settings.get(name)
    if given is None:
        return default
    value = number(str(given))
    if not 0 < value < math.inf:
        raise ValueError(f"{name} {given!r} is not a finite number above zero.")
    return value


def _foreign(what: str) -> CheckpointError:
    return CheckpointError(
        f"The file {what}. Kandinsky 5 video needs the HunyuanVideo autoencoder (hunyuan_video_vae_bf16.safetensors), "
        "images the FLUX.1 one (ae.safetensors)."
    )
