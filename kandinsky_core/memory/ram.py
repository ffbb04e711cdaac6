"""How much main memory is free."""

from __future__ import annotations

from pathlib import Path

try:
    import psutil
except ImportError:
    psutil = None

LINUX = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")  # version 2; what a container sees is its own


def free_ram_bytes() -> int:
    """Return the main memory that can be had without pushing anything out; 0 where the system does not tell."""
    free, allowed = _system_bytes(), _container_bytes()
    return free if allowed is None else min(free, allowed)


def _system_bytes() -> int:
    if psutil is not None:
        return psutil.virtual_memory().available
    lines = LINUX.read_text(encoding="ascii").splitlines() if LINUX.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)


def _container_bytes() -> int | None:
    """Return what a container may still take; None where there is no limit. Cached files count as free, as above."""
    try:
        limit, used = (int((GROUP / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        lines = (GROUP / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):  # "max" is no limit
        return None
    cached = sum(int(line.split()[1]) for line in lines if line.startswith(("active_file ", "inactive_file ")))
    return max(0, limit - used + cached)
