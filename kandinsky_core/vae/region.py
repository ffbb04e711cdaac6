"""Rectangles of a frame, and the tiles a frame is cut into."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ..errors import ShapeError
from ..shapes import VAE_SPATIAL

CELL_PX = 4  # late tiles are cut on a grid twice as fine as the latent


@dataclass(frozen=True, slots=True)
class Region:
    """Rows `top...bottom` and columns `left...right` of some grid."""

    top: int
    bottom: int
    left: int
    right: int

    def scaled(self, numerator: int, denominator: int = 1) -> Region:
        """Return the same rectangle on a grid `numerator / denominator` times as fine; edges must fall on cells."""
        return Region(*(edge * numerator // denominator for edge in self.edges))

    def grown(self, halo: int, height: int, width: int) -> Region:
        """Return the rectangle with `halo` more cells on each side that does not reach the frame's edge."""
        return Region(
            max(self.top - halo, 0),
            min(self.bottom + halo, height),
            max(self.left - halo, 0),
            min(self.right + halo, width),
        )

    def inside(self, outer: Region) -> Region:
        """Return the rectangle in the coordinates of one that contains it."""
        return Region(
            self.top - outer.top, self.bottom - outer.top, self.left - outer.left, self.right - outer.left
        )

    def crop(self, x: Tensor) -> Tensor:
        """View the rectangle of `[..., rows, columns]`."""
        return x[..., self.top : self.bottom, self.left : self.right]

    @property
    def edges(self) -> tuple[int, int, int, int]:
        """(top, bottom, left, right)."""
        return self.top, self.bottom, self.left, self.right

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.bottom - self.top, self.right - self.left

    @property
    def rows(self) -> slice:
        """The rows as a slice."""
        return slice(self.top, self.bottom)

    @property
    def columns(self) -> slice:
        """The columns as a slice."""
        return slice(self.left, self.right)

    def cut(self, rows: int, columns: int) -> list[Region]:
        """Cut into `rows` x `columns` rectangles of pixels along cells of 4 px, sizes as equal as they can be."""
        height, width = (side // CELL_PX for side in self.size)
        if not (1 <= rows <= height and 1 <= columns <= width):
            raise ShapeError(
                f"{rows} x {columns} tiles of {height * CELL_PX} x {width * CELL_PX} px are not possible: "
                f"at least 1 x 1, at most {height} x {width}."
            )
        across, along = _edges(self.left, width, columns), _edges(self.top, height, rows)
        return [
            Region(*vertical, *horizontal) for vertical in pairwise(along) for horizontal in pairwise(across)
        ]


def frame_region(rows: int, columns: int) -> Region:
    """Return the whole frame in pixels, from its latent rows and columns."""
    return Region(0, rows * VAE_SPATIAL, 0, columns * VAE_SPATIAL)


def _edges(start_px: int, cells: int, parts: int) -> list[int]:
    return [start_px + CELL_PX * (cells * part // parts) for part in range(parts + 1)]
