"""Loader nodes: transformer, text encoders, autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..kandinsky_core.errors import KandinskyError
from ..kandinsky_core.variants import VARIANTS
from . import files
from .comfy_io import io
from .host import DTYPES, TEXT_DTYPES, host

CATEGORY = "Kandinsky 5/loaders"
AUTO = "auto"
_DTYPE_TIP = (
    "How the weights are held in memory. 'auto' keeps the file's precision where the device can use it."
)


class K5LoadModel(io.ComfyNode):
    """Load a Kandinsky 5 transformer as MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's definition."""
        return io.Schema(
            node_id="K5LoadModel",
            display_name="Kandinsky 5 Model Loader",
            category=CATEGORY,
            description="Load a Kandinsky 5 video or image model and recognise which one it is.",
            search_aliases=["k5", "kandinsky", "unet loader", "diffusion model", "checkpoint"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=files.names(files.MODEL),
                    tooltip="Weights from models/diffusion_models (also GGUF) or models/checkpoints, or a built-in "
                    "nano model.",
                ),
                io.Combo.Input(
                    "variant",
                    options=[AUTO, *VARIANTS],
                    default=AUTO,
                    tooltip="Which published model this is: sets steps, guidance, shift and position scale. "
                    "'auto' reads it from the weights and the file name and says so in the report.",
                ),
                io.Combo.Input(
                    "dtype", options=list(DTYPES), default=AUTO, advanced=True, tooltip=_DTYPE_TIP
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.String.Output(
                    display_name="report", tooltip="What the file was recognised as, and its preset."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None, variant: str | None) -> bool | str:
        """Read the file's header, so that a wrong or broken file, or another model's variant, is named before a run."""
        return model_name is None or _message_of(_identify_model, model_name, variant)

    @classmethod
    def execute(cls, model_name: str, variant: str, dtype: str) -> io.NodeOutput:
        """Load the weights."""
        loaded = host().load_model(
            files.locate(files.MODEL, model_name), variant=_choice(variant), dtype=dtype
        )
        return io.NodeOutput(loaded.model, loaded.report)


class K5LoadTextEncoder(io.ComfyNode):
    """Load Qwen2.5-VL and CLIP ViT-L/14 as CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's definition."""
        return io.Schema(
            node_id="K5LoadTextEncoder",
            display_name="Kandinsky 5 Text Encoder Loader",
            category=CATEGORY,
            description="Load the two text encoders of Kandinsky 5: Qwen2.5-VL 7B and CLIP ViT-L/14.",
            search_aliases=["k5", "kandinsky", "clip loader", "dual clip", "qwen"],
            inputs=[
                io.Combo.Input(
                    "qwen_name",
                    options=files.names(files.TEXT_ENCODER),
                    tooltip="Qwen2.5-VL 7B from models/text_encoders: a single file (also fp8 or GGUF) or the original "
                    "folder.",
                ),
                io.Combo.Input(
                    "clip_name",
                    options=files.names(files.CLIP_ENCODER),
                    tooltip="CLIP ViT-L/14 from models/text_encoders: clip_l.safetensors or the original folder.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(TEXT_DTYPES),
                    default=AUTO,
                    advanced=True,
                    tooltip=_DTYPE_TIP + " 'nf4' packs Qwen's layers into four bits while they are read.",
                ),
                io.String.Input(
                    "tokenizer",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Folder on the server with the Qwen tokenizer, for single files that come without one. "
                    "Empty: the weights' own folder, else the copy that ComfyUI brings.",
                ),
            ],
            outputs=[io.Clip.Output(display_name="clip")],
        )

    @classmethod
    def validate_inputs(cls, qwen_name: str | None, clip_name: str | None) -> bool | str:
        """Read both files' headers, so that a wrong or broken file is named before anything runs."""
        return _message_of(_identify_text_encoders, qwen_name, clip_name)

    @classmethod
    def execute(cls, qwen_name: str, clip_name: str, dtype: str, tokenizer: str = "") -> io.NodeOutput:
        """Load both encoders."""
        clip = host().load_clip(
            files.locate(files.TEXT_ENCODER, qwen_name),
            files.locate(files.CLIP_ENCODER, clip_name),
            tokenizer=Path(tokenizer).expanduser() if tokenizer.strip() else None,
            dtype=dtype,
        )
        return io.NodeOutput(clip)


class K5LoadVAE(io.ComfyNode):
    """Load an autoencoder as VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's definition."""
        return io.Schema(
            node_id="K5LoadVAE",
            display_name="Kandinsky 5 VAE Loader",
            category=CATEGORY,
            description="Load the HunyuanVideo autoencoder (video) or the FLUX one (images), any file layout.",
            search_aliases=["k5", "kandinsky", "vae", "autoencoder"],
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=files.names(files.VAE),
                    tooltip="Autoencoder from models/vae: HunyuanVideo for video models, FLUX (ae) for image models.",
                ),
                io.Combo.Input(
                    "dtype", options=list(DTYPES[:4]), default=AUTO, advanced=True, tooltip=_DTYPE_TIP
                ),
            ],
            outputs=[io.Vae.Output(display_name="vae")],
        )

    @classmethod
    def validate_inputs(cls, vae_name: str | None) -> bool | str:
        """Read the file's header, so that a wrong or broken file is named before anything runs."""
        return vae_name is None or _message_of(_identify_vae, vae_name)

    @classmethod
    def execute(cls, vae_name: str, dtype: str) -> io.NodeOutput:
        """Load the weights."""
        return io.NodeOutput(host().load_vae(files.locate(files.VAE, vae_name), dtype=dtype))


def _message_of(check: Any, *arguments: Any) -> bool | str:
    """Return True, or the message of the `KandinskyError` that `check` raises."""
    try:
        check(*arguments)
    except KandinskyError as error:
        return str(error)
    return True


def _choice(variant: str | None) -> str | None:
    """Return the row a user chose, None for 'auto' and for what a link will bring."""
    return None if variant == AUTO else variant


def _identify_model(name: str, variant: str | None) -> None:
    from ..kandinsky_core.io import identify, open_checkpoint

    identify(open_checkpoint(files.locate(files.MODEL, name)), _choice(variant))


def _identify_text_encoders(qwen: str | None, clip: str | None) -> None:
    from ..kandinsky_core.io import open_checkpoint
    from ..kandinsky_core.text.clip import CLIP
    from ..kandinsky_core.text.qwen import TEXT
    from ..kandinsky_core.text.weights import tower_names

    if qwen is not None:
        path = files.locate(files.TEXT_ENCODER, qwen)
        tower_names(open_checkpoint(path, part="text_encoder"), TEXT)
    if clip is not None:
        path = files.locate(files.CLIP_ENCODER, clip)
        tower_names(open_checkpoint(path, part="text_encoder_2"), CLIP)


def _identify_vae(name: str) -> None:
    from ..kandinsky_core.io import load_vae

    load_vae(files.locate(files.VAE, name), check_finite=False)  # maps the weights, reads none of them
