"""How much main memory is free."""

from __future__ import annotations

from pathlib import Path

try:
    import psutil
except ImportError:
    psutil = None

LINUX = Path("/proc/meminfo")


def free_ram_bytes() -> int:
    """Return the main memory that can be had without pushing anything out; 0 where the system does not tell."""
    if psutil is not None:
        return psutil.virtual_memory().available
    lines = LINUX.read_text(encoding="ascii").splitlines() if LINUX.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
