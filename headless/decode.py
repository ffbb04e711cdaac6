"""Resume from a saved latent: build the graph that decodes it to a clip or picture."""

from __future__ import annotations

from pathlib import Path

from ..kandinsky_core.errors import CheckpointError
from ..kandinsky_core.io.latents import SavedLatent, read_latent
from ..kandinsky_core.variants import VARIANTS
from ..nodes import files
from ..nodes.host import LATENTS
from ..nodes.host_standalone import StandaloneHost
from .generate import NANO_VAES, USUAL, choose
from .graph import Call, Graph, Link

FPS = 24.0  # of clips whose latent does not tell


def build(latent: str | None, vae: str | None, fps: float | None, host: StandaloneHost) -> Graph:
    """Return the graph that decodes `latent`: a path, a name in the output folder's latents, None for the newest."""
    name = _name(latent, host)
    saved = read_latent(host.latents()[name])
    calls = [
        Call("1", "K5LoadVAE", "K5LoadVAE", {"vae_name": _vae(vae, saved, host), "dtype": "auto"}),
        Call("2", "K5LoadLatent", "K5LoadLatent", {"latent_name": name}),
        Call("3", "K5VAEDecode", "K5VAEDecode", {"vae": Link("1", 0), "latent": Link("2", 0)}),
    ]
    stem = "kandinsky5"
    if saved.samples.ndim == 4:
        calls.append(Call("4", "SaveImage", "SaveImage", {"images": Link("3", 0), "filename_prefix": stem}))
    else:
        rate = fps or float(saved.facts.get("fps", FPS))
        calls += [
            Call("4", "CreateVideo", "CreateVideo", {"images": Link("3", 0), "fps": rate}),
            Call("5", "SaveVideo", "SaveVideo", {"video": Link("4", 0), "filename_prefix": stem, "format": "mp4"}),
        ]
    return {call.id: call for call in calls}


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
