"""Clips and pictures: what is written comes back, and what cannot be written or read says why."""

from __future__ import annotations

import json
import tracemalloc
from math import prod

import numpy as np
import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import MediaError
from comfyui_kandinsky5.kandinsky_core.io.image import to_uint8
from comfyui_kandinsky5.kandinsky_core.io.media import read_image, read_video, write_png, write_video
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

FACTS = {"prompt": "ein roter Würfel, 红色", "kandinsky5": {"seed": 7, "steps": 16}}


def noise(frames: int, height: int, width: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8))


def bars(frames: int = 5) -> np.ndarray:
    """Saturated bars that move: the colours a wrong matrix or range shifts most."""
    colours = np.array(
        [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 255, 255), (0, 0, 0)], np.uint8
    )
    row = np.repeat(colours, 16, axis=0)
    return np.stack([np.broadcast_to(np.roll(row, 4 * t, axis=0), (64, 96, 3)) for t in range(frames)])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("size", [(32, 48), (33, 47)])
def test_lossless_clips_come_back_exactly(tmp_path, suffix, size):
    frames = noise(5, *size)
    path = write_video(tmp_path / f"clip{suffix}", iter(frames), fps=24, codec="lossless", metadata=FACTS)
    clip = read_video(path)
    assert np.array_equal(to_uint8(clip.frames_THW3).numpy(), np.stack(frames))
    assert clip.fps == 24


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_h264_keeps_colours_count_rate_and_facts(tmp_path, suffix):
    frames = bars()
    path = write_video(tmp_path / f"clip{suffix}", frames, fps=23.976, crf=4, metadata=FACTS)
    clip = read_video(path)
    assert clip.frames_THW3.shape == (5, 64, 96, 3) and clip.fps == pytest.approx(23.976, abs=1e-3)
    # Chroma is halved, so edges differ; the inside of each bar must not.
    inside = (np.stack([np.roll(frames, shift, axis=2) for shift in range(-3, 4)]) == frames).all(axis=(0, 4))
    assert inside.sum() > 1000
    assert np.abs(clip.frames_THW3.numpy() * 255 - frames)[inside].max() <= 6
    tags = {key.lower(): value for key, value in clip.metadata.items()}
    assert tags["prompt"] == FACTS["prompt"] and json.loads(tags["kandinsky5"]) == FACTS["kandinsky5"]


def test_mp4_starts_with_its_index(tmp_path):
    content = write_video(tmp_path / "clip.mp4", noise(3, 32, 32), fps=8).read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_h264_cuts_an_odd_row_and_column_and_says_so(tmp_path, caplog):
    clip = read_video(write_video(tmp_path / "clip.mp4", noise(2, 33, 47), fps=8))
    assert clip.frames_THW3.shape == (2, 32, 46, 3) and "even sides" in caplog.text


def test_float_frames_are_rounded_not_truncated(tmp_path):
    frame = torch.full((16, 16, 3), 199.6 / 255)
    clip = read_video(write_video(tmp_path / "clip.mp4", [frame], fps=8, codec="lossless"))
    assert to_uint8(clip.frames_THW3).unique().tolist() == [200]


def test_a_long_clip_is_streamed(tmp_path):
    """Python and NumPy hold a few frames at most, whatever the length."""
    frame_bytes = 256 * 256 * 3
    tracemalloc.start()
    frames = (np.full((256, 256, 3), t % 256, np.uint8) for t in range(60))
    write_video(tmp_path / "clip.mp4", frames, fps=24)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * frame_bytes


def test_two_writers_of_one_clip_do_not_meet(tmp_path):
    path = tmp_path / "clip.mp4"

    def frames():
        yield from noise(80, 16, 16)  # more than the encoder looks ahead, so the file is open by now
        write_video(path, noise(5, 16, 16), fps=8)
        yield noise(1, 16, 16)[0]

    write_video(path, frames(), fps=8)
    assert len(read_video(path).frames_THW3) == 81
    assert list(tmp_path.iterdir()) == [path]


def test_a_picture_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    path = write_png(tmp_path / "picture.png", noise(1, 8, 8)[0])
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode


class TensorBytes(TorchDispatchMode):
    """Sum the bytes of all memory that torch operations hand out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            pointer = tensor.untyped_storage().data_ptr()
            if pointer not in given:
                self.seen[pointer] = tensor.untyped_storage()  # kept alive, so no address comes twice
        return out

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self.seen.values())


def test_a_clip_is_read_into_one_float_tensor(tmp_path):
    path = write_video(tmp_path / "clip.mp4", noise(8, 32, 48), fps=8)
    with TensorBytes() as handed_out:
        clip = read_video(path)
    assert handed_out.total == clip.frames_THW3.nbytes == 4 * prod((8, 32, 48, 3))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"frames": []}, "no frames"),
        ({"frames": [np.zeros((16, 16), np.uint8)]}, "not a picture"),
        ({"frames": [np.zeros((16, 16, 3), np.uint8), np.zeros((16, 32, 3), np.uint8)]}, "Frame 1 is 32x16"),
        ({"codec": "av9"}, "Unknown codec 'av9'"),
        ({"fps": 0}, "0 frames per second"),
        ({"path": "clip.avi"}, "cannot write '.avi'"),
    ],
)
def test_clips_that_cannot_be_written_say_why_and_leave_nothing(tmp_path, arguments, said):
    arguments = {"path": "clip.mp4", "frames": noise(2, 16, 16), "fps": 8} | arguments
    with pytest.raises(MediaError, match=said):
        write_video(tmp_path / arguments.pop("path"), arguments.pop("frames"), **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("codec", ["h264", "lossless"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_full_disk_is_named_and_the_partial_clip_removed(tmp_path, file_size_limit, codec, suffix):
    with (
        file_size_limit(50_000),
        pytest.raises(MediaError, match=r"failed after [\d,]+ bytes.*cannot be written.*free"),
    ):
        write_video(tmp_path / f"clip{suffix}", noise(30, 128, 128), fps=8, codec=codec)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_picture_that_was_there(tmp_path, file_size_limit):
    path = write_png(tmp_path / "picture.png", noise(1, 8, 8)[0])
    before = path.read_bytes()
    with (
        file_size_limit(1000),
        pytest.raises(MediaError, match=r"picture.png \([\d,]+ bytes\) cannot be written"),
    ):
        write_png(path, noise(1, 64, 64)[0])
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(MediaError, match="taken"):
        write_png(tmp_path / "taken" / "picture.png", noise(1, 8, 8)[0])


def test_png_comes_back_exactly_with_its_facts(tmp_path):
    pixels = noise(1, 9, 7)[0]
    path = write_png(tmp_path / "new" / "picture.png", pixels, metadata=FACTS)
    assert np.array_equal(to_uint8(read_image(path).pixels_1HW3)[0].numpy(), pixels)
    with Image.open(path) as image:
        assert image.text["prompt"] == FACTS["prompt"]
        assert json.loads(image.text["kandinsky5"]) == FACTS["kandinsky5"]


def test_every_mode_becomes_rgb(tmp_path):
    for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"):
        path = tmp_path / f"{mode.replace(';', '')}.tif"
        Image.new(mode, (5, 3)).save(path) if mode != "PA" else Image.new("PA", (5, 3)).convert("RGBA").save(
            path
        )
        image = read_image(path).pixels_1HW3
        assert image.shape == (1, 3, 5, 3) and image.dtype == torch.float32, mode
        assert image.min() >= 0 and image.max() <= 1, mode


def test_transparency_is_read_beside_the_colours(tmp_path):
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 255, 0, 51))
    image.save(tmp_path / "rgba.png")
    pixels, alpha = read_image(tmp_path / "rgba.png")
    assert pixels[0, 0].tolist() == [[1, 0, 0], [0, 1, 0]]
    assert torch.equal(alpha, torch.tensor([[[0, 0.2]]]))
    palette = Image.new("P", (1, 1))
    palette.putpalette([51, 51, 51])
    palette.save(tmp_path / "p.png", transparency=0)
    pixels, alpha = read_image(tmp_path / "p.png")
    assert torch.equal(pixels, torch.full((1, 1, 1, 3), 0.2))
    assert alpha.tolist() == [[[0]]]
    Image.new("RGB", (1, 1)).save(tmp_path / "rgb.png")
    assert read_image(tmp_path / "rgb.png").alpha_1HW is None


def test_sixteen_bit_greys_keep_their_depth(tmp_path):
    grey = np.array([[0, 1, 257, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert torch.equal(
        read_image(tmp_path / "grey.png").pixels_1HW3[0, 0, :, 1], torch.tensor([0, 1, 257, 65535]) / 65535
    )


def test_a_phone_picture_is_turned_upright(tmp_path):
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate 90 degrees clockwise to show
    image.save(tmp_path / "phone.png", exif=exif)
    upright = read_image(tmp_path / "phone.png").pixels_1HW3
    assert upright.shape == (1, 4, 2, 3) and upright[0, 0, 1].min() == 1


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_an_unreadable_picture_is_named(tmp_path, content):
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(MediaError, match="broken.png is not a picture that can be read"):
        read_image(tmp_path / "broken.png")


def test_what_is_not_there_is_named(tmp_path):
    for read in (read_image, read_video):
        with pytest.raises(MediaError, match="nothing.here"):
            read(tmp_path / "nothing.here")
    (tmp_path / "text.mp4").write_text("no clip")
    with pytest.raises(MediaError, match="not a clip"):
        read_video(tmp_path / "text.mp4")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(keep=st.integers(0, 400), position=st.integers(0, 400), value=st.binary(min_size=1, max_size=3))
def test_a_damaged_picture_is_read_or_named(tmp_path, keep, position, value):
    path = write_png(tmp_path / "damaged.png", noise(1, 8, 8)[0], metadata={"a": "b"})
    content = bytearray(path.read_bytes()[:keep])
    content[position : position + len(value)] = value
    path.write_bytes(content)
    try:
        assert read_image(path).pixels_1HW3.ndim == 4
    except MediaError as error:
        assert "damaged.png" in str(error)
