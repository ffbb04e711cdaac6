"""Nodes for the size and length of what is generated."""

from __future__ import annotations

from math import gcd

from ..kandinsky_core.errors import ShapeError
from ..kandinsky_core.shapes import MULTIPLE_PX, NABLA_MULTIPLE_PX, VAE_TEMPORAL, VideoShape, snap_frames
from ..kandinsky_core.variants import SIZES_512, SIZES_1024
from .comfy_io import io
from .host import host

CATEGORY = "Kandinsky 5/latent"
CUSTOM = "custom"
MAX_SIDE_PX = 8192
MAX_FRAMES = 4097
MAX_BATCH = 64


def _label(height: int, width: int) -> str:
    divisor = gcd(width, height)
    return f"{width}x{height} ({width // divisor}:{height // divisor})"


SIZES = {CUSTOM: None, **{_label(h, w): (w, h) for h, w in (*SIZES_512, *SIZES_1024)}}


class K5Size(io.ComfyNode):
    """Turn a wish for size and length into numbers the model can take."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's definition."""
        return io.Schema(
            node_id="K5Size",
            display_name="Kandinsky 5 Size & Length",
            category=CATEGORY,
            description="Choose a size, and a length in frames or seconds; snaps to what the models can take.",
            search_aliases=["k5", "kandinsky", "resolution", "aspect ratio", "frames", "seconds", "duration"],
            inputs=[
                io.Combo.Input(
                    "size",
                    options=list(SIZES),
                    default=_label(*SIZES_512[1]),
                    tooltip="A size the models were trained on (sides up to 768: SD video; others: HD video and "
                    "images), or 'custom' for the width and height below.",
                ),
                *side_inputs(768, 512, "Pixels; used by 'custom'."),
                io.Int.Input(
                    "length",
                    default=121,
                    min=1,
                    max=MAX_FRAMES,
                    step=VAE_TEMPORAL,
                    tooltip="Frames, 4n+1: 121 is 5 s, 241 is 10 s, 1 is a picture. Used while 'seconds' is 0.",
                ),
                io.Float.Input(
                    "seconds",
                    default=0.0,
                    min=0.0,
                    max=300.0,
                    step=0.1,
                    tooltip="Length in seconds at the frame rate below; 0 takes 'length' instead.",
                ),
                io.Float.Input(
                    "fps",
                    default=24.0,
                    min=1.0,
                    max=120.0,
                    step=1.0,
                    tooltip="Frames per second: 24 for the released models.",
                ),
                io.Combo.Input(
                    "multiple",
                    options=[str(MULTIPLE_PX), str(NABLA_MULTIPLE_PX)],
                    default=str(MULTIPLE_PX),
                    advanced=True,
                    tooltip="Sides are rounded to this many pixels: 16 always works, 128 is what "
                    "block-sparse attention (10 s and HD weights) needs.",
                ),
            ],
            outputs=[
                io.Int.Output(display_name="width"),
                io.Int.Output(display_name="height"),
                io.Int.Output(display_name="length", tooltip="Frames, 4n+1."),
                io.Float.Output(display_name="fps"),
                io.String.Output(
                    display_name="report", tooltip="What was changed to make the numbers legal."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, size: str, width: int, height: int, length: int, seconds: float, fps: float, multiple: str
    ) -> io.NodeOutput:
        """Snap and report."""
        if size not in SIZES:
            raise ShapeError(f"Size {size!r} is not in the list. Choose one of: {', '.join(SIZES)}.")
        wanted_w, wanted_h = SIZES[size] or (width, height)
        wanted_frames = round(seconds * fps) + 1 if seconds > 0 else length
        shape = VideoShape.nearest(wanted_w, wanted_h, wanted_frames, int(multiple))
        if (message := size_message(shape.width_px, shape.height_px, shape.frames)) is not True:
            raise ShapeError(message)
        return io.NodeOutput(
            shape.width_px,
            shape.height_px,
            shape.frames,
            fps,
            _report(shape, (wanted_w, wanted_h, wanted_frames), fps),
        )


def _report(shape: VideoShape, wanted: tuple[int, int, int], fps: float) -> str:
    got = (shape.width_px, shape.height_px, shape.frames)
    lines = [
        f"{shape.width_px} × {shape.height_px}, {shape.frames} frames ({shape.frames / fps:.2f} s), "
        f"{shape.tokens} tokens"
    ]
    named = zip(("width", "height", "length"), wanted, got, strict=True)
    lines += [f"{name}: {asked} → {given}" for name, asked, given in named if asked != given]
    return "\n".join(lines)


class K5EmptyLatent(io.ComfyNode):
    """Give the sampler an empty clip or picture to fill."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's definition."""
        return io.Schema(
            node_id="K5EmptyLatent",
            display_name="Kandinsky 5 Empty Latent",
            category=CATEGORY,
            description="An empty latent clip; with length 1 an empty latent picture.",
            search_aliases=["k5", "kandinsky", "empty video latent", "empty image"],
            inputs=size_inputs(),
            outputs=[io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def validate_inputs(cls, width: int | None, height: int | None, length: int | None) -> bool | str:
        """Name an illegal size before anything runs."""
        return size_message(width, height, length)

    @classmethod
    def execute(cls, width: int, height: int, length: int, batch_size: int) -> io.NodeOutput:
        """Make the zeros."""
        if (message := size_message(width, height, length)) is not True:
            raise ShapeError(message)
        t, h, w = VideoShape(width_px=width, height_px=height, frames=length).latent_thw
        shape = (batch_size, 16, h, w) if length == 1 else (batch_size, 16, t, h, w)
        return io.NodeOutput({"samples": host().zeros(shape)})


def side_inputs(width: int, height: int, tooltip: str) -> list[io.Int.Input]:
    """Widgets for width and height with these defaults, in pixels."""
    return [
        io.Int.Input(
            name, default=side, min=MULTIPLE_PX, max=MAX_SIDE_PX, step=MULTIPLE_PX, tooltip=tooltip
        )
        for name, side in (("width", width), ("height", height))
    ]


def size_inputs() -> list[io.Int.Input]:
    """Widgets for width, height, length and batch size, the same in every node that has them."""
    return [
        *side_inputs(768, 512, "Pixels, a multiple of 16."),
        io.Int.Input(
            "length",
            default=121,
            min=1,
            max=MAX_FRAMES,
            step=VAE_TEMPORAL,
            tooltip="Frames, 4n+1: 121 is 5 s at 24 frames per second, 1 is a picture.",
        ),
        io.Int.Input(
            "batch_size",
            default=1,
            min=1,
            max=MAX_BATCH,
            tooltip="How many to make at once; each takes memory.",
        ),
    ]


def size_message(width: int | None, height: int | None, length: int | None) -> bool | str:
    """Return True for a legal size, else the message; a linked (unknown) value passes."""
    try:
        VideoShape(
            width_px=MULTIPLE_PX if width is None else width,
            height_px=MULTIPLE_PX if height is None else height,
            frames=1 if length is None else length,
        )
    except ShapeError as error:
        return str(error)
    for name, value, most in (
        ("width", width, MAX_SIDE_PX),
        ("height", height, MAX_SIDE_PX),
        ("length", length, MAX_FRAMES),
    ):
        if value is not None and value > most:
            return f"{name} {value} is above {most}. Use {snap_frames(most) if name == 'length' else most} or less."
    return True
