"""Resume from a saved latent: build the graph that decodes it to a clip or picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..kandinsky_core.errors import CheckpointError
from ..kandinsky_core.io.latents import SavedLatent, read_latent
from ..kandinsky_core.vae.plan import AUTO, MODES
from ..kandinsky_core.variants import VARIANTS
from ..nodes import files
from ..nodes.host import LATENTS
from ..nodes.host_standalone import StandaloneHost
from .generate import NANO_VAES, USUAL, choose
from .graph import Call, Graph, Link

STEM = "kandinsky5"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """What the user asked for; None means: as the latent was made."""

    latent: str | None = None  # a path, or a name in the output folder's latents; None: the newest there
    vae: str | None = None
    mode: str | None = None
    memory: float = 0.0  # GiB of the device; 0: what is free
    fps: float | None = None
    format: str = "mp4"
    codec: str = "h264"
    crf: float = 14.0
    compile: bool = False


def build(wish: Resumption, host: StandaloneHost) -> Graph:
    """Return the graph that decodes the latent; files given as paths are made known to `host`."""
    name = _name(wish.latent, host)
    saved = read_latent(host.latents()[name])
    graph: Graph = {}

    def add(kind: str, **inputs: Any) -> Link:
        call = Call(str(len(graph) + 1), kind, kind, inputs)
        graph[call.id] = call
        return Link(call.id, 0)

    work: dict[str, Any] = {
        "vae": add("K5LoadVAE", vae_name=_vae(wish.vae, saved, host), dtype="auto"),
        "latent": add("K5LoadLatent", latent_name=name),
        "mode": wish.mode or (made if (made := saved.facts.get("mode")) in MODES else AUTO),
        "memory_gb": wish.memory,
        "keep_latents": 0,  # it is on disk
        "compile": wish.compile,
    }
    if saved.samples.ndim == 4:
        add("SaveImage", images=add("K5VAEDecodeTiled", **work), filename_prefix=STEM)
    else:
        add(
            "K5DecodeVideo", **work, fps=wish.fps or 0.0, filename_prefix=STEM, format=wish.format, codec=wish.codec,
            crf=wish.crf,
        )  # fmt: skip
    return graph


def _name(given: str | None, host: StandaloneHost) -> str:
    known = host.latents()
    if given is None:
        if not known:
            raise CheckpointError(f"There is no latent in {host.output / LATENTS}. Name one by its path.")
        return next(iter(known))
    if given in known:
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise CheckpointError(
            f"{given} is neither a file nor a latent in {host.output / LATENTS}. There is: "
            f"{', '.join(known) or 'nothing'}."
        )
    host.extra.setdefault(LATENTS, {})[given] = path
    return given


def _vae(given: str | None, saved: SavedLatent, host: StandaloneHost) -> str:
    """Return the named autoencoder, else the one the latent was made for, else the usual one of its kind."""
    kind = "hunyuan" if saved.samples.ndim == 5 else "flux"
    if given is None:
        known = files.names(files.VAE)
        made_for = [name for name in known if Path(name.removesuffix(files.BUILT_IN)).name == saved.facts.get("vae")]
        if made_for:
            return made_for[0]
        row = VARIANTS.get(str(saved.facts.get("variant")))
        if row is not None and not row.repo:
            return files.built_in(NANO_VAES[kind])
    return choose(files.VAE, given, USUAL[kind], host)
