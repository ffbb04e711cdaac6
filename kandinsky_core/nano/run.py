"""What every training stage shares: a folder, a log, checkpoints and one step after the other."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import KandinskyError

logger = logging.getLogger("kandinsky5")

Files = dict[str, Path]  # of the family's weights, as `nano.files()` names them

WARMUP = 20  # steps
FLOOR = 0.02  # of the learning rate at the end
LOG_EVERY = 25
SAVE_EVERY = 100
WATCH_EVERY = 250


class ResumeError(KandinskyError):
    """What lies in the folder was made by another recipe."""


class MissingError(KandinskyError):
    """A stage lacks what an earlier one makes."""


@dataclass(slots=True)
class Run:
    """Where a training writes and on what it computes; the same seed gives the same weights on one CPU thread."""

    folder: Path
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32  # of activations; weights are float32
    seed: int = 1
    resume: bool = True
    compile: bool = False  # let torch.compile fuse the transformer's blocks; needs a C++ compiler on a CPU

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def log(self, stage: str, **facts: object) -> None:
        """Append one line to `log.jsonl`."""
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, **facts}) + "\n")
        logger.info("%s %s", stage, facts)

    def identity(self, **facts: object) -> dict[str, object]:
        """Return what a file of this run is made from, as JSON gives it back: it may be continued by the same only."""
        made_from = {"seed": self.seed, "dtype": str(self.dtype), **facts}
        return json.loads(json.dumps(made_from))

    def check(self, path: Path, found: Mapping[str, object], wanted: Mapping[str, object]) -> None:
        """Refuse to continue from a file that was made from something else; raises `ResumeError`."""
        names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
        if names:
            raise ResumeError(
                f"{path} was made by another recipe: "
                + "; ".join(f"{name} was {found.get(name)}, is now {wanted.get(name)}" for name in names)
                + ". Take another --out, or begin again with --no-resume."
            )

    def generator(self, *key: object) -> torch.Generator:
        """Return random numbers that depend on the seed and the key only, so that a resumed run repeats itself."""
        number = 0
        for part in (self.seed, *key):
            number = (number * 1_000_003 + (part if isinstance(part, int) else sum(map(ord, str(part))))) % 2**62
        return torch.Generator().manual_seed(number)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then cosine down to `FLOOR` of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    return peak * min(1.0, (step + 1) / WARMUP) * (FLOOR + (1 - FLOOR) * cosine)


def train(
    run: Run,
    stage: str,
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    loss_at: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    recipe: object = None,
    ema: nn.Module | None = None,
    ema_decay: float = 0.999,
    watch: Callable[[], dict[str, float]] | None = None,
) -> None:
    """Minimise `loss_at(step)` over the parameters of `module`, from the stage's checkpoint if there is one.

    `recipe` is what `loss_at` depends on, for JSON; a checkpoint of another recipe raises `ResumeError`.
    """
    path = run.folder / f"{stage}.ckpt"
    identity = run.identity(steps=steps, lr=lr, recipe=recipe)
    first = 0
    spent_s = average = 0.0
    if run.resume and path.exists():
        state = torch.load(path, map_location=run.device, weights_only=True)
        run.check(path, state.get("identity", {}), identity)
        module.load_state_dict(state["module"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if ema is not None:
            ema.load_state_dict(state["ema"])
        first, spent_s, average = state["step"], state["spent_s"], state["average"]
    began_s = time.perf_counter() - spent_s
    for step in range(first, steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, lr)
            optimizer.zero_grad()
        loss = loss_at(step)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if ema is not None:
            decay = min(ema_decay, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(module.parameters()), 1 - decay)
        done = step + 1
        average = loss.item() if step == 0 else 0.95 * average + 0.05 * loss.item()
        if not math.isfinite(average):
            raise KandinskyError(f"Loss of stage {stage} is {loss.item()} at step {done}. Lower the learning rate.")
        spent_s = time.perf_counter() - began_s
        if done == 1 or done % LOG_EVERY == 0 or done == steps:
            run.log(stage, step=done, loss=round(average, 5), spent_s=round(spent_s, 1))
        if done % SAVE_EVERY == 0 or done == steps:
            state = {
                "module": module.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "identity": identity,
                "step": done,
                "spent_s": spent_s,
                "average": average,
            }
            torch.save(state | ({"ema": ema.state_dict()} if ema is not None else {}), path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        if watch is not None and (done % WATCH_EVERY == 0 or done == steps):
            run.log(stage, step=done, **watch())


def write_json(path: Path, report: Mapping[str, object]) -> None:
    """Write a report for people and programs; a number that is none becomes null."""
    path.write_text(json.dumps(_finite(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict[str, object]:
    """Read a report."""
    return json.loads(path.read_text(encoding="utf-8"))


def hashed(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of weights: safetensors files, or folders of a text encoder; raises `MissingError`."""
    found = hashlib.sha256()
    for path in paths:
        parts = [path] if path.suffix else [path / "model.safetensors", path / "tokenizer.json"]
        for part in parts:
            if not part.exists():
                raise MissingError(f"{part} is missing. Run the stage that makes it first, or name its --weights.")
            found.update(part.read_bytes())
    return found.hexdigest()
