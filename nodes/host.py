"""The door to the host: everything a node needs from ComfyUI, or from nothing, behind one small interface.

Nodes call `host()` and never import `comfy`. `host_comfy.ComfyHost` answers inside ComfyUI,
`host_standalone.StandaloneHost` everywhere else. Socket values are the host's own: in ComfyUI they are core's MODEL,
CLIP and VAE objects, standalone they are plain handles. CONDITIONING and LATENT have core's structure under both hosts
(see docs/architecture.md).

Legend of shape suffixes: B batch, C channels, T frames (pixels or latent), H rows, W columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kandinsky_core.errors import KandinskyError
from ..kandinsky_core.io.latents import saved_latents
from ..kandinsky_core.memory.measurement import Measurement
from ..kandinsky_core.memory.plan import Plan
from ..kandinsky_core.sparse.nabla import AttentionRun
from ..kandinsky_core.text import TextFeatures
from ..kandinsky_core.text.tokens import CLIP_TOKENS
from ..kandinsky_core.vae.flux import FluxVAE
from ..kandinsky_core.vae.hunyuan import HunyuanVideoVAE
from ..kandinsky_core.variants import Variant
from .comfy_io import INSIDE_COMFYUI

Conditioning = list[list[Any]]  # [[features [1,L,D], {"pooled_output": [1,P], ...}]]
Latent = dict[str, Any]  # {"samples": raw autoencoder latents, ...}

DTYPES = (
    "auto",
    "bf16",
    "fp16",
    "fp32",
    "fp8_e4m3fn",
    "fp8_e5m2",
)  # how weights are held; "auto": the host decides

NF4 = "nf4"  # packed into four bits while it is read
TEXT_DTYPES = (*DTYPES, NF4)  # of Qwen

WEIGHTS_SUFFIXES = (".safetensors", ".sft")
GGUF_SUFFIX = ".gguf"
GGUF_FOLDERS = ("diffusion_models", "text_encoders")  # folder keys under which GGUF files are listed: no autoencoders

# Conditioning keys of what is given besides text (core's names, so that core's KSampler reads them too).
KNOWN_FRAMES = "time_dim_replace"  # raw latents [1,16,t,h,w] that the first t latent frames are pinned to
KNOWN_MASK = "concat_mask"  # [1,1,T,h,w]: 0 where known, 1 where generated
KNOWN_EDIT = "concat_latent_image"  # raw latent [1,16,h,w] of the picture that an editing model changes

LATENT_FACTS = "kandinsky5"  # key of a latent: {"variant", "fps", "seed"} of the run that made it, as far as known
LATENTS = "latents"  # folder in the output folder where latents are kept before they are decoded


SPARSE_HINT = (
    "Trained with block-sparse attention: connect Kandinsky 5 NABLA Attention. Without it attention is dense, which "
    "is slower and only close to what the weights were trained with."
)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A MODEL with what its file was recognised as."""

    model: Any
    variant: Variant
    report: str  # one or several lines for the user: variant, how it was recognised, the preset, hints


@dataclass(frozen=True, slots=True)
class EncodedText:
    """CONDITIONING of one prompt with its token count."""

    conditioning: Conditioning
    tokens: int
    dropped: int  # tokens cut off because the prompt was longer than the variant takes
    note: str = ""  # what a user should know (for example: another implementation's template was used)


def cut_note(text: TextFeatures) -> str:
    """Say what CLIP's 77 tokens left out of a prompt, "" when nothing; `EncodedText.dropped` tells of Qwen's limit."""
    if not text.clip_dropped:
        return ""
    rest = "" if text.dropped else "; Qwen reads the whole prompt"
    return f"CLIP keeps {CLIP_TOKENS} tokens of the prompt and drops {text.clip_dropped}{rest}"


def shown(images: Sequence[Tensor]) -> list[Tensor]:
    """Return pictures [H,W,3] in 0…1 as the text encoder takes them: [3,H,W] in -1…1."""
    return [image[..., :3].movedim(-1, 0).float() * 2 - 1 for image in images]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """One sampling run; everything is resolved, no presets are left."""

    positive: Conditioning
    negative: Conditioning | None  # None: no second pass (guidance is 1)
    latent: Latent  # raw latents [B,16,T,H,W] or [B,16,H,W]; zeros mean "start from noise"
    seed: int
    sigmas: Tensor  # [steps + 1] float32, descending from ≤ 1 to 0
    guidance: float
    sampler_name: str = "euler"


@dataclass(frozen=True, slots=True)
class Progress:
    """A progress bar of the host. `tick(done)` raises the host's interruption when the user cancelled."""

    tick: Callable[[int], None]


@dataclass(frozen=True, slots=True)
class VAEFacts:
    """What nodes must know about a VAE of either origin."""

    kind: str  # "hunyuan" (video) or "flux" (image)
    file: str = ""  # name of the weights file, "" where it is not known


@dataclass(frozen=True, slots=True)
class MemoryMode:
    """Who moves a model's weights, and how."""

    name: str
    note: str  # for the user
    host_moves_weights: bool  # then a plan chooses pieces and tiles only


@dataclass(frozen=True, slots=True)
class Measured:
    """Device memory of the last sampling run."""

    peak_bytes: int
    with_weights: bool  # all that was in use on the device; False: live tensors of the run, counted one by one

    @classmethod
    def of(cls, measurement: Measurement) -> Measured | None:
        """Return what a measurement found, None when it found nothing."""
        if measurement.peak_bytes is None:
            return None
        return cls(measurement.peak_bytes, measurement.with_weights)


OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")


class Workplace(ABC):
    """An autoencoder at work: the core's network on a device, and what the host can do about that device's memory."""

    network: HunyuanVideoVAE | FluxVAE
    device: torch.device
    dtype: torch.dtype

    @abstractmethod
    def make_room(self, needed_bytes: int) -> None:
        """Bring the weights to the device; other models leave it as far as `needed_bytes` besides the weights asks."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Return what may be used on the device now; 0 where it cannot be told."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether an exception says that memory ran out; the processor's allocator has no kind of its own for it."""
        return isinstance(error, MemoryError) or any(words in str(error).lower() for words in OUT_OF_MEMORY)

    @abstractmethod
    def release(self) -> None:
        """Give back all memory that this autoencoder does not need: other models, cached blocks."""

    @abstractmethod
    def to_processor(self) -> None:
        """Move the network to the processor for the rest of this work; `device` says so from then on."""


class Host(ABC):
    """What a host offers to the nodes. Every method may raise `KandinskyError` with a message for the user."""

    # -- files ------------------------------------------------------------------------------------------------

    @abstractmethod
    def filenames(self, folder: str) -> list[str]:
        """Names (with subfolders, '/' separated) of the model files under ComfyUI's folder key `folder`, sorted."""

    @abstractmethod
    def folders(self, folder: str) -> list[str]:
        """Names of model *folders* (they hold a config.json) under the folder key `folder`, sorted."""

    @abstractmethod
    def locate(self, folder: str, name: str) -> Path | None:
        """Return the file or model folder that `name` means, or None; never a path outside the configured folders."""

    @abstractmethod
    def directory(self, kind: str) -> Path:
        """Return the directory for `kind`: "input", "output", "temp" or "cache" (not created)."""

    def latents(self) -> dict[str, Path]:
        """Return the latents that can be loaded by name, newest first."""
        return {path.name: path for path in saved_latents(self.directory("output") / LATENTS)}

    @abstractmethod
    def provenance(self, hidden: Any) -> dict[str, Any]:
        """Return the metadata that a file saved by the running node carries; `hidden` is the node's `cls.hidden`."""

    @abstractmethod
    def new_path(self, prefix: str, suffix: str, width_px: int, height_px: int) -> Path:
        """Return the next free numbered name for `prefix` in the output folder; a prefix that leads out is refused."""

    @abstractmethod
    def video(self, path: Path, *, fps: float, shape_THW: tuple[int, int, int]) -> tuple[Any, dict[str, Any]]:
        """Return a clip that was written to `path` as VIDEO, and what the node that wrote it shows."""

    # -- loading ----------------------------------------------------------------------------------------------

    @abstractmethod
    def load_model(self, path: Path, *, variant: str | None, dtype: str) -> LoadedModel:
        """Load a transformer as MODEL. `variant` None: recognise it; `dtype` is one of `DTYPES`."""

    @abstractmethod
    def load_clip(self, qwen: Path, clip: Path, *, tokenizer: Path | None, dtype: str) -> Any:
        """Load both text encoders as CLIP; `tokenizer` None: the one beside the weights or the built-in one."""

    @abstractmethod
    def load_vae(self, path: Path, *, dtype: str) -> Any:
        """Load an autoencoder as VAE."""

    @abstractmethod
    def variant_of(self, model: Any) -> Variant | None:
        """Return the table row a MODEL belongs to (ours or core's own), None when it is not Kandinsky 5."""

    @abstractmethod
    def vae_facts(self, vae: Any) -> VAEFacts | None:
        """Return what is known of a VAE, None when it is neither HunyuanVideo's nor FLUX's."""

    def sampler_names(self) -> list[str]:
        """Return the integration methods `sample` offers; "euler" is always among them."""
        return ["euler"]

    def variant_note(self, model: Any) -> str:  # noqa: ARG002
        """Return what a user should know about how `variant_of` was answered, "" when the row is certain."""
        return ""

    def shift_of(self, model: Any) -> float | None:  # noqa: ARG002
        """Return the schedule shift another node set on this MODEL, None when the variant's preset holds."""
        return None

    @abstractmethod
    def with_attention(self, model: Any, run: AttentionRun) -> Any:
        """Return a copy of MODEL whose visual self-attention is `run`'s; a run that was there before is replaced."""

    @abstractmethod
    def attention_of(self, model: Any) -> AttentionRun | None:
        """Return the run that `with_attention` gave this MODEL or one it was copied from, None when there is none."""

    # -- memory -----------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def is_processor(self) -> bool:
        """Whether models run on the processor, so that device memory is main memory."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Return the device memory a run may use once other models have made room; 0 where it cannot be told."""

    @abstractmethod
    def memory_mode(self) -> MemoryMode:
        """Return who moves weights."""

    @abstractmethod
    def weights_of(self, model: Any) -> str:
        """Return how a MODEL's weights are held, a name of `memory.estimate.PRECISIONS`."""

    @abstractmethod
    def with_plan(self, model: Any, plan: Plan, *, measures: bool = False) -> Any:
        """Return a copy of MODEL that runs as `plan` says.

        `measures`: count live tensors of each run on a processor too, which costs time; a device is always measured.
        """

    def with_text_plan(self, clip: Any, plan: Plan) -> Any:  # noqa: ARG002
        """Return a CLIP that runs as `plan` says; where the host moves weights it is the one that was given."""
        return clip

    @abstractmethod
    def plan_of(self, model: Any) -> Plan | None:
        """Return the plan that `with_plan` gave this MODEL or one it was copied from, None when there is none."""

    def sampled_by(self, model: Any) -> Plan | None:
        """Return the plan that the last run of MODEL followed, of its own or one that the host made for it."""
        return self.plan_of(model)

    @abstractmethod
    def measured(self) -> Measured | None:
        """Return what the last sampling run needed, None when it was not measured."""

    # -- work -------------------------------------------------------------------------------------------------

    @abstractmethod
    def encode_text(
        self, clip: Any, prompt: str, *, template: str, max_tokens: int, images: Sequence[Tensor] = ()
    ) -> EncodedText:
        """Encode one prompt; features keep their exact length (no padding).

        `images` are pictures [H,W,3] in 0…1 that Qwen sees after the prompt (template image_edit), of the size that
        is generated.
        """

    @abstractmethod
    def sample(self, model: Any, request: SampleRequest) -> Tensor:
        """Run the sampler and return raw latents, with noise drawn on the CPU from the seed, progress, preview, cancel.

        Known frames (`KNOWN_FRAMES`) condition every step; replacing them in the result is the node's work.
        """

    @abstractmethod
    def vae_encode(self, vae: Any, image_THWC: Tensor) -> Tensor:
        """Encode one clip 0…1 [T,H,W,3] to raw latents [1,16,t,h,w] (video) or T pictures to [T,16,h,w] (image)."""

    @abstractmethod
    def workplace(self, vae: Any) -> Workplace:
        """Return a VAE that `vae_facts` knows, ready to be put to work; nothing is moved before `make_room`."""

    def vae_decode(self, vae: Any, samples: Tensor) -> Tensor:  # noqa: ARG002
        """Decode with a VAE that `vae_facts` does not know, by the host's own means, to IMAGE."""
        raise KandinskyError("This VAE is neither HunyuanVideo's nor FLUX's. Use the Kandinsky 5 VAE Loader.")

    @abstractmethod
    def progress(self, total: int) -> Progress:
        """Start a progress bar of `total` units on the running node."""

    @abstractmethod
    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Return zeros on the device and in the dtype the host keeps node outputs in."""


_current: list[Host] = []


def host() -> Host:
    """Return the host this process runs under, made on first use."""
    if not _current:
        if INSIDE_COMFYUI:
            from .host_comfy import ComfyHost

            install(ComfyHost())
        else:
            from .host_standalone import StandaloneHost

            install(StandaloneHost())
    return _current[0]


def install(new: Host) -> None:
    """Make `new` the host (headless runs configure their own; tests install theirs)."""
    _current[:] = [new]
