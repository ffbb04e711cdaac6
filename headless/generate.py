"""The short way: build the workflow graph for one prompt, as the bundled workflows do it."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..kandinsky_core.errors import CheckpointError, ShapeError
from ..kandinsky_core.io import identify, open_checkpoint
from ..kandinsky_core.variants import Variant
from ..nodes import files
from ..nodes.host_standalone import StandaloneHost
from .graph import Call, Graph, Link

NANO = "nano"

# Usual file names of what goes with the published weights, for text encoders and autoencoders not named by the user.
USUAL = {
    files.TEXT_ENCODER: ("*qwen*2.5*vl*7b*", "*qwen*vl*"),
    files.CLIP_ENCODER: ("clip_l*", "*clip*large*patch14*", "*clip_l*"),
    "hunyuan": ("*hunyuan*video*vae*", "*hunyuan*vae*"),
    "flux": ("ae.*", "*flux*vae*", "*flux*"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the user asked for; None means: as the model was released."""

    prompt: str
    negative: str | None = None
    image: Path | None = None
    model: str = NANO
    text_encoder: str | None = None
    clip: str | None = None
    vae: str | None = None
    variant: str | None = None
    dtype: str = "auto"
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    shift: float | None = None
    seed: int = 0


def build(wish: Wish, host: StandaloneHost) -> Graph:
    """Return the graph that fulfils the wish; files given as paths are made known to `host`."""
    model = _choose(files.MODEL, wish.model, (), wish.model == NANO, host)
    path = files.locate(files.MODEL, model)
    row = identify(open_checkpoint(path), wish.variant).variant
    if wish.image is not None and not row.spec.visual_cond:
        raise ShapeError(
            f"{row.title} takes no start image. Leave out --image, or use a model that continues one (--model nano)."
        )
    is_nano = model.endswith(files.BUILT_IN)
    text = _choose(files.TEXT_ENCODER, wish.text_encoder, USUAL[files.TEXT_ENCODER], is_nano, host)
    clip = _choose(files.CLIP_ENCODER, wish.clip, USUAL[files.CLIP_ENCODER], is_nano, host)
    vae = _choose(files.VAE, wish.vae, USUAL[row.vae.kind], is_nano, host)

    graph: Graph = {}

    def add(kind: str, **inputs: Any) -> str:
        name = str(len(graph) + 1)
        graph[name] = Call(id=name, type=kind, title=kind, inputs=inputs)
        return name

    loaded = add("K5LoadModel", model_name=model, variant=wish.variant or "auto", dtype=wish.dtype)
    encoders = add("K5LoadTextEncoder", qwen_name=text, clip_name=clip, dtype=wish.dtype)
    autoencoder = add("K5LoadVAE", vae_name=vae, dtype="auto")
    size = _size(wish, row)
    encoded = add(
        "K5EncodeText",
        clip=Link(encoders, 0),
        model=Link(loaded, 0),
        prompt=wish.prompt,
        negative_prompt=row.negative if wish.negative is None else wish.negative,
        template="auto" if size["length"] > 1 else "image",
        max_tokens=0,
    )
    conditioning, latent = (Link(encoded, 0), Link(encoded, 1)), None
    if wish.image is not None:
        picture = add("LoadImage", image=str(wish.image))
        start = add(
            "K5ImageToVideo",
            positive=conditioning[0],
            negative=conditioning[1],
            vae=Link(autoencoder, 0),
            start_image=Link(picture, 0),
            batch_size=1,
            fit="crop",
            **size,
        )
        conditioning, latent = (Link(start, 0), Link(start, 1)), Link(start, 2)
    sampled = add(
        "K5Sample",
        model=Link(loaded, 0),
        positive=conditioning[0],
        negative=conditioning[1],
        latent=latent or Link(add("K5EmptyLatent", batch_size=1, **size), 0),
        seed=wish.seed,
        steps=wish.steps or 0,
        cfg=-1.0 if wish.guidance is None else wish.guidance,
        shift=wish.shift or 0.0,
        sampler_name="euler",
        first_frame="auto",
        denoise=1.0,
    )
    decoded = add("K5VAEDecode", vae=Link(autoencoder, 0), latent=Link(sampled, 0))
    if size["length"] == 1:
        add("SaveImage", images=Link(decoded, 0), filename_prefix="kandinsky5")
    else:
        video = add("CreateVideo", images=Link(decoded, 0), fps=float(row.fps))
        add("SaveVideo", video=Link(video, 0), filename_prefix="kandinsky5", format="mp4")
    return graph


def _size(wish: Wish, row: Variant) -> dict[str, int]:
    height, width = row.sizes[0]
    return {
        "width": width if wish.width is None else wish.width,
        "height": height if wish.height is None else wish.height,
        "length": row.frames[0] if wish.frames is None else wish.frames,
    }


def _choose(kind: str, given: str | None, usual: tuple[str, ...], is_nano: bool, host: StandaloneHost) -> str:
    """Return the loader's name for a file: built in, given as path or name, or the usual one in the models folder."""
    names = files.names(kind)
    if is_nano and given in (None, NANO):
        found = next((name for name in names if name.endswith(files.BUILT_IN)), None)
        if found is None:
            raise CheckpointError("The built-in nano weights are missing from this installation. Install it again.")
        return found
    if given is not None:
        if given in names:
            return given
        path = Path(given).expanduser()
        if not path.exists():
            raise CheckpointError(
                f"{given} is neither a file nor a name in {host.models}. There is: {', '.join(names) or 'nothing'}."
            )
        # Known by what was given, not by the file's name: two folders may hold files of one name.
        host.extra.setdefault(files.FOLDERS[kind][0], {})[given] = path
        return given
    for pattern in usual:
        for name in names:
            if fnmatch(name.lower(), pattern) and not name.endswith(files.BUILT_IN):
                return name
    raise CheckpointError(
        f"No {kind} in {host.models} looks like what these weights need ({', '.join(usual)}). "
        f"Put one there or name it with --{kind.replace('_', '-')}."
    )
