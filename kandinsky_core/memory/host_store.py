"""Ready copies of blocks in page-locked host memory, as many as fit under a limit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from torch import Tensor

from .cargo import Cargo

logger = logging.getLogger("kandinsky5")

LARGEST_SLAB_BYTES = 1 << 32


class HostStore:
    """Images of cargos (converted, packed, ready to be copied in one go) in a few large slabs.

    Blocks that do not fit under `limit_bytes` have no image: they are read where they were loaded, from the map.
    """

    def __init__(self, cargos: Sequence[Cargo], limit_bytes: int, allocate: Callable[[int], Tensor]) -> None:
        self.nbytes = 0  # of all slabs
        self._images: dict[Cargo, Tensor] = {}
        left = list(cargos)
        while left and (size := slab_bytes(sum(cargo.nbytes for cargo in left), limit_bytes - self.nbytes)):
            if size < left[0].nbytes:
                break
            try:
                slab, start = allocate(size), 0
            except RuntimeError as error:
                logger.warning(
                    "No %.2f GB of page-locked memory (%s): %d blocks travel from where they were loaded, more slowly.",
                    size / 1e9, str(error).partition("\n")[0], len(left),
                )  # fmt: skip
                break
            self.nbytes += size
            while left and start + left[0].nbytes <= size:
                cargo = left.pop(0)
                self._images[cargo] = slab[start : start + cargo.nbytes]
                cargo.write(self._images[cargo])
                start += cargo.nbytes

    def image(self, cargo: Cargo) -> Tensor | None:
        """Return the ready copy of a cargo, None when it has none."""
        return self._images.get(cargo)


def slab_bytes(wanted: int, limit: int) -> int:
    """Return the size of the next slab: a power of two, as torch would round it up to; 0 when none fits."""
    if limit < 1:
        return 0
    return min(LARGEST_SLAB_BYTES, 1 << (wanted - 1).bit_length(), 1 << (limit.bit_length() - 1))
