"""The host that is ComfyUI: core's folders, memory management, samplers, previews and progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import comfy.cli_args
import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import folder_paths
import latent_preview
import torch
from torch import Tensor

from ..kandinsky_core.errors import KandinskyError
from ..kandinsky_core.memory.measurement import Measurement
from ..kandinsky_core.memory.plan import Plan
from ..kandinsky_core.sparse.nabla import AttentionRun
from ..kandinsky_core.text.cache import EmbeddingCache
from ..kandinsky_core.variants import Variant
from . import comfy_attention, comfy_clip, comfy_model, comfy_plan, comfy_vae
from .comfy_io import InputImpl
from .encode import PERCENT, encode
from .files import is_model_folder
from .host import (
    GGUF_FOLDERS,
    GGUF_SUFFIX,
    KNOWN_FRAMES,
    WEIGHTS_SUFFIXES,
    EncodedText,
    Host,
    LoadedModel,
    Measured,
    MemoryMode,
    Progress,
    SampleRequest,
    VAEFacts,
    Workplace,
)

TIME_UNIT = 1000  # the network is told a time of 0...1000


class ComfyHost(Host):
    """Answers the nodes inside ComfyUI."""

    # -- files ------------------------------------------------------------------------------------------------

    def filenames(self, folder: str) -> list[str]:
        """Return weights files under the folder key, from every configured place."""
        inside = set(self.folders(folder))
        suffixes = (*WEIGHTS_SUFFIXES, GGUF_SUFFIX)
        return [name for name in _listed(folder) if name.lower().endswith(suffixes) and _parent(name) not in inside]

    def folders(self, folder: str) -> list[str]:
        """Return folders that hold one model: weights and the config.json that describes them."""
        parents = {_parent(name) for name in _listed(folder)} - {""}
        roots = [Path(root) for root in folder_paths.get_folder_paths(folder)]
        return sorted(name for name in parents if any(is_model_folder(root / name) for root in roots))

    def locate(self, folder: str, name: str) -> Path | None:
        """Return the path of a listed file or model folder; nothing else is reached, whatever `name` says."""
        name = Path(name).as_posix()
        if name not in self.filenames(folder) and name not in self.folders(folder):
            return None
        found = (Path(root) / name for root in folder_paths.get_folder_paths(folder))
        return next((path for path in found if path.is_file() or is_model_folder(path)), None)

    def directory(self, kind: str) -> Path:
        """Return ComfyUI's directory for `kind`."""
        if kind == "cache":
            return Path(folder_paths.get_system_user_directory("kandinsky5"))
        return Path(folder_paths.get_directory_by_type(kind))

    def provenance(self, hidden: Any) -> dict[str, Any]:
        """Return the prompt and the editor's workflow, as core's save nodes do."""
        if comfy.cli_args.args.disable_metadata or hidden is None:
            return {}
        prompt = {} if hidden.prompt is None else {"prompt": hidden.prompt}
        return {**(hidden.extra_pnginfo or {}), **prompt}

    def new_path(self, prefix: str, suffix: str, width_px: int, height_px: int) -> Path:
        """Return core's next free name, with core's %placeholders% filled in."""
        output = folder_paths.get_output_directory()
        if not folder_paths.is_within_directory(output, str(Path(output, prefix))):
            raise KandinskyError(
                f"filename_prefix {prefix!r} leads out of the output folder. Use a name or a subfolder/name."
            )
        folder, name, counter, *_ = folder_paths.get_save_image_path(prefix, output, width_px, height_px)
        return Path(folder) / f"{name}_{counter:05}_{suffix}"

    def video(self, path: Path, *, fps: float, shape_THW: tuple[int, int, int]) -> tuple[Any, dict[str, Any]]:  # noqa: ARG002
        """Return core's VIDEO over the file, and the preview that core's Save Video shows."""
        place = path.relative_to(folder_paths.get_output_directory())
        subfolder = place.parent.as_posix().removeprefix(".")
        shown = {"filename": place.name, "subfolder": subfolder, "type": "output"}
        return InputImpl.VideoFromFile(str(path)), {"images": [shown], "animated": (True,)}

    # -- loading ----------------------------------------------------------------------------------------------

    def load_model(self, path: Path, *, variant: str | None, dtype: str) -> LoadedModel:
        """Load a transformer into core's base model and patcher."""
        patcher, identity = comfy_model.load_identified(str(path), variant, dtype)
        return LoadedModel(patcher, identity.variant, comfy_model.report(identity, patcher))

    def load_clip(self, qwen: Path, clip: Path, *, tokenizer: Path | None, dtype: str) -> Any:
        """Load both text encoders into core's CLIP."""
        return comfy_clip.load(qwen, clip, tokenizer, dtype)

    def load_vae(self, path: Path, *, dtype: str) -> Any:
        """Load an autoencoder into core's VAE."""
        return comfy_vae.load(str(path), dtype)

    def variant_of(self, model: Any) -> Variant | None:
        """Return the table row of a MODEL, ours or core's."""
        return comfy_model.variant_of(model)

    def variant_note(self, model: Any) -> str:
        """Return that the row is assumed, for what core's own loader loaded."""
        return comfy_model.variant_note(model)

    def vae_facts(self, vae: Any) -> VAEFacts | None:
        """Return the kind of a VAE, ours or core's."""
        return comfy_vae.facts(vae)

    def with_attention(self, model: Any, run: AttentionRun) -> Any:
        """Return a clone that hands its visual self-attention over at sampling time."""
        return comfy_attention.patched(model, run)

    def attention_of(self, model: Any) -> AttentionRun | None:
        """Return what a node before patched in."""
        return comfy_attention.run_of(model)

    def sampler_names(self) -> list[str]:
        """Return core's samplers."""
        return list(comfy.samplers.SAMPLER_NAMES)

    def shift_of(self, model: Any) -> float | None:
        """Return the shift that a node such as ModelSamplingSD3 put on this MODEL."""
        patch = _sampling_patch(model)
        return None if patch is None else float(patch.shift)

    # -- memory -----------------------------------------------------------------------------------------------

    _measured: Measured | None = None

    @property
    def is_processor(self) -> bool:
        """Whether core computes on the processor."""
        return comfy.model_management.is_device_cpu(comfy.model_management.get_torch_device())

    def free_bytes(self) -> int:
        """Return what is free once core has evicted other models."""
        return comfy_plan.free_bytes()

    def memory_mode(self) -> MemoryMode:
        """Return the mode of core's loader."""
        return comfy_plan.mode()

    def weights_of(self, model: Any) -> str:
        """Return how core holds the weights."""
        return comfy_plan.weights_of(model)

    def with_plan(self, model: Any, plan: Plan, *, measures: bool = False) -> Any:
        """Return a clone whose network runs in the plan's pieces; weights stay core's business."""
        return comfy_plan.patched(model, plan, measures)

    def plan_of(self, model: Any) -> Plan | None:
        """Return what a node before patched in."""
        return comfy_plan.plan_of(model)

    def measured(self) -> Measured | None:
        """Return what the last run needed."""
        return self._measured

    # -- work -------------------------------------------------------------------------------------------------

    def encode_text(
        self, clip: Any, prompt: str, *, template: str, max_tokens: int, images: Sequence[Tensor] = ()
    ) -> EncodedText:
        """Encode one prompt."""
        cache = EmbeddingCache(self.directory("cache") / "text")
        return comfy_clip.encode(clip, prompt, template, max_tokens, images, cache)

    def sample(self, model: Any, request: SampleRequest) -> Tensor:
        """Run core's guider and sampler over our sigmas."""
        _sampling_patch(model)
        latent = comfy.sample.fix_empty_latent_channels(model, request.latent["samples"])
        guider = comfy.samplers.CFGGuider(model)
        # A guider needs both prompts; at guidance 1 it leaves the second one out by itself.
        guider.set_conds(request.positive, request.negative or request.positive)
        guider.set_cfg(request.guidance)
        device = comfy.model_management.get_torch_device()
        with Measurement(device, counts=comfy_plan.measures(model)) as measurement:
            samples = guider.sample(
                comfy.sample.prepare_noise(latent, request.seed, request.latent.get("batch_index")),
                latent,
                comfy.samplers.sampler_object(request.sampler_name),
                request.sigmas,
                denoise_mask=request.latent.get("noise_mask"),
                callback=_preview(model, request),
                disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
                seed=request.seed,
            )
        self._measured = Measured.of(measurement)
        return samples.to(
            comfy.model_management.intermediate_device(), comfy.model_management.intermediate_dtype()
        )

    def vae_encode(self, vae: Any, image_THWC: Tensor) -> Tensor:
        """Encode a clip or pictures."""
        latent = encode(self.workplace(vae), image_THWC, self.progress(PERCENT).tick)
        return latent.to(comfy.model_management.intermediate_device(), comfy.model_management.intermediate_dtype())

    def workplace(self, vae: Any) -> Workplace:
        """Return a VAE, ours or core's, under core's memory management."""
        return comfy_vae.ComfyWorkplace(vae)

    def vae_decode(self, vae: Any, samples: Tensor) -> Tensor:
        """Decode as core does."""
        images = vae.decode(samples)
        return images.flatten(0, 1) if images.ndim == 5 else images

    def progress(self, total: int) -> Progress:
        """Start core's progress bar; it raises core's interruption when the user cancelled."""
        bar = comfy.utils.ProgressBar(total)

        def tick(done: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(done, total)

        return Progress(tick)

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Return zeros where core keeps node outputs."""
        return torch.zeros(
            shape,
            device=comfy.model_management.intermediate_device(),
            dtype=comfy.model_management.intermediate_dtype(),
        )


def _preview(model: Any, request: SampleRequest) -> Callable[[int, Tensor, Tensor, int], None]:
    """Return core's step callback, shown the sampled frames: it draws the first one it gets, and a known frame's
    estimate means nothing."""
    callback = latent_preview.prepare_callback(model, len(request.sigmas) - 1)
    known = request.positive[0][1].get(KNOWN_FRAMES)
    if known is None or known.shape[2] >= request.latent["samples"].shape[2]:
        return callback
    return lambda step, x0, x, total: callback(step, x0[:, :, known.shape[2] :], x, total)


def _sampling_patch(model: Any) -> Any:
    """Return the sampling that a node put on this MODEL, or None; only the kind the models were trained for may be.

    Others differ in what the network is told of the time (its unit is 1/1000) or mean another number by shift.
    """
    patch = model.object_patches.get("model_sampling")
    fits = (
        isinstance(patch, comfy.model_sampling.ModelSamplingDiscreteFlow)
        and isinstance(patch, comfy.model_sampling.CONST)
        and patch.multiplier == TIME_UNIT
    )
    if patch is not None and not fits:
        kinds = " + ".join(kind.__name__ for kind in type(patch).__bases__)
        raise KandinskyError(
            f"Another node set the sampling of this model to {kinds}, which Kandinsky 5 was not trained for. "
            "Remove that node; use ModelSamplingSD3 or the shift widget."
        )
    return patch


def _listed(folder: str) -> list[str]:
    """Return what core lists under a folder key, '/' separated on every system, and GGUF files where we read them.

    Core's own keys leave GGUF out, so such files have a key of ours.
    """
    names = folder_paths.get_filename_list(folder)
    if folder in GGUF_FOLDERS:
        key = f"kandinsky5_gguf_{folder}"
        places = folder_paths.get_folder_paths(folder)  # may grow while the server runs
        if folder_paths.folder_names_and_paths.get(key, ([], set()))[0] != places:
            folder_paths.folder_names_and_paths[key] = (places, {GGUF_SUFFIX})
        names = names + folder_paths.get_filename_list(key)
    return [Path(name).as_posix() for name in names]


def _parent(name: str) -> str:
    return Path(name).parent.as_posix().removeprefix(".")
