"""Main memory of a process, as Linux' /proc tells it, and whether it grows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

LEAK_BYTES = 1 << 18  # a run: less than the smallest clip of the tests
STEP_BYTES = 64 << 20  # an allocator takes more now and then, and keeps it


def anonymous_bytes(pid: int | str = "self") -> int:
    """Return what a process has in main memory that no file backs."""
    return int(re.search(r"Anonymous:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text())[1]) << 10


def is_flat(after_runs: Sequence[int]) -> bool:
    """Tell whether memory did not grow from run to run.

    What a run leaves behind is there after every one; a step after one run alone is the allocator's.
    """
    grown = [after - before for before, after in pairwise(after_runs)]
    return min(grown) < LEAK_BYTES and sum(grown) < STEP_BYTES
