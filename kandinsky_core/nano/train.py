"""Train the nano family from nothing: `python -m kandinsky_core.nano.train --stage all --out DIR`.

Stages: vae (autoencoder), text (tokenizers and text encoders), dit (transformer on drawn clips), grade (measure).
Every stage continues where it stopped. Finished weights appear under DIR/weights with the names of `nano.files()`.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..io.checkpoint import save_checkpoint
from ..io.identity import spec_metadata
from ..io.load import VAE_KEY
from ..text.encoder import load_text_encoder
from ..variants import Variant, variant
from . import files
from .autoencoder import (
    DECODER,
    DECODER_FINISH,
    ENCODER,
    Phase,
    drawn,
    encoding,
    fit_basis,
    new_vae,
    train_decoder,
    train_encoder,
)
from .evaluate import evaluate, load_family, measure_vae
from .run import Run
from .text import train_text
from .transformer import make_corpus, train_transformer

STAGES = ("vae", "text", "dit", "grade")
RECIPE_KEY = "kandinsky5.recipe"  # safetensors metadata: JSON of what the weights were trained with


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides the weights besides the code."""

    size_px: int = 64
    frames: int = 17
    clips: int = 2000  # the autoencoder's
    basis_clips: int = 400  # of them, for the latent basis
    test_clips: int = 24
    encoder: tuple[Phase, ...] = ENCODER
    decoder: tuple[Phase, ...] = DECODER
    decoder_finish: tuple[Phase, ...] = DECODER_FINISH
    text_steps: int = 350
    text_batch: int = 32
    corpus_clips: int = 4000  # the transformer's
    dit_steps: int = 8000
    dit_batch: int = 32
    dit_lr: float = 2e-3
    grade_count: int = 120


def shortened(recipe: Recipe, steps: int) -> Recipe:
    """The same recipe with at most `steps` steps in every phase and little data: a rehearsal, not a training."""

    def cut(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
        return tuple(
            replace(phase, steps=min(phase.steps, steps), batches=tuple((frames, 2) for frames, _ in phase.batches))
            for phase in phases
        )

    return replace(
        recipe, clips=32, test_clips=4, corpus_clips=16, grade_count=4, dit_batch=4, text_batch=4,
        encoder=cut(recipe.encoder), decoder=cut(recipe.decoder), decoder_finish=cut(recipe.decoder_finish),
        text_steps=min(recipe.text_steps, steps), dit_steps=min(recipe.dit_steps, steps),
    )  # fmt: skip


def facts(run: Run, **numbers: object) -> dict[str, str]:
    """Return the recipe entry of a weights file's metadata."""
    return {RECIPE_KEY: json.dumps({"seed": run.seed, **numbers})}


def halves(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in float16, as they ship."""
    return {name: value.detach().cpu().half() for name, value in state.items()}


def vae_stage(run: Run, row: Variant, recipe: Recipe, out: dict[str, Path]) -> None:
    """Train the autoencoder and save it."""
    clips = drawn(run.seed, recipe.clips, size_px=recipe.size_px, frames=recipe.frames, unseen=False)
    test = drawn(run.seed + 1, recipe.test_clips, size_px=recipe.size_px, frames=recipe.frames, unseen=None)
    basis = fit_basis(run, clips[: recipe.basis_clips], row.vae)
    torch.manual_seed(run.seed)
    vae = new_vae(row.vae).to(run.device)
    train_encoder(run, vae, basis, clips, test, recipe.encoder)
    train_decoder(run, vae, basis.encode, clips, test, recipe.decoder)
    train_decoder(run, vae, encoding(run, vae), clips, test, recipe.decoder_finish)
    phases = (*recipe.encoder, *recipe.decoder, *recipe.decoder_finish)
    numbers = {phase.name: [phase.batches, phase.steps] for phase in phases}
    save_checkpoint(
        out["vae"], halves(vae.state_dict()), {VAE_KEY: json.dumps(asdict(row.vae)), **facts(run, **numbers)}
    )


def text_stage(run: Run, row: Variant, recipe: Recipe, out: dict[str, Path]) -> None:  # noqa: ARG001
    """Train the text encoders and save them."""
    train_text(run, (out["text_encoder"], out["clip"]), steps=recipe.text_steps, batch=recipe.text_batch)


def dit_stage(run: Run, row: Variant, recipe: Recipe, out: dict[str, Path]) -> None:
    """Train the transformer on latents of the basis, which need no trained autoencoder, and save it."""
    text = load_text_encoder(out["text_encoder"], out["clip"], dtype=torch.float32, device=run.device)
    clips = drawn(run.seed, recipe.basis_clips, size_px=recipe.size_px, frames=recipe.frames, unseen=False)
    corpus = make_corpus(
        run, fit_basis(run, clips, row.vae).encode, row.vae.scaling_factor, text,
        count=recipe.corpus_clips, size_px=recipe.size_px, frames=recipe.frames,
    )  # fmt: skip
    model = train_transformer(
        run, row.spec, corpus, steps=recipe.dit_steps, batch=recipe.dit_batch, lr=recipe.dit_lr
    )
    numbers = {"steps": recipe.dit_steps, "batch": recipe.dit_batch, "clips": recipe.corpus_clips}
    save_checkpoint(out["model"], halves(model.state_dict()), {**spec_metadata(row), **facts(run, **numbers)})


def grade_stage(run: Run, row: Variant, recipe: Recipe, out: dict[str, Path]) -> None:  # noqa: ARG001
    """Measure the saved weights; writes grade.json and grade.png."""
    family = load_family(out, run.device)
    report = {
        "vae": measure_vae(family.vae, min(64, recipe.grade_count), size_px=recipe.size_px, frames=recipe.frames),
        **evaluate(
            family, recipe.grade_count, frames=recipe.frames, size_px=recipe.size_px, sheet=run.folder / "grade.png",
            note=lambda what: run.log("grade", now=what),
        ),
    }  # fmt: skip
    (run.folder / "grade.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


STAGE: dict[str, Callable[[Run, Variant, Recipe, dict[str, Path]], None]] = {
    "vae": vae_stage, "text": text_stage, "dit": dit_stage, "grade": grade_stage,
}  # fmt: skip


def run_stages(run: Run, recipe: Recipe, out: dict[str, Path], stages: Sequence[str] = STAGES) -> None:
    """Run stages in order for the nano video variant."""
    for stage in stages:
        STAGE[stage](run, variant("nano_video"), recipe, out)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(prog="kandinsky_core.nano.train", description=__doc__.splitlines()[0])
    made.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    made.add_argument("--out", type=Path, default=Path("nano-run"), help="folder for checkpoints, log and weights")
    made.add_argument("--weights", type=Path, help="folder of weights to write and read; default OUT/weights")
    made.add_argument("--device", default="cpu")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of activations")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--threads", type=int, default=1, help="CPU threads; 1 gives the same weights every time")
    made.add_argument("--no-resume", action="store_true", help="ignore checkpoints in OUT")
    made.add_argument("--rehearse", type=int, metavar="STEPS", help="at most STEPS steps a phase, to try the machine")
    return made


def main(arguments: list[str] | None = None) -> None:
    """Run the chosen stages."""
    chosen = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(chosen.threads)
    run = Run(
        chosen.out, torch.device(chosen.device), getattr(torch, chosen.dtype), chosen.seed, not chosen.no_resume
    )
    recipe = Recipe() if chosen.rehearse is None else shortened(Recipe(), chosen.rehearse)
    out = files(chosen.weights or chosen.out / "weights")
    run_stages(run, recipe, out, STAGES if chosen.stage == "all" else (chosen.stage,))


if __name__ == "__main__":
    main()
