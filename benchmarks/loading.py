"""Load a 1 GB random transformer: mapped from disk as this project does, against build-then-load_state_dict.

    python benchmarks/loading.py --out benchmarks/results/loading_cpu.jsonl

Every figure comes from a fresh process with one thread, after the imports. The file has been read once before, so
no figure contains the disk. Memory is the most anonymous RAM (RssAnon, Linux) above the start; pages mapped from the
file are not in it, since the system can drop them at any time. "full scan" searches every weight for NaN and Inf,
which is the default only for files up to 256 MB; larger ones are looked at in samples.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from measure import emit, machine
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kandinsky_core.io import load_crossdit, save_checkpoint, spec_metadata  # noqa: E402
from kandinsky_core.model import CrossDiT  # noqa: E402
from kandinsky_core.variants import VARIANTS, VIDEO_LITE  # noqa: E402

SPEC = replace(VIDEO_LITE, num_visual_blocks=6)  # 1.04e9 bytes in bf16 with float32 modulation, as published
RAM_LIMIT = 0.03  # of the file
CPU_LIMIT = 0.05  # of build-then-load


def mapped(path: Path) -> CrossDiT:
    """Return the model as `load_crossdit` gives it by default."""
    return load_crossdit(path).model


def mapped_full_scan(path: Path) -> CrossDiT:
    """Return the same after a search of every weight for NaN and Inf."""
    return load_crossdit(path, check_finite=True).model


def built(path: Path) -> CrossDiT:
    """Build with random float32 weights, then take over the file's tensors without copying them once more."""
    model = CrossDiT(SPEC)
    model.load_state_dict(load_file(path), assign=True)
    return model


WAYS: dict[str, Callable[[Path], CrossDiT]] = {
    "mapped": mapped,
    "mapped_full_scan": mapped_full_scan,
    "built": built,
}


def measure(way: str, what: str, path: Path) -> float:
    """Run one way in this process; return processor seconds or peak anonymous bytes."""
    torch.set_num_threads(1)
    if what == "cpu_s":
        start = time.process_time()
        WAYS[way](path)
        return time.process_time() - start
    with peak_anonymous_bytes() as peak:
        model = WAYS[way](path)
        peak.append(anonymous_bytes())
    del model
    return max(peak) - peak[0]


@contextmanager
def peak_anonymous_bytes(every_s: float = 0.002) -> Iterator[list[int]]:
    """Collect the process's anonymous memory in a thread; the first value is the start."""
    seen, stop = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not stop.wait(every_s):
            seen.append(anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def anonymous_bytes() -> int:
    """Return RssAnon of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("RssAnon is only known on Linux.")


def write_checkpoint(path: Path) -> None:
    """Write random weights with the published mix of dtypes."""
    torch.manual_seed(0)
    shapes = CrossDiT(SPEC, device="meta").state_dict()
    save_checkpoint(
        path,
        {
            name: torch.randn(t.shape).to(torch.float32 if "modulation" in name else torch.bfloat16)
            for name, t in shapes.items()
        },
        spec_metadata(replace(VARIANTS["lite_t2v_5s_sft"], spec=SPEC)),
    )


def in_fresh_process(way: str, what: str, path: Path) -> float:
    """Return `measure(way, what, path)` from a new interpreter."""
    command = [sys.executable, __file__, "--way", way, "--what", what, "--file", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    """Measure all ways and compare them with the stated limits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the temporary gigabyte goes")
    for name in ("--way", "--what", "--file"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        sys.stdout.write(json.dumps(measure(options.way, options.what, Path(options.file))))
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    emit({"machine": machine()}, options.out)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "random.safetensors"
        write_checkpoint(path)
        file_bytes = path.stat().st_size
        rounds = [
            {
                way: {what: in_fresh_process(way, what, path) for what in ("cpu_s", "ram_bytes")}
                for way in WAYS
            }
            for _ in range(options.repeats)
        ]
    best = {way: {what: min(r[way][what] for r in rounds) for what in ("cpu_s", "ram_bytes")} for way in WAYS}
    for way, figures in best.items():
        ram, cpu = figures["ram_bytes"] / file_bytes, figures["cpu_s"] / best["built"]["cpu_s"]
        record = {"way": way, "file_bytes": file_bytes, "cpu_s": round(figures["cpu_s"], 4)}
        record |= {
            "anonymous_bytes": figures["ram_bytes"],
            "ram_vs_file": round(ram, 4),
            "cpu_vs_built": round(cpu, 4),
        }
        if way == "mapped":
            record["within_limits"] = ram <= RAM_LIMIT and cpu <= CPU_LIMIT
        emit(record, options.out)


if __name__ == "__main__":
    main()
