"""The sampler node: the released schedule, guidance and first-frame handling around the host's sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kandinsky_core.errors import KandinskyError, ShapeError
from ..kandinsky_core.sampling import Known, keep_known, normalise_first_frames, timesteps
from ..kandinsky_core.sampling.conditioning import NORM_FRAMES
from ..kandinsky_core.sparse.nabla import Nabla
from ..kandinsky_core.sparse.report import summary
from ..kandinsky_core.variants import Variant
from .comfy_io import io
from .conditioning import with_values
from .host import (
    KNOWN_EDIT,
    KNOWN_FRAMES,
    KNOWN_MASK,
    LATENT_FACTS,
    Conditioning,
    Latent,
    SampleRequest,
    host,
)
from .memory import memory_lines

CATEGORY = "Kandinsky 5/sampling"
AUTO, ON, OFF = "auto", "on", "off"
AS_RELEASED = -1


@dataclass(frozen=True, slots=True)
class Settings:
    """Sampler settings after presets are filled in."""

    steps: int
    guidance: float
    shift: float
    denoise: float


class K5Sample(io.ComfyNode):
    """Sample with the released settings of the connected model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's definition."""
        return io.Schema(
            node_id="K5Sample",
            display_name="Kandinsky 5 Sampler",
            category=CATEGORY,
            description="Sample with the settings the model was released with; every one can be overridden.",
            search_aliases=["k5", "kandinsky", "ksampler", "denoise"],
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input("latent"),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Noise is drawn on the CPU: a seed gives the same noise on every device.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="0: as released (50; 16 for distilled weights). Fewer is faster.",
                ),
                io.Float.Input(
                    "cfg",
                    default=-1.0,
                    min=-1.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance: how strongly the prompt counts. -1: as released (5 video, 3.5 image, "
                    "1 distilled). At 1 the negative prompt is not used and a step takes half the time.",
                ),
                io.Float.Input(
                    "shift",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Share of steps spent on the composition. 0: as released (5; 10 for image-to-video "
                    "and 10 s; 3 for images), or what a ModelSamplingSD3 node before this one sets.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=host().sampler_names(),
                    default="euler",
                    tooltip="Integration method; the models were released with euler.",
                ),
                io.Combo.Input(
                    "first_frame",
                    options=[AUTO, ON, OFF],
                    default=AUTO,
                    advanced=True,
                    tooltip="Image-to-video: pull brightness and contrast of the first frames towards the rest. "
                    "'auto': for models released with it.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="1: from pure noise. Below 1 the latent on the socket is kept in part.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent"),
                io.String.Output(display_name="report", tooltip="The settings that were used."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Conditioning,
        negative: Conditioning,
        latent: Latent,
        seed: int,
        steps: int,
        cfg: float,
        shift: float,
        sampler_name: str,
        first_frame: str,
        denoise: float,
    ) -> io.NodeOutput:
        """Fill in presets, sample, put the known frames back."""
        row = host().variant_of(model)
        if row is None:
            raise KandinskyError(
                "The connected model is not a Kandinsky 5 one. Use the Kandinsky 5 Model Loader or core's loader."
            )
        for name, prompt in (("positive", positive), ("negative", negative)):
            _check_text(name, prompt, row)
        latent = _checked_latent(latent, row)
        known = known_frames(positive, row, latent["samples"])
        _check_edit(positive, row, latent["samples"])
        negative = _same_start(positive, negative, row)
        settings = _settings(model, row, steps, cfg, shift, denoise)
        request = SampleRequest(
            positive=positive,
            negative=None if abs(settings.guidance - 1) <= 1e-6 else negative,
            latent=latent,
            seed=seed,
            sigmas=timesteps(settings.steps, settings.shift, settings.denoise),
            guidance=settings.guidance,
            sampler_name=sampler_name,
        )
        samples = host().sample(model, request)
        normalises = _wants_normalisation(first_frame, row, known)
        if known is not None:
            samples = _finish_start(samples, known, row.vae.scaling_factor, normalises)
        if not bool(torch.isfinite(samples).all()):
            raise KandinskyError(
                "The sampler returned NaN: the weights are damaged or overflow in this precision. "
                "Set dtype to bf16 or fp32 in the Model Loader."
            )
        report = (
            _report(row, settings, sampler_name, seed),
            _start_report(samples, known, normalises),
            "edits the given picture" if KNOWN_EDIT in positive[0][1] else "",
            _attention_report(model),
            memory_lines(model, row, latent, settings.guidance, max(len(part[0][0]) for part in positive)),
            host().variant_note(model),
        )
        facts = {"variant": row.name, "fps": row.fps, "seed": seed}
        return io.NodeOutput({**latent, "samples": samples, LATENT_FACTS: facts}, "\n".join(filter(None, report)))


def _check_text(name: str, prompt: Conditioning, row: Variant) -> None:
    """Refuse features of another text encoder before anything runs; a missing CLIP vector is one, too."""
    wanted = (row.spec.in_text_dim, row.spec.in_text_dim2)
    for features, extras in prompt:
        pooled = extras.get("pooled_output")
        given = (features.shape[-1], None if pooled is None else pooled.shape[-1])
        if given != wanted:
            raise ShapeError(
                f"{row.title} takes text features {wanted[0]} wide and a pooled vector of {wanted[1]}; the {name} "
                f"prompt brings {given[0]} and {given[1] or 'none'}. Load the text encoders that belong to this "
                "model: " + ("Qwen2.5-VL 7B and CLIP ViT-L/14." if row.repo else "the built-in ones.")
            )


def _same_start(positive: Conditioning, negative: Conditioning, row: Variant) -> Conditioning:
    """Return the negative prompt with the positive one's start or picture: both passes must see the same."""
    keys = (KNOWN_FRAMES, KNOWN_MASK, KNOWN_EDIT)
    start = {key: positive[0][1][key] for key in keys if key in positive[0][1]}
    if not start and not {KNOWN_FRAMES, KNOWN_EDIT}.isdisjoint(negative[0][1]):
        raise ShapeError(
            f"{row.title}: only the negative prompt has a picture. Connect both outputs of the node that brings it "
            "(Image to Video, Image Edit)."
        )
    return with_values(negative, start)


def _checked_latent(latent: Latent, row: Variant) -> Latent:
    """Return the latent with the number of axes the model wants; a picture is a clip of one frame to a video model."""
    samples = latent["samples"]
    is_image = row.vae.kind == "flux"
    if is_image and samples.ndim == 5:
        if samples.shape[2] != 1:
            raise ShapeError(
                f"{row.title} makes single pictures; the latent has {samples.shape[2]} frames. Set length to 1."
            )
        return {**latent, "samples": samples[:, :, 0]}
    if not is_image and samples.ndim == 4:
        return {**latent, "samples": samples.unsqueeze(2)}
    return latent


def known_frames(positive: Conditioning, row: Variant, samples: Tensor) -> Tensor | None:
    """Return the raw latents the clip starts with, None for text-to-video."""
    known = positive[0][1].get(KNOWN_FRAMES)
    if known is None:
        return None
    if not row.spec.visual_cond:
        raise ShapeError(
            f"{row.title} takes no start image. Use an image-to-video model, or K5 Empty Latent without one."
        )
    if known.shape[3:] != samples.shape[3:] or known.shape[2] > samples.shape[2]:
        raise ShapeError(
            f"The start image has latent size {tuple(known.shape[2:])}, the clip {tuple(samples.shape[2:])} "
            "(frames, rows, columns). Use the latent of the same Image to Video node."
        )
    return known


def _check_edit(positive: Conditioning, row: Variant, samples: Tensor) -> None:
    """Refuse a picture to edit that the model or the latent has no place for."""
    picture = positive[0][1].get(KNOWN_EDIT)
    if picture is None:
        return
    if row.spec.instruct_type is None:
        raise ShapeError(
            f"{row.title} cannot edit pictures. Load an image-editing (I2I) model, "
            "or take the prompt from Kandinsky 5 Text Encode."
        )
    if picture.shape[2:] != samples.shape[2:]:
        raise ShapeError(
            f"The picture to edit has latent size {tuple(picture.shape[2:])}, the latent {tuple(samples.shape[2:])} "
            "(rows, columns). Use the latent of the same Image Edit node."
        )


def _settings(
    model: Any, row: Variant, steps: int, cfg: float, shift: float, denoise: float
) -> Settings:
    if cfg < 0 and cfg != AS_RELEASED:
        raise KandinskyError(f"cfg {cfg:g} is below 0. Use {AS_RELEASED} for the released value, or 0 and above.")
    return Settings(
        steps=steps or row.steps,
        guidance=row.guidance if cfg == AS_RELEASED else cfg,
        shift=shift or host().shift_of(model) or row.shift,
        denoise=denoise,
    )


def _wants_normalisation(first_frame: str, row: Variant, known: Tensor | None) -> bool:
    return known is not None and (first_frame == ON or (first_frame == AUTO and row.first_frame_norm))


def _finish_start(samples_BCTHW: Tensor, known_BCTHW: Tensor, scale: float, normalises: bool) -> Tensor:
    """Put the clean frames back and normalise in model units (the constants are meant for scaled latents)."""
    scaled = keep_known(samples_BCTHW, Known(frames_BCTHW=known_BCTHW)) * scale
    return (normalise_first_frames(scaled) if normalises else scaled) / scale


def _report(row: Variant, settings: Settings, sampler_name: str, seed: int) -> str:
    line = (
        f"{row.title}: {settings.steps} steps, guidance {settings.guidance:g}, shift {settings.shift:g}, "
        f"{sampler_name}, seed {seed}"
    )
    return line + (f", denoise {settings.denoise:g}" if settings.denoise < 1 else "")


def _attention_report(model: Any) -> str:
    run = host().attention_of(model)
    return summary(run).partition("\n")[0] if isinstance(run, Nabla) else ""


def _start_report(samples_BCTHW: Tensor, known_BCTHW: Tensor | None, normalises: bool) -> str:
    if known_BCTHW is None:
        return ""
    line = f"starts with {known_BCTHW.shape[2]} given latent frame(s)"
    if normalises and samples_BCTHW.shape[2] > NORM_FRAMES:
        return f"{line}, first {NORM_FRAMES} normalised"
    if normalises:
        return f"{line}, not normalised: that takes more than {NORM_FRAMES} latent frames"
    return line
