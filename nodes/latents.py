"""Latents that outlive a failed decode: kept on disk before it starts, and the node that loads them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..kandinsky_core.errors import CheckpointError, KandinskyError, MediaError
from ..kandinsky_core.io.latents import SavedLatent, keep_latent, open_latent, prune_latents, read_latent
from ..kandinsky_core.shapes import VAE_SPATIAL, pixel_frames
from ..kandinsky_core.variants import VARIANTS
from .comfy_io import io
from .host import LATENT_FACTS, LATENTS, Latent, host

logger = logging.getLogger("kandinsky5")

CATEGORY = "Kandinsky 5/latent"
KEEP = 8  # latents kept on disk unless a node says otherwise
HIDDEN = [io.Hidden.prompt, io.Hidden.extra_pnginfo]  # what a node asks ComfyUI for to describe what it saves


class K5LoadLatent(io.ComfyNode):
    """Load a latent that was kept before decoding."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's definition."""
        return io.Schema(
            node_id="K5LoadLatent",
            display_name="Kandinsky 5 Load Latent",
            category=CATEGORY,
            description="Resume from a latent in output/latents: decode nodes keep one there before they start.",
            search_aliases=["k5", "kandinsky", "resume", "latent", "decode"],
            inputs=[
                io.Combo.Input(
                    "latent_name", options=list(host().latents()), tooltip="Latents in output/latents, newest first."
                )
            ],
            outputs=[
                io.Latent.Output(display_name="latent"),
                io.String.Output(display_name="report", tooltip="What the latent is and what it was made with."),
            ],
        )

    @classmethod
    def validate_inputs(cls, latent_name: str | None) -> bool | str:
        """Check the file's header before anything runs."""
        try:
            if latent_name is not None:
                open_latent(_locate(latent_name))
        except KandinskyError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, latent_name: str) -> tuple[str, int]:
        """Tell one content of a name from the next."""
        return latent_name, _locate(latent_name).stat().st_mtime_ns

    @classmethod
    def execute(cls, latent_name: str) -> io.NodeOutput:
        """Load it."""
        saved = read_latent(_locate(latent_name))
        return io.NodeOutput({"samples": saved.samples, LATENT_FACTS: saved.facts}, f"{latent_name}: {describe(saved)}")


def _locate(name: str) -> Path:
    known = host().latents()
    if name in known:
        return known[name]
    shown = ", ".join(list(known)[:4]) + (", …" if len(known) > 4 else "")
    raise CheckpointError(
        f"{name!r} is not there any more. Choose one of: {shown or 'nothing'}. Decode nodes write into "
        f"{host().directory('output') / LATENTS}; press R to refresh the list."
    )


def describe(saved: SavedLatent) -> str:
    """Say in one line what a latent is: size, variant, seed, autoencoder."""
    rows, columns = (side * VAE_SPATIAL for side in saved.samples.shape[-2:])
    is_clip = saved.samples.ndim == 5
    size = f"{columns} × {rows} pixels" + (f", {pixel_frames(saved.samples.shape[2])} frames" if is_clip else "")
    row = VARIANTS.get(str(saved.facts.get("variant")))
    told = [size, *([row.title] if row else [])]
    told += [f"{word} {saved.facts[key]}" for key, word in (("seed", "seed"), ("vae", "VAE")) if key in saved.facts]
    return ", ".join(told)


@contextlib.contextmanager
def kept(vae: Any, latent: Latent, count: int, hidden: Any, mode: str) -> Iterator[str]:
    """Keep the latent on disk while the block decodes it in `mode`, and name it in whatever error the block raises.

    Gives one line about it. After a decode that worked all but the newest `count` are deleted; 0 keeps nothing.
    """
    folder = host().directory("output") / LATENTS
    path = _keep(folder, vae, latent, hidden, mode) if count else None
    hint = "The latent could not be kept." if count else ""
    if path is not None:
        hint = (
            f"The latent is safe: {path}. Resume from it with the node Kandinsky 5 Load Latent, or with: "
            f"kandinsky5 decode {path}"
        )
    try:
        yield f"latent kept as {LATENTS}/{path.name}" if path else "latent not kept"
    except KandinskyError as error:
        raise type(error)(f"{error} {hint}".rstrip()) from error
    except (RuntimeError, MemoryError) as error:  # the type stays: ComfyUI tells running out of memory by it
        error.args = (f"{type(error).__name__}: {error}. {hint}".rstrip(),)
        raise
    except (OSError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise KandinskyError(f"{type(error).__name__}: {error}. {hint}".rstrip()) from error
    if path is not None:
        prune_latents(folder, count)


def _keep(folder: Path, vae: Any, latent: Latent, hidden: Any, mode: str) -> Path | None:
    """Write the latent; where that fails, say that it is not safe and go on."""
    metadata = host().provenance(hidden)
    found = host().vae_facts(vae)
    own = metadata.pop("kandinsky5", {})
    facts = own | latent.get(LATENT_FACTS, {}) | {"mode": mode} | ({"vae": found.file} if found and found.file else {})
    try:
        return keep_latent(folder, latent["samples"], facts=facts, metadata=metadata)
    except MediaError as error:
        logger.warning("%s The latent is NOT safe: if decoding fails it has to be sampled again.", error)
        return None
