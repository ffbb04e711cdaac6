"""Whole frames from pieces that come in any order: those that must wait lie on disk, so memory stays flat.

Legend: T frames, H/W rows/columns, 3 = red, green, blue.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

Place = tuple[slice, slice, slice]  # frames, rows, columns of the clip


@dataclass(frozen=True, slots=True)
class Waiting:
    """A piece on disk: its place in the clip and where it begins in the file."""

    place: Place
    offset: int

    def covers(self, frame: int) -> bool:
        """Whether it has pixels of a frame."""
        return self.place[0].start <= frame < self.place[0].stop


class FrameAssembly:
    """Hands frames to `write` in order, each as soon as it and all before it are complete.

    Every pixel must come exactly once. Whole frames in order pass straight through; other pieces wait in a temporary
    file in `folder` that vanishes with the process.
    """

    def __init__(self, shape_THW: tuple[int, int, int], write: Callable[[np.ndarray], None], folder: Path) -> None:
        frames, self._height, self._width = shape_THW
        self._write = write
        self._folder = folder
        self._missing = [self._height * self._width] * frames  # pixels of each frame
        self._written = 0
        self._waiting: list[Waiting] = []
        self._file: tempfile._TemporaryFileWrapper | None = None

    def __enter__(self) -> FrameAssembly:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def put(self, place: Place, pixels_THW3: np.ndarray) -> None:
        """Take one piece, uint8."""
        frames = range(place[0].start, place[0].stop)
        area = pixels_THW3.shape[1] * pixels_THW3.shape[2]
        for frame in frames:
            self._missing[frame] -= area
        if frames.start == self._written and area == self._height * self._width:
            for frame_HW3 in pixels_THW3:
                self._write(frame_HW3)
            self._written = frames.stop
        else:
            self._keep(place, pixels_THW3)
        while self._written < len(self._missing) and not self._missing[self._written]:
            self._write(self._assembled(self._written))
            self._written += 1
            self._waiting = [piece for piece in self._waiting if piece.place[0].stop > self._written]

    def _keep(self, place: Place, pixels_THW3: np.ndarray) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix=".partial-", dir=self._folder)  # noqa: SIM115, closed on exit
        self._waiting.append(Waiting(place, self._file.seek(0, 2)))
        self._file.write(np.ascontiguousarray(pixels_THW3).data)

    def _assembled(self, frame: int) -> np.ndarray:
        out_HW3 = np.empty((self._height, self._width, 3), np.uint8)
        for piece in self._waiting:
            if piece.covers(frame):
                frames, rows, columns = piece.place
                size = (rows.stop - rows.start, columns.stop - columns.start, 3)
                self._file.seek(piece.offset + (frame - frames.start) * size[0] * size[1] * 3)
                out_HW3[rows, columns] = np.frombuffer(self._file.read(size[0] * size[1] * 3), np.uint8).reshape(size)
        return out_HW3
