"""The node that says what to change in a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..kandinsky_core.errors import KandinskyError, ShapeError, TextError
from ..kandinsky_core.io.image import nearest_size
from ..kandinsky_core.shapes import VideoShape
from ..kandinsky_core.text.encoder import TEXT_POSITIONS
from ..kandinsky_core.variants import SIZES_1024, Variant
from .comfy_io import io
from .conditioning import (
    CATEGORY,
    check_image,
    fit_image,
    fit_input,
    fitted,
    notes,
    prompt_inputs,
    text_report,
    with_values,
)
from .host import KNOWN_EDIT, host
from .size import CUSTOM, side_inputs, size_message

NO_PROMPT = "The prompt is empty. Say what to change in the picture, for example: make the sky red."
AS_IMAGE = "as the image"
TEMPLATE = "image_edit"


class K5ImageEdit(io.ComfyNode):
    """Condition an editing model on a picture and an instruction."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's definition."""
        return io.Schema(
            node_id="K5ImageEdit",
            display_name="Kandinsky 5 Image Edit",
            category=CATEGORY,
            description="Say what to change in a picture; gives the conditioning and the empty picture to sample.",
            search_aliases=["k5", "kandinsky", "i2i", "image to image", "instruct", "edit image"],
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="From the Kandinsky 5 Text Encoder Loader, with the whole Qwen2.5-VL: it sees the picture.",
                ),
                io.Vae.Input("vae", tooltip="FLUX autoencoder."),
                io.Image.Input("image", tooltip="The picture to change, one at a time."),
                *prompt_inputs(
                    "What to change, and what to keep: an instruction, not a description.",
                    "",
                    "The model was released with an empty one.",
                ),
                io.Combo.Input(
                    "size",
                    options=[AS_IMAGE, CUSTOM],
                    default=AS_IMAGE,
                    tooltip="'as the image': the size nearest to its shape that the model was trained on. "
                    "'custom': the width and height below.",
                ),
                *side_inputs(1024, 1024, "Pixels, a multiple of 16; used by 'custom'."),
                fit_input(),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Optional: names the sizes of this model for 'as the image', and refuses one that cannot "
                    "edit before anything is encoded. Without it: the sizes of the released editing model.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Latent.Output(display_name="latent", tooltip="Empty picture of the chosen size."),
                io.String.Output(
                    display_name="report", tooltip="Tokens used, and how the picture was fitted."
                ),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, prompt: str | None, size: str | None, width: int | None, height: int | None
    ) -> bool | str:
        """Name an empty instruction or an illegal size before anything runs."""
        if prompt is not None and not prompt.strip():
            return NO_PROMPT
        return size_message(width, height, 1) if size == CUSTOM else True

    @classmethod
    def execute(
        cls,
        clip: Any,
        vae: Any,
        image: Tensor,
        prompt: str,
        negative_prompt: str,
        size: str,
        width: int,
        height: int,
        fit: str,
        model: Any = None,
    ) -> io.NodeOutput:
        """Fit the picture, show it to both prompts, and write its latent into both conditionings."""
        _check_sockets(clip, vae, prompt)
        row = None if model is None else editing_row(model)
        check_image(image)
        if len(image) > 1:
            raise ShapeError(
                f"'image' holds {len(image)} pictures; one is edited at a time. Pick one of them."
            )
        if size != CUSTOM:
            width, height = size_as(image, SIZES_1024 if row is None else row.sizes)
        elif (message := size_message(width, height, 1)) is not True:
            raise ShapeError(message)
        picture_1HWC = fit_image(image, width, height, fit)
        texts = [
            host().encode_text(
                clip, text, template=TEMPLATE, max_tokens=TEXT_POSITIONS, images=list(picture_1HWC)
            )
            for text in (prompt, negative_prompt)
        ]
        given = {KNOWN_EDIT: host().vae_encode(vae, picture_1HWC)}
        _, rows, columns = VideoShape(width_px=width, height_px=height, frames=1).latent_thw
        report = [
            f"picture: {fitted(image, picture_1HWC, fit)}",
            *(
                text_report(name, text, encoded, TEXT_POSITIONS, "shorten it")
                for name, text, encoded in zip(
                    ("prompt and picture", "negative prompt and picture"),
                    (prompt, negative_prompt),
                    texts,
                    strict=True,
                )
            ),
        ]
        return io.NodeOutput(
            *(with_values(text.conditioning, given) for text in texts),
            {"samples": host().zeros((1, 16, rows, columns))},
            "\n".join(report) + notes(*texts),
        )


def _check_sockets(clip: Any, vae: Any, prompt: str) -> None:
    """Refuse what cannot work before anything is encoded."""
    if not prompt.strip():
        raise TextError(NO_PROMPT)
    if clip is None:
        raise TextError("There is no text encoder on 'clip'. Connect the Kandinsky 5 Text Encoder Loader.")
    facts = host().vae_facts(vae)
    if facts is None or facts.kind != "flux":
        raise KandinskyError("Image editing needs the FLUX autoencoder; this VAE is another one.")


def size_as(image_THWC: Tensor, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return (width, height) of the one of `sizes` (height, width) nearest to the image: in shape, then in area."""
    rows, columns = image_THWC.shape[1:3]
    by_area = sorted(sizes, key=lambda side: abs(side[0] * side[1] - rows * columns))
    height, width = nearest_size(rows, columns, by_area)
    return width, height


def editing_row(model: Any) -> Variant:
    """Return the table row of an editing model; another model raises `KandinskyError`."""
    row = host().variant_of(model)
    if row is None or row.spec.instruct_type is None:
        what = "not a Kandinsky 5 one" if row is None else f"{row.title}, which cannot edit pictures"
        raise KandinskyError(f"The model on 'model' is {what}. Load an image-editing (I2I) model.")
    return row
