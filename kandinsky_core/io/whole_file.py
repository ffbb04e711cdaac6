"""Write a file in one step: it appears whole under its name or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Give a path to write to that becomes `target` at the end, or vanishes.

    It lies in a new folder beside the target: writers of one target never meet, renaming stays on one disk, and
    others may read the file, which one made by `tempfile` itself would forbid.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=".partial-", dir=target.parent, ignore_cleanup_errors=True
    ) as folder:
        partial = Path(folder) / target.name
        yield partial
        os.replace(partial, target)
