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
from ..nodes.editing import AS_IMAGE
from ..nodes.host_standalone import StandaloneHost
from ..nodes.latents import KEEP
from ..nodes.memory import AUTO, BUDGETS, KEPT
from ..nodes.size import CUSTOM
from .estimate import free_gb
from .graph import Call, Graph, Link

# Short names of the built-in models, and what `nano.files` calls them and the autoencoders they need.
NANO = {"nano": "model", "nano-image": "image_model", "nano-edit": "edit_model"}
NANO_VAES = {"hunyuan": "vae", "flux": "image_vae"}

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
    model: str = "nano"
    text_encoder: str | None = None
    clip: str | None = None
    vae: str | None = None
    variant: str | None = None
    dtype: str = "auto"
    text_dtype: str | None = None  # of Qwen; None: as `dtype`
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    shift: float | None = None
    seed: int = 0
    budget: str | None = None  # device memory to plan for; None: what is free, and only where not everything fits
    masses: str | None = None  # measure NABLA with these shares P instead of making a clip
    window: tuple[int, int, int] = (11, 3, 3)


def build(wish: Wish, host: StandaloneHost) -> Graph:
    """Return the graph that fulfils the wish; files given as paths are made known to `host`."""
    model = choose(
        files.MODEL, files.built_in(NANO[wish.model]) if wish.model in NANO else wish.model, (), host
    )
    path = files.locate(files.MODEL, model)
    row = identify(open_checkpoint(path), wish.variant).variant
    _check_image(wish, row)

    def companion(kind: str, given: str | None, key: str, usual: tuple[str, ...]) -> str:
        is_own = given is None and not row.repo  # nothing but the built-in family has no published weights
        return choose(kind, files.built_in(key) if is_own else given, usual, host)

    text = companion(files.TEXT_ENCODER, wish.text_encoder, "text_encoder", USUAL[files.TEXT_ENCODER])
    clip = companion(files.CLIP_ENCODER, wish.clip, "clip", USUAL[files.CLIP_ENCODER])
    vae = companion(files.VAE, wish.vae, NANO_VAES[row.vae.kind], USUAL[row.vae.kind])

    graph: Graph = {}

    def add(kind: str, **inputs: Any) -> str:
        name = str(len(graph) + 1)
        graph[name] = Call(id=name, type=kind, title=kind, inputs=inputs)
        return name

    loaded = add("K5LoadModel", model_name=model, variant=wish.variant or "auto", dtype=wish.dtype)
    encoders = add("K5LoadTextEncoder", qwen_name=text, clip_name=clip, dtype=wish.text_dtype or wish.dtype)
    autoencoder = add("K5LoadVAE", vae_name=vae, dtype="auto")
    size = _size(wish, row)
    model_link, clip_link, plan_link = Link(loaded, 0), Link(encoders, 0), None
    if wish.budget is not None:
        planned = add("K5MemoryPlan", **_plan(wish.budget), **size, model=model_link, clip=clip_link)
        model_link, clip_link, plan_link = Link(planned, 0), Link(planned, 3), Link(planned, 1)
    words = {
        "clip": clip_link,
        "model": model_link,
        "prompt": wish.prompt,
        "negative_prompt": row.negative if wish.negative is None else wish.negative,
    }
    picture = None if wish.image is None else Link(add("LoadImage", image=str(wish.image)), 0)
    if picture is not None and row.spec.instruct_type is not None:
        start = add(
            "K5ImageEdit",
            **words,
            vae=Link(autoencoder, 0),
            image=picture,
            size=AS_IMAGE if wish.width is None and wish.height is None else CUSTOM,
            width=size["width"],
            height=size["height"],
            fit="crop",
        )
        latent = Link(start, 2)
    else:
        template = "auto" if size["length"] > 1 else "image"
        start = add("K5EncodeText", **words, template=template, max_tokens=0)
        if picture is None:
            latent = Link(add("K5EmptyLatent", batch_size=1, **size), 0)
        else:
            start = add(
                "K5ImageToVideo",
                positive=Link(start, 0),
                negative=Link(start, 1),
                vae=Link(autoencoder, 0),
                start_image=picture,
                batch_size=1,
                fit="crop",
                **size,
            )
            latent = Link(start, 2)
    sampling: dict[str, Any] = {
        "model": model_link, "positive": Link(start, 0), "negative": Link(start, 1), "latent": latent,
        "seed": wish.seed, "steps": wish.steps or 0, "cfg": -1.0 if wish.guidance is None else wish.guidance,
        "shift": wish.shift or 0.0,
    }  # fmt: skip
    if wish.masses is not None:
        t, h, w = wish.window
        add("K5AttentionError", **sampling, P_values=wish.masses, wT=t, wH=h, wW=w)
        return graph
    sampled = add("K5Sample", **sampling, sampler_name="euler", first_frame="auto", denoise=1.0)
    planned_decode = {} if plan_link is None else {"plan": plan_link}
    decoded = add(
        "K5VAEDecodeTiled", vae=Link(autoencoder, 0), latent=Link(sampled, 0), mode=AUTO, memory_gb=0.0,
        keep_latents=KEEP, **planned_decode,
    )  # fmt: skip
    if size["length"] == 1:
        add("SaveImage", images=Link(decoded, 0), filename_prefix="kandinsky5")
    else:
        video = add("CreateVideo", images=Link(decoded, 0), fps=float(row.fps))
        add("SaveVideo", video=Link(video, 0), filename_prefix="kandinsky5", format="mp4")
    return graph


def _plan(budget: str) -> dict[str, Any]:
    """Return the inputs of a memory plan for `--budget`; everything but the budget is automatic."""
    named = budget if budget == AUTO else f"{budget} GB"
    inputs: dict[str, Any] = {
        "batch_size": 1, "budget": named if named in BUDGETS else CUSTOM, "custom_gb": 12.0, "attention": AUTO,
        "kept": KEPT, "cfg": -1.0, "steps": 0, "resident_blocks": -1, "prefetch": -1, "hidden_pieces": 0,
        "head_groups": 0, "stream_text": AUTO, "decode_mode": AUTO, "measure": False,
    }  # fmt: skip
    if inputs["budget"] == CUSTOM:
        inputs["custom_gb"] = free_gb(budget)
    return inputs


def _size(wish: Wish, row: Variant) -> dict[str, int]:
    height, width = row.sizes[0]
    return {
        "width": width if wish.width is None else wish.width,
        "height": height if wish.height is None else wish.height,
        "length": row.frames[0] if wish.frames is None else wish.frames,
    }


def _check_image(wish: Wish, row: Variant) -> None:
    """Refuse a picture that the model has no use for, and a length where the picture is edited."""
    if wish.image is None:
        return
    is_editing = row.spec.instruct_type is not None
    if not (row.spec.visual_cond or is_editing):
        raise ShapeError(
            f"{row.title} takes no picture. Leave out --image, or use a model that continues one (--model nano) or "
            "changes one (--model nano-edit)."
        )
    if is_editing and wish.frames not in (None, 1):
        raise ShapeError(f"{row.title} changes a picture; it has no {wish.frames} frames. Leave out --frames.")


def choose(kind: str, given: str | None, usual: tuple[str, ...], host: StandaloneHost) -> str:
    """Return the loader's name for a file: given as path or name, or the usual one in the models folder."""
    names = files.names(kind)
    if given is not None:
        if given in names:
            return given
        if given.endswith(files.BUILT_IN):
            raise CheckpointError(f"{given} is missing from this installation. Install it again.")
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
