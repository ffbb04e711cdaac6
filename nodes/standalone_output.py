"""What is saved without ComfyUI: numbered names in the output folder, and clips that may lie in a file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..kandinsky_core.errors import KandinskyError
from ..kandinsky_core.io import media


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """VIDEO: its (frames, rows, columns) and frames per second; the frames are in memory or in a file."""

    shape_THW: tuple[int, int, int]
    fps: float
    frames_THWC: Tensor | None = None  # 0…1
    path: Path | None = None

    def frames(self) -> Iterable[media.Frame]:
        """Give frame after frame."""
        return media.read_frames(self.path) if self.frames_THWC is None else self.frames_THWC

    def facts(self) -> dict[str, object]:
        """Describe the clip for the list of saved files."""
        frames, height, width = self.shape_THW
        return {"kind": "video", "width": width, "height": height, "frames": frames, "fps": self.fps}


def free_paths(root: Path, prefix: str, suffix: str, count: int) -> list[Path]:
    """Return the next `count` free names `prefix_00001_.ext` in the folder `root`, as ComfyUI numbers them."""
    start = start_of(root, prefix)
    taken = re.compile(rf"{re.escape(start.name)}_(\d+)_{re.escape(suffix)}")
    names = [path.name for path in start.parent.iterdir()] if start.parent.is_dir() else []
    first = max((int(match[1]) for name in names if (match := taken.fullmatch(name))), default=0) + 1
    return [start.with_name(f"{start.name}_{number:05}_{suffix}") for number in range(first, first + count)]


def start_of(root: Path, prefix: str) -> Path:
    """Return the path that numbers are appended to; one outside `root` raises `KandinskyError`."""
    root = root.resolve()
    start = (root / prefix).resolve()
    if not start.is_relative_to(root) or start == root:
        raise KandinskyError(
            f"filename_prefix {prefix!r} leads out of the output folder. Use a name or a subfolder/name."
        )
    return start
