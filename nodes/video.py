"""The node that decodes straight into a video file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from ..kandinsky_core.errors import KandinskyError, MediaError
from ..kandinsky_core.io.assembly import FrameAssembly
from ..kandinsky_core.io.media import CODECS, CONTAINERS, video_writer
from ..kandinsky_core.io.whole_file import partial_folder
from ..kandinsky_core.memory.plan import Plan
from .comfy_io import io
from .decode import Wanted, decode, image_shape, memory_inputs, onto
from .host import LATENT_FACTS, Latent, host
from .latents import HIDDEN, kept
from .standalone_output import start_of
from .vae import CATEGORY, require_ours

FPS = 24.0  # of latents that do not tell
FORMATS = [suffix.removeprefix(".") for suffix in CONTAINERS]


class K5DecodeVideo(io.ComfyNode):
    """Decode latents into a video file, frame after frame."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's definition."""
        return io.Schema(
            node_id="K5DecodeVideo",
            display_name="Kandinsky 5 VAE Decode to Video",
            category=CATEGORY,
            description="Decode straight into a video file in the output folder: frames never pile up in memory.",
            search_aliases=["k5", "kandinsky", "vae decode", "save video", "low ram", "long video"],
            inputs=[
                io.Vae.Input("vae"),
                io.Latent.Input("latent"),
                io.Float.Input(
                    "fps",
                    default=0.0,
                    min=0.0,
                    max=120.0,
                    step=1.0,
                    tooltip="Frames per second. 0: as the model was trained (24; nano 8).",
                ),
                io.String.Input(
                    "filename_prefix", default="video/kandinsky5", tooltip="Name in the output folder, numbered."
                ),
                io.Combo.Input("format", options=FORMATS, default=FORMATS[0], tooltip="Container of the file."),
                io.Combo.Input(
                    "codec",
                    options=list(CODECS),
                    default=CODECS[0],
                    tooltip="'h264' plays everywhere; 'lossless' keeps every pixel and needs a player built on ffmpeg.",
                ),
                io.Float.Input(
                    "crf",
                    default=14.0,
                    min=0.0,
                    max=51.0,
                    step=1.0,
                    advanced=True,
                    tooltip="Quality of h264: 0 best and largest, 51 worst.",
                ),
                *memory_inputs(),
            ],
            outputs=[
                io.Video.Output(display_name="video", tooltip="The clip in its file."),
                io.String.Output(display_name="report", tooltip="Mode, tiles, peak, and what was done about memory."),
            ],
            is_output_node=True,
            hidden=HIDDEN,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None) -> bool | str:
        """Name a prefix outside the output folder before anything runs; None is a linked one."""
        try:
            if filename_prefix is not None:
                start_of(host().directory("output"), filename_prefix)
        except KandinskyError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        vae: Any,
        latent: Latent,
        fps: float,
        filename_prefix: str,
        format: str,
        codec: str,
        crf: float,
        mode: str,
        memory_gb: float,
        keep_latents: int,
        plan: Plan | None = None,
        compile: bool = False,
    ) -> io.NodeOutput:
        """Decode and write; the file appears when the clip is whole."""
        wanted = Wanted.of(mode, memory_gb, plan, compile)
        with kept(vae, latent, keep_latents, cls.hidden, wanted.mode) as line:
            require_ours(vae)
            samples = latent["samples"]
            fps = fps or frame_rate(latent.get(LATENT_FACTS, {}))
            shape_THW = image_shape(samples)
            name = partial(host().new_path, filename_prefix, f".{format}", *shape_THW[:0:-1])
            metadata = host().provenance(cls.hidden)
            first = name()
            with partial_folder(first.parent) as folder:
                draft = folder / first.name
                try:
                    with (
                        video_writer(draft, fps=fps, codec=codec, crf=crf, metadata=metadata) as write,
                        FrameAssembly(shape_THW, write, folder) as film,
                    ):
                        report = decode(vae, samples, wanted, onto(film))
                except MediaError as error:  # the folder it names is gone by now
                    raise MediaError(str(error).replace(str(draft), str(first))) from error
                path = name()  # only now: another run may have taken the number meanwhile
                os.replace(draft, path)
            video, shown = host().video(path, fps=fps, shape_THW=shape_THW)
            return io.NodeOutput(video, f"{report}\n{line}", ui=shown)


def frame_rate(facts: Mapping[str, Any]) -> float:
    """Return the rate a latent was made for; files of others may say anything there."""
    made = facts.get("fps")
    return float(made) if isinstance(made, int | float) and 0 < made < math.inf else FPS
