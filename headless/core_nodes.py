"""ComfyUI's own nodes that the bundled workflows use, for runs without ComfyUI: same ids, inputs and widget order."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ..kandinsky_core.errors import KandinskyError, MediaError
from ..kandinsky_core.io import media
from ..nodes.comfy_io import io
from ..nodes.host import host
from ..nodes.standalone_output import Clip, free_paths, start_of

CONTAINERS = {"auto": ".mp4", "mp4": ".mp4", "mkv": ".mkv"}
CODECS = ("auto", "h264")
ENCODING = "format.codec.encoding"
IN_FOLDER = re.compile(r"(.*?) ?\[(input|output|temp)\]")  # how the editor names a file outside the input folder


class LoadImage(io.ComfyNode):
    """Read an image from the input folder, or from any path."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's definition."""
        return io.Schema(
            node_id="LoadImage",
            display_name="Load Image",
            category="image",
            inputs=[
                io.String.Input("image", default="", tooltip="File name in the input folder, or a path."),
                io.String.Input("upload", default="image", optional=True),  # the editor's button has a saved value
            ],
            outputs=[io.Image.Output(display_name="IMAGE"), io.Mask.Output(display_name="MASK")],
        )

    @classmethod
    def validate_inputs(cls, image: str | None) -> bool | str:
        """Read the picture before anything runs."""
        if image is None:
            return True
        try:
            media.read_image(_input_path(image))
        except MediaError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, image: str, upload: str = "image") -> io.NodeOutput:  # noqa: ARG003
        """Read colours and, as ComfyUI does, the mask: 1 where transparent; 64x64 zeros for an opaque picture."""
        pixels_1HWC, alpha_1HW = media.read_image(_input_path(image))
        return io.NodeOutput(pixels_1HWC, pixels_1HWC.new_zeros(1, 64, 64) if alpha_1HW is None else 1 - alpha_1HW)


class CreateVideo(io.ComfyNode):
    """Join images to a clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's definition."""
        return io.Schema(
            node_id="CreateVideo",
            display_name="Create Video",
            category="video",
            inputs=[
                io.Image.Input("images"),
                io.Float.Input("fps", default=30.0, min=1.0, max=120.0, step=1.0),
                io.Int.Input("bit_depth", default=8, min=8, max=8, optional=True),
            ],
            outputs=[io.Video.Output(display_name="VIDEO")],
        )

    @classmethod
    def execute(cls, images: Tensor, fps: float, bit_depth: int = 8) -> io.NodeOutput:  # noqa: ARG003
        """Keep frames and rate together."""
        return io.NodeOutput(Clip(shape_THW=tuple(images.shape[:3]), fps=fps, frames_THWC=images))


class SaveVideo(io.ComfyNode):
    """Write a clip into the output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's definition; the nested choices of ComfyUI's form follow each other in the same order."""
        return io.Schema(
            node_id="SaveVideo",
            display_name="Save Video",
            category="video",
            inputs=[
                io.Video.Input("video"),
                io.String.Input("filename_prefix", default="video/ComfyUI"),
                io.Combo.Input("format", options=list(CONTAINERS), default="auto"),
                io.Combo.Input("format.codec", options=list(CODECS), default="auto", optional=True),
                io.Combo.Input(ENCODING, options=["auto", "re-encode"], default="auto", optional=True),
                io.Float.Input(f"{ENCODING}.crf", default=23.0, min=0.0, max=51.0, optional=True),
                io.Combo.Input(f"{ENCODING}.color_space", options=["auto", "sRGB"], default="auto", optional=True),
            ],
            outputs=[io.Video.Output(display_name="video")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None) -> bool | str:
        """Name a prefix outside the output folder before anything runs."""
        return _prefix_message(filename_prefix)

    @classmethod
    def execute(cls, video: Clip, filename_prefix: str, format: str, **encoding: Any) -> io.NodeOutput:
        """Write the clip with everything that led to it in its metadata; one in a file of that kind is copied."""
        suffix = video.path.suffix if video.path and format == "auto" else CONTAINERS[format]
        path = free_paths(host().directory("output"), filename_prefix, suffix, 1)[0]
        encodes = encoding.get(ENCODING) == "re-encode"
        if video.path and video.path.suffix == suffix and not encodes:
            media.copy_media(video.path, path)
        else:
            chosen = {"crf": encoding[f"{ENCODING}.crf"]} if encodes else {}
            media.write_video(path, video.frames(), fps=video.fps, metadata=host().running.metadata, **chosen)
        return io.NodeOutput(video, ui={"files": [{"path": str(path), **video.facts()}]})


class SaveImage(io.ComfyNode):
    """Write images into the output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's definition."""
        return io.Schema(
            node_id="SaveImage",
            display_name="Save Image",
            category="image",
            inputs=[io.Image.Input("images"), io.String.Input("filename_prefix", default="ComfyUI")],
            outputs=[io.Image.Output(display_name="images")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None) -> bool | str:
        """Name a prefix outside the output folder before anything runs."""
        return _prefix_message(filename_prefix)

    @classmethod
    def execute(cls, images: Tensor, filename_prefix: str) -> io.NodeOutput:
        """Write one PNG for each image, with everything that led to it in its metadata."""
        return io.NodeOutput(images, ui={"files": _save_images(images, filename_prefix)})


class PreviewImage(io.ComfyNode):
    """Write images as 'preview' into the temporary folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's definition."""
        return io.Schema(
            node_id="PreviewImage",
            display_name="Preview Image",
            category="image",
            inputs=[io.Image.Input("images")],
            outputs=[io.Image.Output(display_name="images")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images: Tensor) -> io.NodeOutput:
        """Write one PNG for each image."""
        return io.NodeOutput(images, ui={"files": _save_images(images, "temp/preview")})


def core_nodes() -> list[type[io.ComfyNode]]:
    """Return the stand-ins for ComfyUI's own nodes."""
    return [LoadImage, CreateVideo, SaveVideo, SaveImage, PreviewImage]


def _save_images(images_THWC: Tensor, prefix: str) -> list[dict[str, Any]]:
    facts = {"kind": "image", "width": images_THWC.shape[2], "height": images_THWC.shape[1]}
    paths = free_paths(host().directory("output"), prefix, ".png", len(images_THWC))
    for path, image_HWC in zip(paths, images_THWC, strict=True):
        media.write_png(path, image_HWC, metadata=host().running.metadata)
    return [{"path": str(path), **facts} for path in paths]


def _input_path(name: str) -> Path:
    """Return the picture that `name` means: of the folder it names, in the input folder if there, else a path."""
    if match := IN_FOLDER.fullmatch(name):
        root = os.path.abspath(host().directory(match[2]))
        path = Path(os.path.abspath(os.path.join(root, match[1])))
        if not path.is_relative_to(root):
            raise MediaError(f"{name!r} leads out of the {match[2]} folder. Use a name inside it, or a plain path.")
        return path
    inside = host().directory("input") / name
    return inside if inside.is_file() else Path(name).expanduser()


def _prefix_message(prefix: str | None) -> bool | str:
    """Return True, or why nothing can be saved under this prefix; None is a linked one."""
    try:
        if prefix is not None:
            start_of(host().directory("output"), prefix)
    except KandinskyError as error:
        return str(error)
    return True
