"""VAE inside ComfyUI: the core package's autoencoders behind the methods that core's nodes call.

Legend: B batch, C channels, T frames, H rows, W columns (of pixels or latents).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL, AutoencodingEngine
from comfy.ldm.modules.diffusionmodules.model import Decoder
from torch import Tensor

from ..kandinsky_core.io import load_vae
from ..kandinsky_core.shapes import VAE_SPATIAL, VAE_TEMPORAL, latent_frames, pixel_frames
from ..kandinsky_core.vae.flux import FluxVAE
from ..kandinsky_core.vae.footprint import Network, decoder_network, encoder_network, module_bytes
from ..kandinsky_core.vae.hunyuan import HunyuanVideoVAE
from ..kandinsky_core.vae.plan import needed_bytes
from ..kandinsky_core.vae.tiling import WINDOW
from ..kandinsky_core.variants import VAESpec
from .comfy_core_vae import network_of
from .comfy_model import DTYPES
from .host import VAEFacts, Workplace

LATENT_CHANNELS = 16  # of both autoencoders
ALL_BYTES = 1e30  # asked of core's `free_memory`: all there is
WORKING_DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def _bar() -> Any:
    """Return an `on_tile` callback that drives core's progress bar, which also raises core's interruption."""
    bars: list[comfy.utils.ProgressBar] = []

    def on_tile(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if not bars:
            bars.append(comfy.utils.ProgressBar(total))
        bars[0].update_absolute(done, total)

    return on_tile


class HostedVAE(torch.nn.Module):
    """An autoencoder as core's `first_stage_model`: tensors in and out, progress and cancel inside."""

    def __init__(self, vae: HunyuanVideoVAE | FluxVAE) -> None:
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)

    def encode(self, x: Tensor) -> Tensor:
        """Encode pixels, -1...1, to the most likely raw latent."""
        return self.vae.encode(x, on_tile=_bar()).mode()

    def decode(self, z: Tensor, **_: Any) -> Tensor:
        """Decode raw latents to pixels, about -1...1."""
        return self.vae.decode(z, on_tile=_bar())


class K5VAE(comfy.sd.VAE):
    """Core's VAE around one of our autoencoders (core's own constructor recognises published widths only)."""

    file = ""  # name of the weights file

    def __init__(self, model: HostedVAE, spec: VAESpec, dtype: torch.dtype, disable_dynamic: bool) -> None:
        self.spec = spec
        self.first_stage_model = model
        self.vae_dtype = dtype
        self.working_dtypes = WORKING_DTYPES
        self.device = comfy.model_management.vae_device()
        self.output_device = comfy.model_management.intermediate_device()
        self.latent_channels = spec.latent_channels
        self.output_channels = 3
        self.pad_channel_value = None
        self.process_input = lambda image: image * 2 - 1
        self.process_output = lambda image: image.add_(1).div_(2).clamp_(0, 1)
        self.disable_offload = self.not_video = self.handles_tiling = False
        self.size = self.extra_1d_channel = self.format_encoded = None
        self.crop_input = True
        self.audio_sample_rate = 44100
        if spec.kind == "hunyuan":
            self.latent_dim = 3
            self.upscale_ratio = (lambda t: max(0, pixel_frames(t)), VAE_SPATIAL, VAE_SPATIAL)
            self.downscale_ratio = (
                lambda t: max(0, latent_frames(t + 3 - (t + 2) % 4)),
                VAE_SPATIAL,
                VAE_SPATIAL,
            )
            self.upscale_index_formula = self.downscale_index_formula = (
                VAE_TEMPORAL,
                VAE_SPATIAL,
                VAE_SPATIAL,
            )
        else:
            self.latent_dim = 2
            self.upscale_ratio = self.downscale_ratio = VAE_SPATIAL
            self.upscale_index_formula = self.downscale_index_formula = None
        self.memory_used_decode = partial(_pass_bytes, spec, decoder_network(spec), 1)
        self.memory_used_encode = partial(_pass_bytes, spec, encoder_network(spec), VAE_SPATIAL)
        comfy.model_management.archive_model_dtypes(model)
        patcher = (
            comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
        )
        self.patcher = patcher(
            model, load_device=self.device, offload_device=comfy.model_management.vae_offload_device()
        )

    def decode(self, samples_in: Tensor, vae_options: dict[str, Any] | None = None) -> Tensor:
        """Decode raw latents; a picture [B,C,H,W] is a clip of one frame to a video VAE."""
        return super().decode(self._clips(samples_in), vae_options or {})

    def decode_tiled(self, samples: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Decode in core's tiles what `decode` takes."""
        return super().decode_tiled(self._clips(samples), *args, **kwargs)

    def _clips(self, samples: Tensor) -> Tensor:
        return samples.unsqueeze(2) if self.latent_dim == 3 and samples.ndim == 4 else samples


def _pass_bytes(spec: VAESpec, network: Network, cell: int, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the memory for one pass over latents (`cell` 1) or pixels (`cell` 8) [B,C,(T,)H,W]: a window at most."""
    frames, rows, columns = (1, *shape[2:])[-3:]
    latents = min(frames if cell == 1 else latent_frames(frames), WINDOW)
    live = module_bytes(spec, network, dtype.itemsize, latents, max(1, rows // cell), max(1, columns // cell))
    return needed_bytes(shape[0] * live)


def load(path: str, dtype: str, disable_dynamic: bool = False) -> K5VAE:
    """Load an autoencoder of either kind from any layout."""
    device = comfy.model_management.vae_device()
    held = DTYPES[dtype] if dtype != "auto" else comfy.model_management.vae_dtype(device, WORKING_DTYPES)
    # Layers that cast: weights stay where core puts them, and follow the input's dtype and device.
    loaded = load_vae(path, ops=comfy.ops.manual_cast, dtype=held)
    vae = K5VAE(HostedVAE(loaded.vae), loaded.spec, held, disable_dynamic)
    vae.file = Path(path).name
    vae.patcher.cached_patcher_init = (_load_patcher, (path, dtype))
    return vae


def _load_patcher(path: str, dtype: str, disable_dynamic: bool = False) -> Any:
    """Load again and return the patcher (core wants it to make independent copies)."""
    return load(path, dtype, disable_dynamic).patcher


def facts(vae: Any) -> VAEFacts | None:
    """Return the kind of a VAE of ours, or of core's by its network: 16 channels alone are also Wan's and others'.

    Stable Diffusion 3's has FLUX's very layers, so it cannot be told from it.
    """
    if isinstance(vae, K5VAE):
        return VAEFacts(vae.spec.kind, vae.file)
    if getattr(vae, "latent_channels", None) != LATENT_CHANNELS:
        return None
    network = vae.first_stage_model
    if isinstance(network, AutoencoderKL):
        is_video = isinstance(network.post_quant_conv, torch.nn.Conv3d)
        return VAEFacts("hunyuan") if is_video and vae.temporal_compression_decode() == VAE_TEMPORAL else None
    is_image = type(network) is AutoencodingEngine and type(network.decoder) is Decoder and vae.latent_dim == 2
    return VAEFacts("flux") if is_image else None


class ComfyWorkplace(Workplace):
    """A VAE, ours or core's, whose weights core moves.

    Both compute in our graph: core's HunyuanVideo decoder has no causal mask, its encoder shifts the frames of clips.
    """

    def __init__(self, vae: Any) -> None:
        self._vae = vae
        self.device, self.dtype = vae.device, vae.vae_dtype
        is_ours = isinstance(vae, K5VAE)
        self.network = vae.first_stage_model.vae if is_ours else network_of(vae.first_stage_model)

    def make_room(self, needed_bytes: int) -> None:
        """Let core load the weights and unload other models as far as needed."""
        comfy.model_management.load_models_gpu(
            [self._vae.patcher], memory_required=needed_bytes, force_full_load=self._vae.disable_offload
        )

    def free_bytes(self) -> int:
        """Return what core counts as free."""
        return int(self._vae.patcher.get_free_memory(self.device))

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Ask core, too: it clears the error that some devices keep."""
        return comfy.model_management.is_oom(error) or super().is_out_of_memory(error)

    def release(self) -> None:
        """Unload every model but this one and return cached blocks."""
        loaded = comfy.model_management.current_loaded_models
        own = [model for model in loaded if model.model is self._vae.patcher]
        comfy.model_management.free_memory(ALL_BYTES, self.device, keep_loaded=own)
        comfy.model_management.soft_empty_cache()

    def to_processor(self) -> None:
        """Let core unload this one, too; where it keeps unloaded weights on the device, move them."""
        comfy.model_management.free_memory(ALL_BYTES, self.device)
        comfy.model_management.soft_empty_cache()
        self.device = torch.device("cpu")
        if any(weight.device.type not in ("cpu", "meta") for weight in self.network.parameters()):
            self.network.to(self.device)
