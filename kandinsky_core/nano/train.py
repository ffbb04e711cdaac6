"""Train the nano family from nothing: `python -m kandinsky_core.nano.train --out DIR`.

Stages: vae, image_vae (autoencoders), text (tokenizers and text encoders), latents (training data of the transformers),
dit (video), image, edit (transformers), grade (measure everything), controls (measure it broken). Every stage continues
where it stopped and must pass its gate. Finished weights appear under DIR/weights with the names of `nano.files()`.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch

from ..errors import KandinskyError
from . import files
from .plot import plot
from .recipe import RECIPE, Recipe, shortened
from .run import Run
from .stages import STAGES, GateError

logger = logging.getLogger("kandinsky5")


def run_stages(run: Run, recipe: Recipe, out: dict[str, Path], names: Sequence[str], *, gated: bool = True) -> None:
    """Run stages one after the other in this process."""
    for name in names:
        run.log(
            name, now="begins", torch=torch.__version__, device=run.device.type, dtype=str(run.dtype),
            threads=torch.get_num_threads(), compile=run.compile,
        )  # fmt: skip
        STAGES[name].work(run, recipe, out)
        plot(run.folder / "log.jsonl", run.folder / "log.png")
        failures = STAGES[name].gate(run, recipe, out) if gated else []
        if failures:
            raise GateError(f"Stage {name} is not good enough to go on: {'; '.join(failures)}.")


def run_lanes(lanes: int, names: Sequence[str], launch: Callable[[str], None]) -> None:
    """Call `launch` for every stage in worker threads, at most `lanes` at once, after the stages it needs."""
    waiting, running, done = list(names), {}, set()
    with ThreadPoolExecutor(lanes) as pool:
        while waiting or running:
            for name in [name for name in waiting if done.issuperset(set(STAGES[name].needs) & set(names))]:
                if len(running) < lanes:
                    waiting.remove(name)
                    running[pool.submit(launch, name)] = name
            finished: set[Future[None]] = wait(running, return_when=FIRST_COMPLETED).done
            for future in finished:
                done.add(running.pop(future))
                future.result()


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(prog="kandinsky_core.nano.train", description=__doc__.splitlines()[0])
    made.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    made.add_argument("--out", type=Path, default=Path("nano-run"), help="folder for checkpoints, logs and weights")
    made.add_argument("--weights", type=Path, help="folder of weights to write and read; default OUT/weights")
    made.add_argument("--device", default="cpu")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of activations")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--threads", type=int, default=1, help="CPU threads of a stage; 1 repeats itself exactly")
    made.add_argument(
        "--lanes", type=int, choices=range(1, 9), default=2, metavar="N", help="stages side by side, each a process"
    )
    made.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="use torch.compile")
    made.add_argument("--no-resume", action="store_true", help="ignore checkpoints in OUT")
    made.add_argument("--no-gate", action="store_true", help="go on although a stage is not good enough")
    made.add_argument("--rehearse", type=int, metavar="STEPS", help="at most STEPS steps a phase, to try the machine")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen stages; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    chosen = parser().parse_args(given)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        _run_chosen(chosen, given)
    except KandinskyError as error:
        logger.error("%s", error)
        return 1
    except subprocess.CalledProcessError:
        return 1
    return 0


def _launch(command: Sequence[str]) -> None:
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError:
        # Said now: the other lane may go on for an hour.
        logger.error("Stage %s stopped; its own message says why. Finished stages stay finished.", command[-1])
        raise


def _run_chosen(chosen: argparse.Namespace, given: Sequence[str]) -> None:
    if chosen.stage == "all":
        command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, *given, "--stage"]
        run_lanes(chosen.lanes, tuple(STAGES), lambda name: _launch([*command, name]))
        return
    torch.set_num_threads(chosen.threads)
    run = Run(
        chosen.out, torch.device(chosen.device), getattr(torch, chosen.dtype), chosen.seed, not chosen.no_resume,
        chosen.compile,
    )  # fmt: skip
    recipe = RECIPE if chosen.rehearse is None else shortened(RECIPE, chosen.rehearse)
    run_stages(
        run, recipe, files(chosen.weights or chosen.out / "weights"), (chosen.stage,),
        gated=not chosen.no_gate and chosen.rehearse is None,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
