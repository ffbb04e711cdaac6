"""How every benchmark here measures: one thread, processor time, peak live tensor bytes, machine facts."""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger("kandinsky5.benchmark")

Run = Callable[[], Any]


def cpu_seconds(runs: Mapping[str, Run], repeats: int = 3, *, warm_up: bool = True) -> dict[str, float]:
    """Return the least processor seconds of each run; the runs take turns, so a busy machine hurts all alike.

    Each turn repeats a run until 20 ms have passed, so that tiny sizes are measured above the clock's grain. Runs that
    take many seconds and were run before need no warm-up.
    """
    best = dict.fromkeys(runs, float("inf"))
    for run in runs.values() if warm_up else ():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            count, start = 0, time.process_time()
            while not count or time.process_time() - start < 0.02:
                run()
                count += 1
            best[name] = min(best[name], (time.process_time() - start) / count)
    return best


def peak_live_bytes(run: Run) -> int:
    """Return the most tensor bytes alive at once during `run`, beyond those alive before; exact and repeatable.

    Counted from the allocator's events, so buffers inside a kernel count as well.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def device_seconds(runs: Mapping[str, Run], device: torch.device, repeats: int = 3) -> dict[str, float]:
    """Return the least seconds of each run: processor time on a processor, else the time until a device is done.

    The runs take turns. A device gets three turns to warm up.
    """
    if device.type == "cpu":
        return cpu_seconds(runs, repeats)
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(3 + repeats):
        for name, run in runs.items():
            torch.accelerator.synchronize(device)
            start = time.perf_counter()
            run()
            torch.accelerator.synchronize(device)
            if turn >= 3:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def peak_bytes(run: Run, device: torch.device) -> int:
    """Return the most bytes a run needs at once beyond what was there before, on any device."""
    if device.type == "cpu":
        return peak_live_bytes(run)
    memory = torch.get_device_module(device)
    memory.synchronize(device)
    memory.reset_peak_memory_stats(device)
    before = memory.memory_allocated(device)
    run()
    memory.synchronize(device)
    return memory.max_memory_allocated(device) - before


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Return what a reader needs to judge the figures: processor or device, threads, versions."""
    on_device = {}
    if device is not None and device.type != "cpu":
        on_device = {"device": torch.get_device_module(device).get_device_name(device)}
    return on_device | {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def emit(record: Mapping[str, Any], path: Path | None) -> None:
    """Log one result as a JSON line and append it to `path`."""
    line = json.dumps(record)
    log.info("%s", line)
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _processor() -> str:
    """Return the processor's model name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
