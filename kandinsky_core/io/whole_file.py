"""Write a file in one step: it appears whole under its name or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def partial_folder(beside: Path) -> Iterator[Path]:
    """Give a new folder in the folder `beside`, for files on their way there; it vanishes with what is left in it.

    Writers of one name never meet in it, renaming stays on one disk, and others may read the files, which ones made
    by `tempfile` itself would forbid.
    """
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=beside, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Give a path to write to that becomes `target` at the end, or vanishes."""
    with partial_folder(target.parent) as folder:
        partial = folder / target.name
        yield partial
        os.replace(partial, target)
