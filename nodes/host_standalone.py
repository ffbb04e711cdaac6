"""The host without ComfyUI: plain folders, one heavy model in memory at a time, the core's own sampling loop.

MODEL, CLIP and VAE are handles here: they name what to load, and loading happens when a node works with them.

Legend of shape suffixes: B batch, C channels, T frames (pixels or latent), H rows, W columns,
L text tokens, D text width, P pooled width.
"""

from __future__ import annotations

import gc
import logging
import math
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib import metadata
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kandinsky_core.errors import BackendUnavailable, KandinskyError
from ..kandinsky_core.io import identify, load_crossdit, load_vae, open_checkpoint
from ..kandinsky_core.io.mapped import mapping_dtype
from ..kandinsky_core.io.quant import FLOATS, packed_formats
from ..kandinsky_core.memory.estimate import precision_of
from ..kandinsky_core.memory.measurement import Measurement, free_bytes
from ..kandinsky_core.memory.plan import Plan
from ..kandinsky_core.memory.ram import free_ram_bytes
from ..kandinsky_core.memory.stream import BlockStream
from ..kandinsky_core.model import CrossDiT, dense
from ..kandinsky_core.packed.nf4 import NF4 as NF4_BLOCKS
from ..kandinsky_core.sampling import Known, TextCondition, guide, noise, sample, velocity_of
from ..kandinsky_core.sampling.flow import Velocity
from ..kandinsky_core.sampling.streaming import (
    regime_of,
    stream_transformer,
    streams_blocks,
    tabulate,
    weight_dtypes,
)
from ..kandinsky_core.sparse.nabla import AttentionRun, options
from ..kandinsky_core.text import TextEncoder, load_text_encoder
from ..kandinsky_core.text.cache import EmbeddingCache, encode_cached, encoder_hash
from ..kandinsky_core.variants import Variant
from .encode import PERCENT, encode
from .files import is_model_folder
from .host import (
    GGUF_FOLDERS,
    GGUF_SUFFIX,
    KNOWN_EDIT,
    KNOWN_FRAMES,
    LATENTS,
    NF4,
    SPARSE_HINT,
    WEIGHTS_SUFFIXES,
    Conditioning,
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
from .standalone_output import Clip, free_paths

logger = logging.getLogger("kandinsky5")

MODELS_VARIABLE = "KANDINSKY5_MODELS"
FOLDER_NAMES = {"diffusion_models": ("diffusion_models", "unet"), "text_encoders": ("text_encoders", "clip")}
PINNED_SHARE = 0.5  # of the free main memory: page-locked copies of streamed blocks may take it
TEXT_ROOM_BYTES = 1_000_000_000  # CLIP and what a prompt needs while it is encoded
CPU_FLOAT32_BYTES = 1_000_000_000  # weights up to this size are widened on a processor, where float32 is the sure way
FLOAT16_NOTE = (
    "Matrices and attention are float16; the residual stream, modulation and norms are float32, since their values "
    "pass float16's range. If float16 still overflows, sampling says so."
)
ONLY_IN_COMFYUI = {  # keys of a latent that change the result there, and what to do without them
    "noise_mask": "take the mask off the latent",
    "batch_index": "leave out the node that picks from a batch",
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class ModelHandle:
    """MODEL: a transformer file and the table row it runs as."""

    path: Path
    variant: Variant
    dtype: torch.dtype
    attention: AttentionRun | None = field(default=None, compare=False)  # the weights are the same with and without
    plan: Plan | None = None  # None: all weights on the device
    measures: bool = field(default=False, compare=False)  # count tensors on a processor


@dataclass(frozen=True, slots=True)
class TextHandle:
    """CLIP: the two text encoders' files."""

    qwen: Path
    clip: Path
    tokenizer: Path | None
    dtype: torch.dtype
    plan: Plan | None = None  # None: all weights on the device
    nf4: bool = False  # Qwen's linear weights packed into four bits


@dataclass(frozen=True, slots=True)
class VAEHandle:
    """VAE: an autoencoder file."""

    path: Path
    kind: str
    dtype: torch.dtype


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
        self.device = _device(device)
        self.on_progress = on_progress
        self.running = Running()
        self.facts: dict[str, dict[str, Any]] = {}  # what was loaded and sampled, by the node that did it
        self.extra: dict[str, dict[str, Path]] = {}  # files outside the folders: folder key -> name -> path
        self._resident: tuple[Hashable, Any] | None = None
        self._streams: list[BlockStream] = []  # of what is loaded
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
        checkpoint = open_checkpoint(path)
        identity = identify(checkpoint, variant)
        lacks_bf16 = dtype == "auto" and not _has_bf16(self.device)
        handle = ModelHandle(path, identity.variant, torch.float16 if lacks_bf16 else self._dtype(dtype, path))
        row = identity.variant
        self._record(model=path.name, variant=row.name, dtype=str(handle.dtype).removeprefix("torch."))
        report = (
            f"{row.title}\n{identity.hint}\n"
            f"Preset: {row.steps} steps, guidance {row.guidance:g}, shift {row.shift:g}.\n"
            f"Runs on {self.device} in {handle.dtype}."
        )
        if packed := packed_formats(checkpoint):
            report += f" Packed weights stay as they are stored: {', '.join(packed)}."
        if lacks_bf16:
            report += f" ({self.device} does not compute in bfloat16.)"
        if handle.dtype == torch.float16:
            report += f"\n{FLOAT16_NOTE}"
        if row.attention.kind != "full":
            report += f"\n{SPARSE_HINT}"
        return LoadedModel(handle, row, report)

    def load_clip(self, qwen: Path, clip: Path, *, tokenizer: Path | None, dtype: str) -> TextHandle:
        """Name both text encoders; they are read when a prompt is encoded."""
        self._record(text_encoders=[qwen.name, clip.name])
        nf4 = dtype == NF4
        return TextHandle(
            qwen, clip, tokenizer, self._dtype("auto" if nf4 else dtype, qwen, part="text_encoder"), nf4=nf4
        )

    def load_vae(self, path: Path, *, dtype: str) -> VAEHandle:
        """Recognise an autoencoder file; its weights are read when something is encoded or decoded."""
        self._record(vae=path.name)
        spec = load_vae(path, check_finite=False).spec  # maps the weights, reads none of them
        return VAEHandle(path, spec.kind, self._dtype(dtype, path, part="vae"))

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

    def _dtype(self, name: str, path: Path, part: str = "transformer") -> torch.dtype:
        if name == "auto":
            is_small = self.device.type == "cpu" and open_checkpoint(path, part=part).nbytes <= CPU_FLOAT32_BYTES
            return torch.float32 if is_small else torch.bfloat16
        if name == NF4:
            raise BackendUnavailable(f"dtype '{NF4}' is for the text encoder only. Convert a transformer instead.")
        if name not in DTYPES:
            raise BackendUnavailable(
                f"dtype '{name}' works inside ComfyUI only. Outside it use one of: auto, {', '.join(DTYPES)}."
            )
        return DTYPES[name]

    def _load(self, handle: Hashable, load: Callable[[], Any]) -> Any:
        """Return what `handle` stands for, dropping what was loaded before: one heavy model in memory at a time."""
        if self._resident is None or self._resident[0] != handle:
            self._drop()  # freed before the next one is read
            self._resident = (handle, load())
        return self._resident[1]

    def _drop(self) -> None:
        """Give back what was loaded; a stream and its model hold each other, so it is taken off first."""
        while self._streams:
            self._streams.pop().close()
        self._resident = None

    def _transformer(self, model: ModelHandle) -> CrossDiT:
        """Load a transformer as its plan says: onto the device, or mapped with blocks that visit it."""
        row, streams = model.variant, streams_blocks(model.variant.spec, model.plan)
        if streams or model.dtype == torch.float16:  # float16 is not for all weights
            dtype = mapping_dtype(open_checkpoint(model.path), model.dtype)
            transformer = load_crossdit(model.path, variant=row.name, dtype=dtype).model
            self._streams.append(stream_transformer(
                transformer, model.plan or Plan(budget_bytes=0), self.device, lean=streams,
                dtype_of=weight_dtypes(transformer, model.dtype), pinned_bytes=int(free_ram_bytes() * PINNED_SHARE),
            ))  # fmt: skip
        else:
            transformer = load_crossdit(model.path, variant=row.name, dtype=model.dtype, device=self.device).model
        transformer.set_regime(regime_of(model.plan, model.dtype))
        return transformer

    def _text_encoder(self, clip: TextHandle) -> TextEncoder:
        streamed = self._streams_text(clip)
        # No page-locked copies: a prompt reads every layer once or twice, and making them would read all of them, too.
        encoder = load_text_encoder(
            clip.qwen, clip.clip, tokenizer_path=clip.tokenizer, dtype=clip.dtype, nf4=clip.nf4, device=self.device,
            streamed=streamed, prefetch=1 if clip.plan is None else clip.plan.prefetch,
        )  # fmt: skip
        self._streams += encoder.streams
        return encoder

    def _streams_text(self, clip: TextHandle) -> bool:
        """Whether layers of the text encoder travel: as its plan says, without one if they do not fit as a whole."""
        if clip.plan is not None:
            return clip.plan.streams_text
        needed = _text_bytes(clip) + TEXT_ROOM_BYTES
        free = free_bytes(self.device)  # 0 where the device does not tell
        if needed <= free or not free:
            return False
        logger.info(
            "%s needs %.1f GB, %.1f GB are free on %s: its layers visit it one by one, with the same result.",
            clip.qwen.name, needed / 1e9, free / 1e9, self.device,
        )  # fmt: skip
        return True

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
        note = "a model is loaded as a whole, unless a plan lets blocks travel"
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
            lambda: self._load(clip, lambda: self._text_encoder(clip)),
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
        row = model.variant
        transformer = self._load(model, lambda: self._transformer(model))
        raw = request.latent["samples"]
        is_image = raw.ndim == 4
        raw_BCTHW = raw.unsqueeze(2) if is_image else raw
        start_BCTHW = raw_BCTHW.to(self.device, torch.float32) * row.vae.scaling_factor
        known = self._known(request.positive, row)
        rope_scale = row.rope_at(*start_BCTHW.shape[3:])
        velocity = self._guided(transformer, model, request, known, rope_scale, len(start_BCTHW))
        steps = len(request.sigmas) - 1
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

    def _guided(
        self, transformer: Any, model: ModelHandle, request: SampleRequest, known: Known,
        rope_scale: tuple[float, float, float], batch: int,
    ) -> Velocity:  # fmt: skip
        run, blocks = model.attention, model.variant.spec.num_visual_blocks
        texts = [_text(given) for given in (request.positive, request.negative) if given is not None]
        # The weights of the modulation do not travel: their vectors are known before the first step.
        table = None if not streams_blocks(model.variant.spec, model.plan) else tabulate(
            transformer, request.sigmas[:-1], texts, self.device, batch=batch, dtype=model.dtype,
            dtype_of=weight_dtypes(transformer, model.dtype),
        )  # fmt: skip

        def velocity(place: int) -> Velocity:
            def at(token_thw: tuple[int, int, int], t: Tensor) -> dict[str, object]:
                found = {} if run is None else options(
                    run.forward(token_thw, blocks, float(t), self.device), blocks, dense
                )  # fmt: skip
                return found if table is None else found | {"modulate": table.at((float(t), place))}

            return velocity_of(
                transformer, texts[place], dtype=model.dtype, rope_scale=rope_scale, known=known, options_at=at
            )  # fmt: skip

        if run is not None:
            run.begin(request.sigmas.tolist())
        return guide(velocity(0), velocity(1) if len(texts) > 1 else None, request.guidance)

    def _known(self, conditioning: Conditioning, row: Variant) -> Known:
        def given(key: str) -> Tensor | None:
            raw = conditioning[0][1].get(key)
            return None if raw is None else raw.to(self.device, torch.float32) * row.vae.scaling_factor

        edit_BCHW = given(KNOWN_EDIT)
        return Known(given(KNOWN_FRAMES), None if edit_BCHW is None else edit_BCHW.unsqueeze(2))

    def vae_encode(self, vae: VAEHandle, image_THWC: Tensor) -> Tensor:
        """Encode a clip or pictures."""
        return encode(self.workplace(vae), image_THWC, self.progress(PERCENT).tick)

    def workplace(self, vae: VAEHandle) -> Workplace:
        """Return the autoencoder on the device; what was there before is dropped."""
        return StandaloneWorkplace(self, vae)

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


class StandaloneWorkplace(Workplace):
    """An autoencoder alone on the host's device."""

    def __init__(self, host: StandaloneHost, vae: VAEHandle) -> None:
        self._host = host
        self.device, self.dtype = host.device, vae.dtype
        self.network = host._load(vae, lambda: load_vae(vae.path, dtype=vae.dtype, device=host.device).vae)

    def make_room(self, needed_bytes: int) -> None:
        """Nothing is there besides."""

    def free_bytes(self) -> int:
        """Return what the device has left beside the weights, which stay."""
        memory = getattr(torch, self.device.type, None)
        held = memory.memory_allocated(self.device) if hasattr(memory, "memory_allocated") else 0
        return max(0, self._host.free_bytes() - held)

    def release(self) -> None:
        """Collect what is unreachable and return cached blocks."""
        gc.collect()
        memory = getattr(torch, self.device.type, None)  # not all devices have a module
        if hasattr(memory, "empty_cache"):
            memory.empty_cache()

    def to_processor(self) -> None:
        """Move the weights; the next work loads them on the device again."""
        self._host._drop()
        self.network.to("cpu")
        self.device = torch.device("cpu")
        self.release()


def _device(name: str | None) -> torch.device:
    """Return the named device, or the accelerator if there is one, else the processor."""
    if name is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise BackendUnavailable(
            f"Device '{name}' cannot be used here: {reason}. Leave it out to choose one."
        ) from error
    return device


def _has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 by itself; what does not say so does."""
    module = getattr(torch, device.type, None)
    ask = getattr(module, "is_bf16_supported", None)
    if ask is None:
        return True
    with module.device(device) if hasattr(module, "device") else nullcontext():  # it asks the current one
        tells_emulation = "including_emulation" in signature(ask).parameters  # not every back-end
        return ask(including_emulation=False) if tells_emulation else ask()


def _text_bytes(clip: TextHandle) -> int:
    """Return what Qwen's weights take once they are loaded: packed ones as they are stored, the rest in `dtype`."""
    total = 0.0
    for name, info in open_checkpoint(clip.qwen, part="text_encoder").tensors.items():
        if clip.nf4 and len(info.shape) == 2 and "embed" not in name:  # linear layers
            total += math.prod(info.shape) * NF4_BLOCKS.nbytes / NF4_BLOCKS.elements
        elif info.dtype in FLOATS:
            total += math.prod(info.shape) * clip.dtype.itemsize
        else:
            total += info.nbytes
    return int(total)


def _version() -> str:
    try:
        return metadata.version("kandinsky5")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def _in_model_folder(path: Path, root: Path) -> bool:
    """Whether a weights file is a part of a model folder, which is listed by its own name."""
    return path.parent != root and is_model_folder(path.parent)


def _text(conditioning: Conditioning) -> TextCondition:
    if len(conditioning) != 1:
        raise KandinskyError(
            f"The conditioning has {len(conditioning)} parts; outside ComfyUI the sampler takes one. "
            "Do not combine prompts."
        )
    features_BLD, extra = conditioning[0]
    return TextCondition(features_BLD, extra["pooled_output"])
