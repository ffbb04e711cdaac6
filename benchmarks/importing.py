"""What importing costs: the core and its model over `import torch`, and the whole pack's node list.

    python benchmarks/importing.py --out benchmarks/results/importing_cpu.jsonl

Each case runs in fresh interpreters, cases taking turns; processor time, the least of several runs. Target: the core
adds at most 50 ms to `import torch`.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from pathlib import Path

from measure import emit, machine

PACKAGE = "comfyui_kandinsky5"
CASES = {
    "core": f"import {PACKAGE}.kandinsky_core",
    "core_model": f"import {PACKAGE}.kandinsky_core.model",
    "node_list": f"from {PACKAGE}.nodes import node_list; node_list()",
}
RUNS = 7


def added_s(code: str) -> float:
    """Processor seconds that `code` takes in a fresh interpreter that has imported torch."""
    timed = f"import time, torch; start = time.process_time(); {code}; print(time.process_time() - start)"
    return float(subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Run every case and write one line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    out = parser.parse_args().out
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    least = dict.fromkeys(CASES, float("inf"))
    for _ in range(RUNS):
        for name, code in CASES.items():
            least[name] = min(least[name], added_s(code))
    emit(machine(), out)
    for name, seconds in least.items():
        emit({"case": name, "added_ms": round(1000 * seconds, 1)}, out)


if __name__ == "__main__":
    main()
