"""Draw the loss curves of a run from its log."""

from __future__ import annotations

import json
import logging
from pathlib import Path

logger = logging.getLogger("kandinsky5")


def curves(log: Path) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """Return stage -> quantity -> (steps, values) of everything numeric in `log.jsonl`; later lines replace earlier."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    # Another process may be writing the last line.
    for line in log.read_text(encoding="utf-8").split("\n")[:-1]:
        entry = json.loads(line)
        step = entry.get("step")
        for name, value in entry.items():
            if step is not None and isinstance(value, float) and name != "spent_s":
                found.setdefault(entry["stage"], {}).setdefault(name, {})[step] = value
    return {
        stage: {name: (sorted(points), [points[step] for step in sorted(points)]) for name, points in named.items()}
        for stage, named in found.items()
    }


def plot(log: Path, picture: Path) -> None:
    """Write one panel a stage as PNG; without matplotlib only a line in the log says so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("No plot of %s: matplotlib is not installed (pip install matplotlib).", log)
        return
    stages = curves(log)
    if not stages:
        return
    columns = min(3, len(stages))
    rows = -(-len(stages) // columns)
    figure = Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    for at, (stage, named) in enumerate(stages.items(), 1):
        axes = figure.add_subplot(rows, columns, at)
        axes.set_title(stage)
        axes.set_xlabel("step")
        for name, (steps, values) in named.items():
            axes.plot(steps, values, label=name)
        axes.set_yscale("log")
        axes.legend()
    figure.savefig(picture.with_suffix(".part"), format="png")
    picture.with_suffix(".part").replace(picture)
