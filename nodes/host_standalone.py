"""The host without ComfyUI: plain folders, one heavy model in memory at a time, the core's own sampling loop.

MODEL, CLIP and VAE are handles here: they name what to load, and loading happens when a node works with them.

Legend of shape suffixes: B batch, C channels, T frames (pixels or latent), H rows, W columns,
L text tokens, D text width, P pooled width.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kandinsky_core.errors import BackendUnavailable, BudgetError, KandinskyError
from ..kandinsky_core.io import load_vae, open_checkpoint
from ..kandinsky_core.io.quant import packed_formats
from ..kandinsky_core.memory.budget import GB, describe_sampling, make_sample_plan, needed
from ..kandinsky_core.memory.estimate import precision_of, sample_stage
from ..kandinsky_core.memory.measurement import Measurement, free_bytes
from ..kandinsky_core.memory.plan import Plan
from ..kandinsky_core.memory.stream import BlockStream
from ..kandinsky_core.sampling import noise, sample
from ..kandinsky_core.sparse.nabla import AttentionRun
from ..kandinsky_core.text.cache import EmbeddingCache, encode_cached, encoder_hash
from ..kandinsky_core.variants import Variant
from . import standalone_model, standalone_text
from .encode import PERCENT, encode
from .files import is_model_folder
from .host import (
    GGUF_FOLDERS,
    GGUF_SUFFIX,
    LATENTS,
    NF4,
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
    cut_note,
    shown,
)
from .memory import job_of, with_attention
from .standalone_device import DTYPES, device_of, dtype_of
from .standalone_model import ModelHandle
from .standalone_output import Clip, free_paths
from .standalone_text import TextHandle
from .standalone_vae import StandaloneWorkplace, VAEHandle

logger = logging.getLogger("kandinsky5")

MODELS_VARIABLE = "KANDINSKY5_MODELS"
FOLDER_NAMES = {"diffusion_models": ("diffusion_models", "unet"), "text_encoders": ("text_encoders", "clip")}
SAMPLING_CHOICES = ("resident_blocks", "prefetch", "hidden_pieces", "head_groups")  # of a plan, that a result records
ONLY_IN_COMFYUI = {  # keys of a latent that change the result there, and what to do without them
    "noise_mask": "take the mask off the latent",
    "batch_index": "leave out the node that picks from a batch",
}


@dataclass(frozen=True, slots=True)
class Running:
    """The node that runs now, and the fields that files saved by it carry as metadata."""

    node: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


class StandaloneHost(Host):
    """Runs the nodes from the command line, a script or a test."""

    def __init__(
        self,
        *,
        models: Path | None = None,
        output: Path | None = None,
        device: str | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Take the place of ComfyUI's folders: `models` (default $KANDINSKY5_MODELS, else ./models) and `output`.

        `device` None takes the accelerator if there is one; `on_progress(done, total)` is told of the running node.
        """
        self.models = (models or Path(os.environ.get(MODELS_VARIABLE) or "models")).absolute()
        self.output = output or Path("output")
        self.device = device_of(device)
        self.on_progress = on_progress
        self.running = Running()
        self.facts: dict[str, dict[str, Any]] = {}  # what was loaded and sampled, by the node that did it
        self.extra: dict[str, dict[str, Path]] = {}  # files outside the folders: folder key -> name -> path
        self._resident: tuple[Hashable, Any, Sequence[BlockStream]] | None = None
        self._planned: tuple[ModelHandle, ModelHandle] | None = None  # what did not fit whole, and its plan
        self._sampled: tuple[ModelHandle, Plan | None] | None = None  # the last run's model as given, and its plan
        self._measured: Measured | None = None

    # -- files ------------------------------------------------------------------------------------------------

    def filenames(self, folder: str) -> list[str]:
        """Names of the weights files under the folder key, with subfolders."""
        suffixes = (*WEIGHTS_SUFFIXES, *([GGUF_SUFFIX] if folder in GGUF_FOLDERS else []))
        inside = [
            path.relative_to(root).as_posix()
            for root in self._roots(folder)
            for path in root.rglob("*")
            if path.suffix.lower() in suffixes and not _in_model_folder(path, root)
        ]
        return sorted({*self.extra.get(folder, ()), *inside})

    def folders(self, folder: str) -> list[str]:
        """Names of the model folders (with a config.json) under the folder key."""
        found = {
            path.parent.relative_to(root).as_posix()
            for root in self._roots(folder)
            for path in root.rglob("config.json")
            if path.parent != root and is_model_folder(path.parent)
        }
        return sorted(found)

    def locate(self, folder: str, name: str) -> Path | None:
        """Return the path of a name under the folder key, or None."""
        if name in self.extra.get(folder, ()):
            return self.extra[folder][name]
        for root in self._roots(folder):
            path = Path(os.path.normpath(root / name))  # not resolve(): users link weights in from elsewhere
            if root in path.parents and path.exists():
                return path
        return None

    def directory(self, kind: str) -> Path:
        """Return the directory for inputs, outputs, temporary files or the cache."""
        if kind == "cache":
            return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kandinsky5"
        return {"input": Path("input"), "output": self.output, "temp": self.output / "temp"}[kind]

    def latents(self) -> dict[str, Path]:
        """Return the latents that were named by path, then those in the output folder."""
        return {**self.extra.get(LATENTS, {}), **super().latents()}

    def provenance(self, hidden: Any) -> dict[str, Any]:  # noqa: ARG002
        """Return what the headless runner set for the running node."""
        return dict(self.running.metadata)

    def new_path(self, prefix: str, suffix: str, width_px: int, height_px: int) -> Path:  # noqa: ARG002
        """Return the next free name as ComfyUI numbers them."""
        return free_paths(self.output, prefix, suffix, 1)[0]

    def video(self, path: Path, *, fps: float, shape_THW: tuple[int, int, int]) -> tuple[Clip, dict[str, Any]]:
        """Return the clip in its file."""
        clip = Clip(shape_THW=shape_THW, fps=fps, path=path)
        return clip, {"files": [{"path": str(path), **clip.facts()}]}

    def _roots(self, folder: str) -> list[Path]:
        return [self.models / name for name in FOLDER_NAMES.get(folder, (folder,)) if (self.models / name).is_dir()]

    # -- loading ----------------------------------------------------------------------------------------------

    def load_model(self, path: Path, *, variant: str | None, dtype: str) -> LoadedModel:
        """Recognise a transformer file; its weights are read when the sampler needs them."""
        loaded = standalone_model.recognised(path, variant, dtype, self.device)
        held = str(loaded.model.dtype).removeprefix("torch.")
        self._record(model=path.name, variant=loaded.variant.name, dtype=held)
        return loaded

    def load_clip(self, qwen: Path, clip: Path, *, tokenizer: Path | None, dtype: str) -> TextHandle:
        """Name both text encoders; they are read when a prompt is encoded."""
        self._record(text_encoders=[qwen.name, clip.name])
        nf4 = dtype == NF4
        held = dtype_of("auto" if nf4 else dtype, qwen, self.device, part="text_encoder")
        return TextHandle(qwen, clip, tokenizer, held, nf4=nf4)

    def load_vae(self, path: Path, *, dtype: str) -> VAEHandle:
        """Recognise an autoencoder file; its weights are read when something is encoded or decoded."""
        self._record(vae=path.name)
        spec = load_vae(path, check_finite=False).spec  # maps the weights, reads none of them
        return VAEHandle(path, spec.kind, dtype_of(dtype, path, self.device, part="vae"))

    def variant_of(self, model: Any) -> Variant | None:
        """Return the table row of a MODEL handle."""
        return model.variant if isinstance(model, ModelHandle) else None

    def with_attention(self, model: ModelHandle, run: AttentionRun) -> ModelHandle:
        """Return a handle of the same weights with another attention."""
        return replace(model, attention=run)

    def attention_of(self, model: Any) -> AttentionRun | None:
        """Return the attention of a handle."""
        return model.attention if isinstance(model, ModelHandle) else None

    def vae_facts(self, vae: Any) -> VAEFacts | None:
        """Return the kind of a VAE handle."""
        return VAEFacts(vae.kind, vae.path.name) if isinstance(vae, VAEHandle) else None

    def _load(self, handle: Hashable, load: Callable[[], tuple[Any, Sequence[BlockStream]]]) -> Any:
        """Return what `handle` stands for, dropping what was loaded before: one heavy model in memory at a time."""
        if self._resident is None or self._resident[0] != handle:
            self._drop()  # freed before the next one is read
            self._resident = (handle, *load())
        return self._resident[1]

    @property
    def streams(self) -> Sequence[BlockStream]:
        """Return what brings weights of the loaded model to the device while it works."""
        return () if self._resident is None else self._resident[2]

    def _drop(self) -> None:
        """Give back what was loaded; a stream and its model hold each other, so it is taken off first."""
        for stream in self.streams:
            stream.close()
        self._resident = None

    # -- memory -----------------------------------------------------------------------------------------------

    @property
    def is_processor(self) -> bool:
        """Whether the device is the processor."""
        return self.device.type == "cpu"

    def free_bytes(self) -> int:
        """Return what is free on the device; what is loaded makes room for the next."""
        return free_bytes(self.device)

    def memory_mode(self) -> MemoryMode:
        """Say that the plan moves the weights."""
        note = "a model is loaded as a whole if it fits, else blocks travel as a plan says"
        return MemoryMode("the plan", note, host_moves_weights=False)

    def weights_of(self, model: ModelHandle) -> str:
        """Return the precision a handle is loaded in."""
        if packed := packed_formats(open_checkpoint(model.path)):
            return precision_of(packed)
        return next(name for name, dtype in DTYPES.items() if dtype == model.dtype)

    def with_plan(self, model: ModelHandle, plan: Plan, *, measures: bool = False) -> ModelHandle:
        """Return a handle that is loaded and run as the plan says."""
        return replace(model, plan=plan, measures=measures)

    def with_text_plan(self, clip: TextHandle, plan: Plan) -> TextHandle:
        """Return a handle whose towers run as the plan says."""
        return replace(clip, plan=plan)

    def plan_of(self, model: Any) -> Plan | None:
        """Return the plan of a handle."""
        return model.plan if isinstance(model, ModelHandle) else None

    def sampled_by(self, model: Any) -> Plan | None:
        """Return the plan of the last run, which the host may have made."""
        return self._sampled[1] if self._sampled is not None and self._sampled[0] == model else self.plan_of(model)

    def measured(self) -> Measured | None:
        """Return what the last run needed."""
        return self._measured

    # -- work -------------------------------------------------------------------------------------------------
    # Without gradients also when a script calls these directly: a kept graph would hold all activations.

    @torch.no_grad()
    def encode_text(
        self, clip: TextHandle, prompt: str, *, template: str, max_tokens: int, images: Sequence[Tensor] = ()
    ) -> EncodedText:
        """Encode one prompt with the released template."""
        options = {"tokenizer_path": clip.tokenizer, "dtype": clip.dtype, "nf4": clip.nf4}
        text = encode_cached(
            EmbeddingCache(self.directory("cache") / "text"),
            encoder_hash(clip.qwen, clip.clip, **options),
            lambda: self._load(clip, lambda: standalone_text.load(clip, self.device)),
            prompt,
            template,
            images=shown(images),
            max_tokens=max_tokens,
        )
        self._record(prompts=[*self.facts.get(self.running.node, {}).get("prompts", ()), prompt])
        conditioning = [[text.features_LD[None].float().cpu(), {"pooled_output": text.pooled_P[None].float().cpu()}]]
        return EncodedText(conditioning, text.tokens, text.dropped, cut_note(text))

    @torch.no_grad()
    def sample(self, model: ModelHandle, request: SampleRequest) -> Tensor:
        """Run the core's flow-matching loop."""
        if request.sampler_name != "euler":
            raise BackendUnavailable(
                f"Sampler '{request.sampler_name}' works inside ComfyUI only. Outside it use 'euler'."
            )
        for key, remedy in ONLY_IN_COMFYUI.items():
            if request.latent.get(key) is not None:
                raise BackendUnavailable(
                    f"The latent carries '{key}', which the sampler outside ComfyUI does not read. "
                    f"Run this in ComfyUI, or {remedy}."
                )
        asked, model = model, self._fitting(model, request)
        self._sampled = (asked, model.plan)
        row = model.variant
        transformer = self._load(model, lambda: standalone_model.load(model, self.device))
        raw = request.latent["samples"]
        is_image = raw.ndim == 4
        raw_BCTHW = raw.unsqueeze(2) if is_image else raw
        start_BCTHW = raw_BCTHW.to(self.device, torch.float32) * row.vae.scaling_factor
        known = standalone_model.known(request.positive, row, self.device)
        velocity = standalone_model.guided(transformer, model, request, start_BCTHW, known)
        steps = len(request.sigmas) - 1
        if model.plan is not None:
            self._record(plan={name: getattr(model.plan, name) for name in SAMPLING_CHOICES})
        self._record(seed=request.seed, steps=steps, guidance=request.guidance, sigmas_from=float(request.sigmas[0]))
        progress = self.progress(steps)
        with Measurement(self.device, counts=model.measures) as measurement:
            x_BCTHW = sample(
                velocity,
                noise(start_BCTHW.shape, request.seed).to(self.device),
                request.sigmas,
                start_BCTHW=start_BCTHW if raw.any() else None,
                known=known,
                on_step=lambda done, *_: progress.tick(done),
            )
        self._measured = Measured.of(measurement)
        if not x_BCTHW.isfinite().all():
            raise KandinskyError(
                f"{model.path.name} gave NaN or Inf in {model.dtype}. Load it with dtype bf16 or fp32; if it does so "
                "there, too, the file is damaged."
            )
        out = (x_BCTHW / row.vae.scaling_factor).cpu()
        return out.squeeze(2) if is_image else out

    def _fitting(self, model: ModelHandle, request: SampleRequest) -> ModelHandle:
        """Give a model that has no plan one if it does not fit as a whole, and say so."""
        last = None if self._resident is None else self._resident[0]
        if model.plan is not None or (last == model and self.is_processor):  # there what is loaded is not free
            return model
        again = last if last is not None and (model, last) == self._planned else None
        if again is None and last != model:
            self._drop()  # what is free is asked without it
        tokens = max(given[0][0].shape[1] for given in (request.positive, request.negative) if given)
        job = job_of(self, model, model.variant, request.latent, request.guidance, tokens)
        free = again.plan.budget_bytes if again is not None and self.is_processor else self.free_bytes()
        if job is None or not free:  # sizes that are not estimated, devices that do not tell
            return model
        job = with_attention(self, job, model)
        whole = needed(sample_stage(job, Plan(budget_bytes=free)))
        if whole <= free:
            return model
        if again is not None and needed(sample_stage(job, again.plan)) <= free:
            return replace(model, plan=again.plan)
        try:
            plan = make_sample_plan(job, free)
        except BudgetError as error:
            raise BudgetError(
                f"{error} To try all the same, give a larger budget: --budget, or the node Kandinsky 5 Memory Plan."
            ) from error
        logger.warning(
            "%s needs %.1f GB as a whole for this, %.1f GB are free on %s. It runs by a memory plan, with the same "
            "result to rounding. %s.",
            model.path.name, whole / GB, free / GB, self.device, "; ".join(describe_sampling(job, plan)),
        )  # fmt: skip
        self._planned = (model, replace(model, plan=plan))
        return self._planned[1]

    def vae_encode(self, vae: VAEHandle, image_THWC: Tensor) -> Tensor:
        """Encode a clip or pictures."""
        return encode(self.workplace(vae), image_THWC, self.progress(PERCENT).tick)

    def workplace(self, vae: VAEHandle) -> Workplace:
        """Return the autoencoder on the device; what was there before is dropped."""
        network = self._load(vae, lambda: (load_vae(vae.path, dtype=vae.dtype, device=self.device).vae, ()))
        return StandaloneWorkplace(network, self.device, vae.dtype, self._drop)

    def progress(self, total: int) -> Progress:
        """Start a progress bar; cancelling is Python's own KeyboardInterrupt."""
        self._show(0, total)
        return Progress(lambda done: self._show(done, total))

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Return float32 zeros in main memory, where all node outputs are kept."""
        return torch.zeros(shape)

    # -- facts ------------------------------------------------------------------------------------------------

    def versions(self) -> dict[str, str]:
        """Return what else a result depends on."""
        return {"version": _version(), "torch": torch.__version__, "device": self.device.type}

    def _record(self, **facts: Any) -> None:
        self.facts.setdefault(self.running.node, {}).update(facts)

    def _show(self, done: int, total: int) -> None:
        if self.on_progress is not None:
            self.on_progress(done, total)


def _version() -> str:
    try:
        return metadata.version("kandinsky5")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def _in_model_folder(path: Path, root: Path) -> bool:
    """Whether a weights file is a part of a model folder, which is listed by its own name."""
    return path.parent != root and is_model_folder(path.parent)
