"""MODEL inside ComfyUI: CrossDiT built from `comfy.ops` layers, in core's base model and patcher.

Core's samplers, LoRA loaders, shift, context window, preview, attention and compile nodes work on the result.

Legend: B batch, C channels, T latent frames, H latent rows, W latent columns, N visual tokens, L text tokens,
A heads, E head width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.ldm.common_dit
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ..kandinsky_core.errors import BackendUnavailable, ShapeError
from ..kandinsky_core.io import Identity, fill, identify, open_checkpoint
from ..kandinsky_core.io.checkpoint import Checkpoint
from ..kandinsky_core.io.header import TensorInfo
from ..kandinsky_core.memory.activation import Forward
from ..kandinsky_core.model import CrossDiT
from ..kandinsky_core.model.attention import Attend
from ..kandinsky_core.model.layers import Modulate, computed
from ..kandinsky_core.vae.plan import needed_bytes
from ..kandinsky_core.variants import (
    FLUX_VAE,
    HUNYUAN_VAE,
    VARIANTS,
    CrossDiTSpec,
    VAESpec,
    Variant,
)
from .comfy_packed import PackedPatcher, formats, hosted_layer
from .host import KNOWN_EDIT, SPARSE_HINT
from .preview import NANO_COLORS

TOKEN_ORDER = "kandinsky5_token_order"  # key of the order in which the visual tokens run (`CrossDiT.forward`)
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
INFERENCE_DTYPES = [
    torch.bfloat16,
    torch.float32,
]  # released inference never ran in fp16; it must be asked for


@dataclass(frozen=True, slots=True)
class HostAttend:
    """Visual self-attention through core's attention, so that back-ends and overrides chosen by nodes apply."""

    options: dict[str, Any]  # core's transformer_options of this call
    block: int

    def __call__(self, q_BANE: Tensor, k_BANE: Tensor, v_BANE: Tensor) -> Tensor:
        """Attend. Core's functions give [B,N,A*E], which overrides written for core's own Kandinsky 5 rely on."""
        heads = q_BANE.shape[1]
        self.options["block_index"] = self.block  # a trainer computes blocks again, after the last one has run
        out_BND = optimized_attention(
            q_BANE, k_BANE, v_BANE, heads=heads, skip_reshape=True, transformer_options=self.options
        )
        return out_BND.unflatten(-1, (heads, -1)).transpose(1, 2)


class HostedCrossDiT(CrossDiT):
    """CrossDiT with the constructor and `forward` that core's base model calls."""

    def __init__(
        self,
        *,
        spec: CrossDiTSpec,
        rope_at: Callable[[int, int], tuple[float, float, float]],
        operations: Any,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **_: Any,
    ) -> None:
        super().__init__(spec, ops=operations, device=device, dtype=dtype)
        self.dtype = dtype
        self.rope_at = rope_at
        self.patch_size = spec.patch_size

    def forward(
        self, x: Tensor, timestep: Tensor, context: Tensor, y: Tensor, time_dim_replace: Tensor | None = None,
        transformer_options: dict[str, Any] | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """Run core's wrappers around the network (context windows, caches, block-sparse attention use them)."""
        options = {} if transformer_options is None else transformer_options
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        return comfy.patcher_extension.WrapperExecutor.new_class_executor(
            self.velocity, self, comfy.patcher_extension.get_all_wrappers(kind, options)
        ).execute(
            x, timestep, context, y, time_dim_replace=time_dim_replace, transformer_options=options, **kwargs
        )

    def velocity(
        self, x: Tensor, timestep: Tensor, context: Tensor, y: Tensor, time_dim_replace: Tensor | None = None,
        transformer_options: dict[str, Any] | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        """Velocity of `x` [B,C,T,H,W] or [B,C,H,W]; any size: padded to whole patches, and cut back.

        `time_dim_replace` [B,c,t,H,W] (model units) is written over the first channels and frames.
        """
        options = {} if transformer_options is None else transformer_options
        x_BCTHW = x if x.ndim == 5 else x.unsqueeze(2)
        rows, columns = x_BCTHW.shape[3:]
        x_BCTHW = comfy.ldm.common_dit.pad_to_patch_size(x_BCTHW, self.patch_size)
        if time_dim_replace is not None:
            known = comfy.ldm.common_dit.pad_to_patch_size(time_dim_replace, self.patch_size)
            x_BCTHW = x_BCTHW.clone()
            x_BCTHW[:, : known.shape[1], : known.shape[2]] = known
        out_BTHWC = super().forward(
            x_BCTHW.movedim(1, -1),
            context,
            y,
            timestep,
            rope_scale=rope_scale_of(options, self.rope_at(rows, columns)),
            attend=[HostAttend(options, index) for index in range(len(self.visual_transformer_blocks))],
            order_N=options.get(TOKEN_ORDER),
            on_block=lambda index, total: options.update(
                block_index=index, total_blocks=total, block_type="double"
            ),
        )
        out_BCTHW = out_BTHWC.movedim(-1, 1)[..., :rows, :columns]
        return out_BCTHW if x.ndim == 5 else out_BCTHW.squeeze(2)

    def run_blocks(
        self, x_BND: Tensor, text_BLD: Tensor, time_BE: Tensor, rope_NP2: Tensor, attend: Sequence[HostAttend],
        attend_text: Attend, on_block: Any = None, modulate: Modulate = computed,
    ) -> Tensor:  # fmt: skip
        """Run the visual blocks, or what nodes have put in their place (`patches_replace`)."""
        options = attend[0].options
        patches = options.get("patches_replace", {}).get("dit", {})
        if not any(
            ("double_block", index) in patches for index in range(len(self.visual_transformer_blocks))
        ):
            tokens = [x_BND]
            del x_BND  # a name here would keep the first block's input alive while all blocks run
            return super().run_blocks(
                tokens.pop(), text_BLD, time_BE, rope_NP2, attend, attend_text, on_block, modulate
            )
        total = len(self.visual_transformer_blocks)
        for index, block in enumerate(self.visual_transformer_blocks):
            on_block(index, total)

            def original(args: dict[str, Any], block: Any = block, index: int = index) -> dict[str, Tensor]:
                state = (args["x"], args["context"], args["time_embed"], args["freqs"])
                return {"x": block(*state, HostAttend(args["transformer_options"], index), attend_text, modulate)}

            args = {
                "x": x_BND, "context": text_BLD, "time_embed": time_BE, "freqs": rope_NP2,
                "transformer_options": options,
            }  # fmt: skip
            patch = patches.get(("double_block", index))
            x_BND = (original(args) if patch is None else patch(args, {"original_block": original}))["x"]
        return x_BND


def rope_scale_of(options: dict[str, Any], preset: tuple[float, float, float]) -> tuple[float, float, float]:
    """Return the divisors of positions: core's ScaleROPE node replaces the preset; its shifts change nothing here.

    Rotary attention sees differences of positions only, so a constant shift cancels.
    """
    chosen = options.get("rope_options")
    if chosen is None:
        return preset
    t, y, x = (chosen.get(f"scale_{axis}", 1.0) for axis in "tyx")
    return (1 / t, 1 / y, 1 / x)


def own_preview(latents: comfy.latent_formats.LatentFormat, spec: VAESpec) -> None:
    """Replace core's preview colours, which do not fit another autoencoder; an unknown one gets no preview."""
    latents.latent_rgb_factors, latents.latent_rgb_factors_bias = NANO_COLORS.get(spec, (None, None))
    latents.taesd_decoder_name = None


class FluxUnshifted(comfy.latent_formats.Flux):
    """FLUX latents as Kandinsky 5 uses them: scaled, not shifted; preview colours follow."""

    def __init__(self, spec: VAESpec) -> None:
        super().__init__()
        shift = self.shift_factor * spec.scaling_factor
        self.scale_factor = spec.scaling_factor
        self.shift_factor = 0.0
        if spec.block_out_channels != FLUX_VAE.block_out_channels:
            own_preview(self, spec)
            return
        sums = [sum(channel) for channel in zip(*self.latent_rgb_factors, strict=True)]
        self.latent_rgb_factors_bias = [
            bias - shift * total for bias, total in zip(self.latent_rgb_factors_bias, sums, strict=True)
        ]


class HunyuanScaled(comfy.latent_formats.HunyuanVideo):
    """HunyuanVideo latents with the scale of the variant's autoencoder."""

    def __init__(self, spec: VAESpec) -> None:
        super().__init__()
        self.scale_factor = spec.scaling_factor
        if spec.block_out_channels != HUNYUAN_VAE.block_out_channels:
            own_preview(self, spec)


class K5Config(comfy.supported_models_base.BASE):
    """What core asks about a model, answered from the variant table."""

    unet_extra_config: dict[str, Any] = {}
    supported_inference_dtypes = INFERENCE_DTYPES

    def __init__(self, row: Variant) -> None:
        spec = row.vae
        self.latent_format = lambda: FluxUnshifted(spec) if spec.kind == "flux" else HunyuanScaled(spec)
        super().__init__({"image_model": "kandinsky5", "spec": row.spec, "rope_at": row.rope_at})
        self.row = row
        self.sampling_settings = {"shift": row.shift}


class K5BaseModel(comfy.model_base.Kandinsky5):
    """Core's Kandinsky 5 with our network; conditions for text-to-image, editing and context windows added."""

    def __init__(self, config: K5Config, device: Any = None) -> None:
        # Core's Kandinsky5 class would build core's network; everything else of it is wanted.
        comfy.model_base.BaseModel.__init__(
            self, config, comfy.model_base.ModelType.FLOW, device=device, unet_model=HostedCrossDiT
        )
        self.row = config.row

    def memory_required(self, input_shape: Sequence[int], cond_shapes: Mapping[str, Any] | None = None) -> float:  # noqa: ARG002
        """Return the bytes that core makes room for before a network call on `input_shape` [B,C,(T,)H,W]."""
        batch, _, *cells = input_shape
        t, h, w = self.row.spec.patch_size
        frames, rows, columns = (1, *cells)[-3:]
        forward = Forward(
            spec=self.row.spec,
            batch=batch,
            visual_tok=-(-frames // t) * -(-rows // h) * -(-columns // w),
            text_tok=self.row.qwen_tokens,
            itemsize=comfy.model_management.dtype_size(self.get_dtype_inference()),
            is_cpu=False,  # core's pieces matter on a device only
        )
        return needed_bytes(forward.peak_bytes())

    def concat_cond(self, **kwargs: Any) -> Tensor | None:
        """Return the channels behind the latent: none (T2I), [edit latent | 1] (editing), [0 | known mask] (video)."""
        spec = self.row.spec
        if spec.instruct_type is None:
            return super().concat_cond(**kwargs) if spec.visual_cond else None
        noise = kwargs["noise"]
        image = kwargs.get(KNOWN_EDIT)
        if image is None:
            return torch.zeros_like(noise).repeat_interleave(2, dim=1)[:, : noise.shape[1] + 1]
        if image.shape[1:] != noise.shape[1:]:
            raise ShapeError(
                f"The picture to edit has latent size {tuple(image.shape[1:])}, the latent to sample "
                f"{tuple(noise.shape[1:])} (channels, rows, columns). Use the latent of the same Image Edit node."
            )
        image = comfy.utils.repeat_to_batch_size(self.process_latent_in(image).to(noise), noise.shape[0])
        return torch.cat((image, torch.ones_like(noise)[:, :1]), dim=1)

    def resize_cond_for_context_window(
        self, cond_key: str, cond_value: Any, window: Any, x_in: Tensor, device: Any,
        retain_index_list: Sequence[int] = (),
    ) -> Any:  # fmt: skip
        """Give each context window only those known start frames that lie in it."""
        if cond_key != "time_dim_replace":
            return super().resize_cond_for_context_window(
                cond_key, cond_value, window, x_in, device, retain_index_list=retain_index_list
            )
        known = cond_value.cond
        anchor = getattr(
            window, "causal_anchor_index", None
        )  # an earlier frame that core sets before the window
        frames = [*([anchor] if anchor is not None and anchor >= 0 else []), *window.index_list]
        inside = list(takewhile(lambda frame: frame < known.shape[2], frames))
        return cond_value._copy_with(known[:, :, inside].to(device))


class HostCheckpoint(Checkpoint):
    """A checkpoint whose tensors come through core's loader, which lets dynamic VRAM read weights from the file.

    Scaled weights of older files get the names that core's quantised layers know.
    """

    def __init__(self, opened: Checkpoint) -> None:
        super().__init__(opened.path, opened.tensors, opened.metadata, opened.config)
        loaded = {file: comfy.utils.load_torch_file(os.fspath(file)) for file in self.files}
        stored = {name: loaded[info.file][info.key] for name, info in self.tensors.items()}
        self._values, self.metadata = comfy.utils.convert_old_quants(stored, "", metadata=self.metadata)
        self.tensors = {
            name: self.tensors.get(name) or _new_info(name, value) for name, value in self._values.items()
        }
        self.quantisation = comfy.utils.detect_layer_quantization(self._values, "")

    def tensor(self, name: str) -> Tensor:
        """Return tensor `name` as core's loader gives it."""
        return self._values[name]


def _new_info(name: str, value: Tensor) -> TensorInfo:
    return TensorInfo(Path(), name, tuple(value.shape), "U8", value.nbytes)


def load(path: str, variant: str | None, dtype: str, disable_dynamic: bool = False) -> Any:
    """Load a transformer as a patcher; core calls this again when it needs a second, independent copy."""
    return load_identified(path, variant, dtype, disable_dynamic)[0]


def load_identified(
    path: str, variant: str | None, dtype: str, disable_dynamic: bool = False
) -> tuple[Any, Identity]:
    """Load a transformer as a patcher, and say what it was recognised as."""
    opened = open_checkpoint(path)
    identity = identify(opened, variant)
    is_gguf = opened.is_gguf
    checkpoint = opened if is_gguf else HostCheckpoint(opened)
    quantisation = None if is_gguf else checkpoint.quantisation
    if is_gguf and dtype.startswith("fp8"):
        raise BackendUnavailable(f"{path} is a GGUF file, whose weights stay as they are packed. Set dtype to 'auto'.")
    config = K5Config(identity.variant)
    config.quant_config = quantisation
    load_device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    weights = weight_dtype(checkpoint, dtype, is_packed=is_gguf or quantisation is not None)
    compute = comfy.model_management.unet_manual_cast(
        None if quantisation else weights, load_device, config.supported_inference_dtypes
    )
    if dtype == "fp16" and comfy.model_management.should_use_fp16(load_device, prioritize_performance=False):
        compute = None  # asked for by name
    config.set_inference_dtype(weights, compute, device=load_device)
    config.custom_operations = operations(weights, compute, load_device, config)
    # Core's quantised layers put what they load on the device they were built for; they take no memory before that.
    model = K5BaseModel(config, device="cpu" if quantisation else "meta")
    expected = CrossDiT(identity.spec, device="meta")
    # Published bf16 files keep the modulation in float32; left as stored it costs no copy and loses nothing.
    as_stored = dtype == "auto" and weights == stored_dtype(checkpoint)
    fill(
        model.diffusion_model, checkpoint, expected, dtype=None if as_stored else weights,
        layer=hosted_layer if is_gguf else None,
    )  # fmt: skip
    if not comfy.model_management.is_device_cpu(offload_device):
        model.to(offload_device)
    patcher_class = (
        comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    )
    if is_gguf:
        patcher_class = PackedPatcher
    patcher = patcher_class(model, load_device=load_device, offload_device=offload_device)
    patcher.cached_patcher_init = (load, (path, variant, dtype))
    return patcher, identity


def weight_dtype(checkpoint: Checkpoint, dtype: str, *, is_packed: bool) -> torch.dtype:
    """Return the dtype to hold weights in that are not packed: the named one, or what core picks for the file."""
    if dtype != "auto":
        return DTYPES[dtype]
    stored = stored_dtype(checkpoint)
    return comfy.model_management.unet_dtype(
        model_params=checkpoint.nbytes // stored.itemsize,
        supported_dtypes=INFERENCE_DTYPES,
        weight_dtype=None if is_packed else stored,
    )


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype of the largest tensor."""
    return checkpoint.dtype(max(checkpoint.tensors, key=lambda name: checkpoint.tensors[name].nbytes))


def operations(weights: torch.dtype, compute: torch.dtype | None, device: Any, config: K5Config) -> Any:
    """Return the layer classes core picks, but always ones that cast: time and norms compute in float32."""
    picked = comfy.ops.pick_operations(weights, compute, load_device=device, model_config=config)
    return picked if issubclass(picked, comfy.ops.manual_cast) else comfy.ops.manual_cast


def variant_of(model: Any) -> Variant | None:
    """Return the table row of a MODEL: ours carries it; for core's own loader the first row of that width."""
    base = getattr(model, "model", None)
    if isinstance(base, K5BaseModel):
        return base.row
    if not isinstance(base, comfy.model_base.Kandinsky5):
        return None
    rows = _published(base)
    return next((row for row in rows if row.spec.model_dim == base.diffusion_model.model_dim), rows[0])


def variant_note(model: Any) -> str:
    """Say that core's own loader does not tell which model it loaded, nor whether its width is a published one."""
    row = variant_of(model)
    if row is None or isinstance(model.model, K5BaseModel):
        return ""
    width = model.model.diffusion_model.model_dim
    unknown = "" if width == row.spec.model_dim else f" (no published model has its width, {width})"
    return (
        f"Loaded by ComfyUI's own loader: settings of {row.title} are assumed{unknown}; "
        "set steps, cfg and shift yourself if it is another one."
    )


def _published(base: Any) -> list[Variant]:
    """Rows with published weights of the kind, video or image, that core's class is for."""
    is_image = isinstance(base, comfy.model_base.Kandinsky5Image)
    return [row for row in VARIANTS.values() if (row.vae.kind == "flux") == is_image and row.repo]


def report(identity: Identity, model: Any) -> str:
    """Say what was recognised, the preset and how it is computed."""
    row = identity.variant
    base = model.model
    held = " and ".join((*formats(base), str(base.get_dtype())))
    lines = [
        row.title,
        identity.hint,
        f"Preset: {row.steps} steps, guidance {row.guidance:g}, shift {row.shift:g}, {row.fps} frames per second.",
        f"Weights {held}, computed in {base.get_dtype_inference()} on {model.load_device}.",
    ]
    if row.attention.kind == "nabla":
        lines.append(SPARSE_HINT)
    return "\n".join(lines)
