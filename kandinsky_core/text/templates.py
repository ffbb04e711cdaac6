"""Prompt templates of the released models, verbatim: they were trained on the misspellings "promt" and "scren"."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import TextError

_HEAD = "<|im_start|>system\n"
_USER = "<|im_end|>\n<|im_start|>user\n"
_END = "<|im_end|>"

_MOTION_QUESTIONS = (
    "Name the visual style of the video: whether it is a professional footage, user generated content, "
    "some kind of animation, video game or scren content.\n"
    "Describe the visual effects, postprocessing and transitions if they are presented in the video.\n"
    "Pay attention to the order of key actions shown in the scene."
)
_CAMERA_QUESTION = (
    "Describe how the camera moves or shakes, describe the zoom and view angle, whether it follows the objects.\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """Text around a prompt, and how many tokens of it the transformer never sees."""

    name: str
    prefix: str
    suffix: str  # an image prompt's vision tokens go before it
    prefix_tokens: int  # tokens of the prefix in the Qwen2.5 vocabulary
    crop_start: int  # released crop in that vocabulary; image_edit's loses three prompt tokens
    max_tokens: int  # tokens kept after the crop by the released models
    takes_images: bool = False  # then the suffix stands only after an image, as in the released code

    def text(self, prompt: str) -> str:
        """The whole text for a prompt without images."""
        return self.prefix + prompt + ("" if self.takes_images else self.suffix)


TEMPLATES = {
    template.name: template
    for template in (
        Template(
            name="video",
            prefix=_HEAD + "You are a promt engineer. Describe the video in detail.\n"
            + _CAMERA_QUESTION
            + "Describe the location of the video, main characters or objects and their action.\n"
            "Describe the dynamism of the video and presented actions.\n" + _MOTION_QUESTIONS + _USER,
            suffix=_END,
            prefix_tokens=129,
            crop_start=129,
            max_tokens=256,
        ),
        Template(
            name="image",
            prefix=_HEAD + "You are a promt engineer. Describe the image by detailing the color, shape, size, texture, "
            "quantity, text, spatial relationships of the objects and background:" + _USER,
            suffix=_END,
            prefix_tokens=41,
            crop_start=41,
            max_tokens=512,
        ),
        Template(
            name="image_edit",
            prefix=_HEAD + "You are a promt engineer. Based on the provided source image (first image) and target "
            "image (second image), create an interesting text prompt that can be used together with the source image "
            "to create the target image:" + _USER,
            suffix=_END,
            takes_images=True,
            prefix_tokens=52,
            crop_start=55,
            max_tokens=512,
        ),
        Template(
            name="image2video",
            prefix=_HEAD + "You are a promt engineer. Your task is to create a highly detailed and effective video "
            "description based on a provided input image.\n" + _CAMERA_QUESTION + "Describe main characters actions.\n"
            "Describe the dynamism of the video and presented actions.\n" + _MOTION_QUESTIONS + _USER,
            suffix=_END,
            prefix_tokens=132,
            crop_start=132,
            max_tokens=256,
        ),
    )
}  # fmt: skip


def get_template(name: str) -> Template:
    """The template called `name`; an unknown name raises `TextError`."""
    try:
        return TEMPLATES[name]
    except KeyError:
        raise TextError(f"Template {name!r} is unknown. Use one of: {', '.join(TEMPLATES)}.") from None
