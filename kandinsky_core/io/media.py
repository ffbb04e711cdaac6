"""Write and read pictures and clips: frames are streamed, files appear whole or not at all.

Legend: T frames, H/W rows/columns, 3 = red, green, blue.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import MediaError
from .image import to_uint8
from .whole_file import whole_file

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.video.stream import VideoStream
    from PIL.Image import Image

log = logging.getLogger("kandinsky5")

Frame = Tensor | np.ndarray
"""One picture [H,W,3]: uint8 0…255, or float 0…1 (rounded to uint8 one frame at a time)."""

BT709 = 1  # code of the BT.709 primaries, transfer curve and matrix in H.264
LIMITED_RANGE = 1

CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
CODECS = ("h264", "lossless")


class Video(NamedTuple):
    """A clip in memory: frames float32 [T,H,W,3] 0…1, frames per second, and the container's metadata."""

    frames_THW3: Tensor
    fps: float
    metadata: dict[str, str]


class Picture(NamedTuple):
    """A picture in memory: colours float32 [1,H,W,3] 0…1 and, where the file knows transparency, alpha [1,H,W]."""

    pixels_1HW3: Tensor
    alpha_1HW: Tensor | None


def write_video(
    path: str | os.PathLike[str],
    frames: Iterable[Frame],
    *,
    fps: float,
    codec: str = "h264",
    crf: float = 14,
    metadata: Mapping[str, object] | None = None,
) -> Path:
    """Encode frames as they come and return the file's path; options are those of `video_writer`."""
    with video_writer(path, fps=fps, codec=codec, crf=crf, metadata=metadata) as write:
        for frame in frames:
            write(frame)
    return Path(path)


@contextlib.contextmanager
def video_writer(
    path: str | os.PathLike[str],
    *,
    fps: float,
    codec: str = "h264",
    crf: float = 14,
    metadata: Mapping[str, object] | None = None,
) -> Iterator[Callable[[Frame], None]]:
    """Give a function that encodes the next frame; the suffix chooses the container (mp4, mov, mkv).

    `codec` "h264" plays everywhere (4:2:0, BT.709, quality `crf`, 0 best … 51; an odd last row or column is cut off).
    "lossless" is H.264 in RGB: every pixel comes back exactly; players built on ffmpeg show it, browsers may not.
    Metadata values that are no strings are stored as JSON. A failed write leaves nothing behind.
    """
    target = Path(path)
    if target.suffix.lower() not in CONTAINERS:
        raise MediaError(
            f"{target}: cannot write '{target.suffix}' clips. Possible: {', '.join(CONTAINERS)}."
        )
    if codec not in CODECS:
        raise MediaError(f"Unknown codec {codec!r}. Possible: {', '.join(CODECS)}.")
    if not 0 < fps <= 1000:
        raise MediaError(f"{fps} frames per second cannot be written. Use a number between 1 and 120.")
    import av

    with _media_file(target, (OSError, av.error.FFmpegError)) as partial:
        # mp4 and mov drop unknown tags without use_metadata_tags; faststart lets a clip play while it loads.
        flags = {} if target.suffix.lower() == ".mkv" else {"movflags": "use_metadata_tags+faststart"}
        with av.open(partial, "w", format=CONTAINERS[target.suffix.lower()], options=flags) as container:
            container.metadata.update(_strings(metadata))
            encoder = _Encoder(container, lambda shape: _stream(container, shape, fps, codec, crf))
            yield encoder.write
            if encoder.stream is None:
                raise MediaError(f"{target}: there are no frames to write.")
            container.mux(encoder.stream.encode(None))


class _Encoder:
    """Encodes frame after frame; the first one decides the size."""

    def __init__(self, container: OutputContainer, make: Callable[[tuple[int, ...]], VideoStream]) -> None:
        self.container = container
        self.make = make
        self.stream: VideoStream | None = None
        self.shape: tuple[int, ...] = ()
        self.count = 0

    def write(self, frame: Frame) -> None:
        pixels_HW3 = _pixels(frame)
        if self.stream is None:
            self.stream, self.shape = self.make(pixels_HW3.shape), pixels_HW3.shape
        if pixels_HW3.shape != self.shape:
            raise MediaError(f"Frame {self.count} is {_size(pixels_HW3.shape)}, the first one {_size(self.shape)}.")
        self.container.mux(self.stream.encode(_frame(pixels_HW3, self.stream)))
        self.count += 1


def read_video(path: str | os.PathLike[str]) -> Video:
    """Decode a whole clip."""
    import av

    try:
        with av.open(path) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or stream.guessed_rate or 24)
            frames = [
                torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)
            ]
            metadata = dict(container.metadata)
    except (OSError, av.error.FFmpegError, IndexError) as error:
        raise MediaError(f"{path} is not a clip that can be read: {error}.") from error
    if not frames:
        raise MediaError(f"{path} holds no frames.")
    # Frame by frame: only the result is ever held in float32.
    frames_THW3 = torch.empty((len(frames), *frames[0].shape))
    for frame_HW3, pixels_HW3 in zip(frames_THW3, frames, strict=True):
        torch.div(pixels_HW3, 255, out=frame_HW3)
    return Video(frames_THW3, rate, metadata)


def read_frames(path: str | os.PathLike[str]) -> Iterator[Tensor]:
    """Decode a clip frame by frame, uint8 [H,W,3]."""
    import av

    try:
        with av.open(path) as container:
            for frame in container.decode(container.streams.video[0]):
                yield torch.from_numpy(frame.to_ndarray(format="rgb24"))
    except (OSError, av.error.FFmpegError, IndexError) as error:
        raise MediaError(f"{path} is not a clip that can be read: {error}.") from error


def copy_media(source: Path, target: Path) -> None:
    """Copy a picture or clip as it is."""
    with _media_file(target, (OSError,), source.stat().st_size) as partial:
        shutil.copyfile(source, partial)


def write_png(
    path: str | os.PathLike[str], image: Frame, *, metadata: Mapping[str, object] | None = None
) -> Path:
    """Write one picture with its facts as PNG text chunks; values that are no strings are stored as JSON."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    facts = PngInfo()
    for key, value in _strings(metadata).items():
        facts.add_text(key, value)
    buffer = BytesIO()
    Image.fromarray(_pixels(image)).save(buffer, "png", pnginfo=facts)
    target = Path(path)
    with _media_file(target, (OSError,), len(buffer.getbuffer())) as partial:
        partial.write_bytes(buffer.getbuffer())
    return target


def read_image(path: str | os.PathLike[str]) -> Picture:
    """Read a picture, upright; colours are the file's own, also where transparent; 16-bit greys keep their depth."""
    from PIL import Image, ImageOps

    broken = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
            pixels_HW3 = _rgb(upright)
            alpha_HW = _alpha(upright) if upright.mode == "RGBA" else None
    except broken as error:
        raise MediaError(f"{path} is not a picture that can be read: {error}.") from error
    return Picture(
        torch.from_numpy(pixels_HW3).unsqueeze(0),
        None if alpha_HW is None else torch.from_numpy(alpha_HW).unsqueeze(0),
    )


def _rgb(image: Image) -> np.ndarray:
    """Float32 [H,W,3] of any Pillow mode."""
    if image.mode.startswith("I"):  # 16-bit greyscale, whatever Pillow calls it
        grey_HW = np.asarray(image).astype(np.float32) / np.iinfo(np.uint16).max
        return np.repeat(grey_HW[..., None].clip(0, 1), 3, axis=-1)
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


def _alpha(image: Image) -> np.ndarray:
    """Float32 [H,W] of an RGBA picture, 1 where it is opaque."""
    return np.asarray(image.getchannel("A"), dtype=np.float32) / 255


def _pixels(frame: Frame) -> np.ndarray:
    """Contiguous uint8 [H,W,3] of one frame."""
    tensor = torch.as_tensor(frame)
    if tensor.ndim != 3 or tensor.shape[-1] != 3 or not tensor.numel():
        raise MediaError(f"A frame of shape {list(tensor.shape)} is not a picture [height, width, 3].")
    if tensor.dtype != torch.uint8:
        tensor = to_uint8(tensor)
    return tensor.cpu().contiguous().numpy()


def _stream(
    container: OutputContainer, shape: tuple[int, ...], fps: float, codec: str, crf: float
) -> VideoStream:
    height, width, _ = shape
    rate = Fraction(fps).limit_denominator(1001)
    if codec == "lossless":
        stream = container.add_stream("libx264rgb", rate, options={"crf": "0", "preset": "medium"})
        stream.pix_fmt = "rgb24"
        stream.width, stream.height = width, height
        return stream
    if min(height, width) < 2:
        raise MediaError(
            f"A clip of {width}x{height} is too small for H.264: sides need 2 pixels. Use 'lossless'."
        )
    if height % 2 or width % 2:
        log.warning("H.264 needs even sides: %dx%d loses its last row or column", width, height)
    stream = container.add_stream("libx264", rate, options={"crf": f"{crf:g}", "preset": "medium"})
    stream.pix_fmt = "yuv420p"
    stream.width, stream.height = width // 2 * 2, height // 2 * 2
    # Untagged clips are shown with other colours by every second player.
    context = stream.codec_context
    context.color_primaries = context.color_trc = context.colorspace = BT709
    context.color_range = LIMITED_RANGE
    return stream


def _frame(pixels_HW3: np.ndarray, stream: VideoStream) -> Any:
    from av import VideoFrame
    from av.video.reformatter import Colorspace, Interpolation

    cropped_HW3 = np.ascontiguousarray(pixels_HW3[: stream.height, : stream.width])
    frame = VideoFrame.from_ndarray(cropped_HW3, format="rgb24")
    if stream.pix_fmt == "rgb24":
        return frame
    return frame.reformat(
        format=stream.pix_fmt, dst_colorspace=Colorspace.ITU709, interpolation=Interpolation.BICUBIC
    )


@contextlib.contextmanager
def _media_file(
    target: Path, errors: tuple[type[Exception], ...], needed_bytes: int | None = None
) -> Iterator[Path]:
    """Give a path to write to as `whole_file` does; `errors` become `MediaError` with sizes in bytes."""
    size = needed_bytes or 0
    try:
        with whole_file(target) as partial:
            try:
                yield partial
            finally:
                size = needed_bytes or (partial.stat().st_size if partial.exists() else 0)
    except errors as error:
        free = f"; {shutil.disk_usage(target.parent).free:,} bytes are free" if target.parent.is_dir() else ""
        reason = os.strerror(error.errno) if getattr(error, "errno", None) else error
        what = f"({size:,} bytes)" if needed_bytes else f"(failed after {size:,} bytes)"
        raise MediaError(
            f"{target} {what} cannot be written: {reason}{free}. Choose another folder."
        ) from error


def _strings(metadata: Mapping[str, object] | None) -> dict[str, str]:
    return {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in (metadata or {}).items()
    }


def _size(shape_HW3: tuple[int, ...]) -> str:
    return f"{shape_HW3[1]}x{shape_HW3[0]}"
