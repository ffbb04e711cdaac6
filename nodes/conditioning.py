"""Nodes that say what to generate: text, and a start image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kandinsky_core.errors import KandinskyError, ShapeError, TextError
from ..kandinsky_core.io.image import cover, resize
from ..kandinsky_core.shapes import VideoShape, latent_frames
from ..kandinsky_core.variants import VIDEO_NEGATIVE
from .comfy_io import io
from .host import KNOWN_FRAMES, KNOWN_MASK, Conditioning, EncodedText, host
from .size import size_inputs, size_message

CATEGORY = "Kandinsky 5/conditioning"
AUTO, VIDEO, IMAGE = "auto", "video", "image"
MAX_TOKENS = {VIDEO: 256, IMAGE: 512}  # what the released models were trained with
CROP, STRETCH = "crop", "stretch"


class K5EncodeText(io.ComfyNode):
    """Encode a prompt and a negative prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's definition."""
        return io.Schema(
            node_id="K5EncodeText",
            display_name="Kandinsky 5 Text Encode",
            category=CATEGORY,
            description="Encode what to show and what to avoid, with the template the model was trained with.",
            search_aliases=["k5", "kandinsky", "prompt", "clip text encode", "negative prompt"],
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="From the Kandinsky 5 Text Encoder Loader, or core's DualCLIPLoader (kandinsky5).",
                ),
                *prompt_inputs(
                    "What to show. Whole sentences work best: subject, action, place, camera, style.",
                    VIDEO_NEGATIVE,
                    "The default is the released one for video; image models were released with an empty one.",
                ),
                io.Combo.Input(
                    "template",
                    options=[AUTO, VIDEO, IMAGE],
                    default=AUTO,
                    tooltip="Words put around the prompt. 'auto': video, or what the connected model was trained with. "
                    "Choose 'image' to make a single picture with a video model.",
                ),
                io.Int.Input(
                    "max_tokens",
                    default=0,
                    min=0,
                    max=4096,
                    advanced=True,
                    tooltip="Longest prompt in tokens; the report says what was cut. "
                    "0: as trained (video 256, image 512).",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Optional: lets 'auto' pick template and token limit of this model.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.String.Output(display_name="report", tooltip="Tokens used, and what was cut off."),
            ],
        )

    @classmethod
    def execute(
        cls, clip: Any, prompt: str, negative_prompt: str, template: str, max_tokens: int, model: Any = None
    ) -> io.NodeOutput:
        """Encode both prompts."""
        if clip is None:
            raise TextError(
                "There is no text encoder on 'clip'. Connect the Kandinsky 5 Text Encoder Loader."
            )
        template, limit = _text_settings(template, max_tokens, model)
        positive = host().encode_text(clip, prompt, template=template, max_tokens=limit)
        negative = host().encode_text(clip, negative_prompt, template=template, max_tokens=limit)
        report = "\n".join(
            (
                text_report("prompt", prompt, positive, limit),
                text_report("negative prompt", negative_prompt, negative, limit),
            )
        )
        return io.NodeOutput(
            positive.conditioning, negative.conditioning, f"template: {template}\n{report}" + notes(positive, negative)
        )


def prompt_inputs(prompt: str, negative: str, released: str) -> list[io.String.Input]:
    """Widgets for both prompts: the tooltip of the first; default of the second, and what it was released with."""
    return [
        io.String.Input("prompt", multiline=True, dynamic_prompts=True, default="", tooltip=prompt),
        io.String.Input(
            "negative_prompt",
            multiline=True,
            dynamic_prompts=True,
            default=negative,
            tooltip=f"What to avoid; used while guidance is not 1. {released}",
        ),
    ]


def _text_settings(template: str, max_tokens: int, model: Any) -> tuple[str, int]:
    """Resolve 'auto' and 0 by the model on the socket."""
    row = None if model is None else host().variant_of(model)
    if template == AUTO:
        template = IMAGE if row is not None and row.vae.kind == "flux" else VIDEO
    if template not in MAX_TOKENS:
        raise TextError(f"Template {template!r} is unknown. Choose one of: {', '.join((AUTO, *MAX_TOKENS))}.")
    if max_tokens == 0:
        max_tokens = row.qwen_tokens if row is not None else MAX_TOKENS[template]
    return template, max_tokens


def text_report(
    name: str, text: str, encoded: EncodedText, limit: int, remedy: str = "shorten the prompt or raise max_tokens"
) -> str:
    """Say how many tokens a prompt has, and how many were cut off."""
    line = f"{name}: {encoded.tokens} tokens" + (" (empty)" if not text.strip() else "")
    if encoded.dropped:
        line += f", the last {encoded.dropped} were cut off (limit {limit}): {remedy}"
    return line


def notes(*encoded: EncodedText) -> str:
    """Return what the host has to say about the encoded prompts, a line each, every line once."""
    return "".join(f"\n{note}" for note in dict.fromkeys(text.note for text in encoded) if note)


class K5ImageToVideo(io.ComfyNode):
    """Make a clip start with an image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's definition."""
        return io.Schema(
            node_id="K5ImageToVideo",
            display_name="Kandinsky 5 Image to Video",
            category=CATEGORY,
            description="Encode a start image and condition both prompts on it; gives the empty clip to sample.",
            search_aliases=["k5", "kandinsky", "i2v", "start image", "first frame"],
            inputs=[
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Vae.Input("vae", tooltip="HunyuanVideo autoencoder."),
                io.Image.Input(
                    "start_image", tooltip="The first frame. Of several images the first 4n+1 start the clip."
                ),
                *size_inputs(),
                fit_input(),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Latent.Output(display_name="latent", tooltip="Empty clip of the chosen size."),
                io.String.Output(display_name="report", tooltip="How the start image was fitted."),
            ],
        )

    @classmethod
    def validate_inputs(cls, width: int | None, height: int | None, length: int | None) -> bool | str:
        """Name an illegal size before anything runs."""
        return size_message(width, height, length)

    @classmethod
    def execute(
        cls,
        positive: Conditioning,
        negative: Conditioning,
        vae: Any,
        start_image: Tensor,
        width: int,
        height: int,
        length: int,
        batch_size: int,
        fit: str,
    ) -> io.NodeOutput:
        """Encode the start and write it into both conditionings, under the keys core's sampler reads too."""
        shape = VideoShape(width_px=width, height_px=height, frames=length)
        facts = host().vae_facts(vae)
        if facts is None or facts.kind != "hunyuan":
            raise KandinskyError("Image to video needs the HunyuanVideo autoencoder; this VAE is another one.")
        t, h, w = shape.latent_thw
        frames = min(len(start_image), length)
        start_THWC = fit_image(start_image[: frames - (frames - 1) % 4], width, height, fit)
        known = host().vae_encode(vae, start_THWC)
        mask = torch.ones(1, 1, t, h, w)
        mask[:, :, : latent_frames(len(start_THWC))] = 0
        values = {KNOWN_FRAMES: known, KNOWN_MASK: mask}
        return io.NodeOutput(
            with_values(positive, values),
            with_values(negative, values),
            {"samples": host().zeros((batch_size, 16, t, h, w))},
            _start_report(start_image, start_THWC, fit),
        )


def _start_report(given_THWC: Tensor, used_THWC: Tensor, fit: str) -> str:
    """Say what became of the start image."""
    frames, kept = len(given_THWC), len(used_THWC)
    cut = f"; {kept} of {frames} frames used" if kept != frames else ""
    return f"start: {kept} frame(s) of {fitted(given_THWC, used_THWC, fit)}{cut}"


def fitted(given_THWC: Tensor, used_THWC: Tensor, fit: str) -> str:
    """Name the size of an image that was fitted, and what it was fitted from."""
    (rows, columns), (height, width) = given_THWC.shape[1:3], used_THWC.shape[1:3]
    return f"{width} × {height}" + ("" if (rows, columns) == (height, width) else f", {fit} from {columns} × {rows}")


def fit_input() -> io.Combo.Input:
    """Widget for how an image of another shape is fitted."""
    return io.Combo.Input(
        "fit",
        options=[CROP, STRETCH],
        default=CROP,
        tooltip="How an image of another shape is fitted: cut off what sticks out, or distort it.",
    )


def check_image(image_THWC: Tensor) -> None:
    """Refuse what is not an IMAGE of at least one pixel."""
    if image_THWC.ndim != 4 or image_THWC.shape[-1] < 3 or 0 in image_THWC.shape:
        raise ShapeError(f"An image is [frames, height, width, 3]; got {list(image_THWC.shape)}.")


def with_values(conditioning: Conditioning, values: dict[str, Any]) -> Conditioning:
    """Return a copy of `conditioning` with `values` set on every entry; the original is untouched."""
    return [[features, {**extra, **values}] for features, extra in conditioning]


def fit_image(image_THWC: Tensor, width: int, height: int, fit: str) -> Tensor:
    """Bring images 0…1 [T,H,W,C] to width × height [T,height,width,3], antialiased."""
    check_image(image_THWC)
    image_TCHW = image_THWC[..., :3].movedim(-1, 1).float()
    rows, columns = image_TCHW.shape[2:]
    if (rows, columns) == (height, width):
        return image_TCHW.movedim(1, -1)
    resized_TCHW = (cover if fit == CROP else resize)(image_TCHW, height, width)
    return resized_TCHW.clamp(0, 1).movedim(1, -1)
