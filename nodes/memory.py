"""Memory nodes: what a run needs before anything is loaded, and a plan that makes it fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..kandinsky_core.errors import KandinskyError
from ..kandinsky_core.memory.budget import GB, PROFILES, describe, describe_sampling, make_plan
from ..kandinsky_core.memory.estimate import PRECISIONS, Job, estimate, sample_stage
from ..kandinsky_core.memory.plan import Plan
from ..kandinsky_core.memory.report import size, summary, table
from ..kandinsky_core.shapes import PATCH, VAE_SPATIAL, VideoShape, pixel_frames
from ..kandinsky_core.sparse.nabla import Nabla, policy
from ..kandinsky_core.vae.plan import MODES
from ..kandinsky_core.variants import VARIANTS, Variant
from .comfy_io import io
from .host import Host, Latent, Measured, host
from .size import size_inputs, size_message

CATEGORY = "Kandinsky 5/memory"
AUTO, CUSTOM, ON, OFF = "auto", "custom", "on", "off"
DENSE, SPARSE = "dense", "nabla"
BUDGETS = (AUTO, *PROFILES, CUSTOM)
KEPT = 0.25  # share of the attention that is kept, where it is not known
MemoryPlan = io.Custom("K5_MEMORY_PLAN")


def _budget_inputs() -> list[Any]:
    return [
        io.Combo.Input(
            "budget", options=list(BUDGETS), default=AUTO,
            tooltip="Device memory to plan for. 'auto': what is free here, other models evicted. '12 GB' and so on: "
            "what a card of that size has left beside the desktop. 'custom': the number below.",
        ),
        io.Float.Input(
            "custom_gb", default=12.0, min=0.1, max=1000.0, step=0.1, round=0.01,
            tooltip="Free device memory in GB (10^9 bytes); for 'custom'.",
        ),
    ]  # fmt: skip


def _attention_inputs() -> list[Any]:
    return [
        io.Combo.Input(
            "attention", options=[AUTO, DENSE, SPARSE], default=AUTO,
            tooltip="'auto': what the connected model has, else as trained at this size.",
        ),
        io.Float.Input(
            "kept", default=KEPT, min=0.01, max=1.0, step=0.01, round=0.001, advanced=True,
            tooltip="Share of the attention that NABLA keeps; a run's NABLA Report tells the real one.",
        ),
        io.Float.Input(
            "cfg", default=-1.0, min=-1.0, max=100.0, step=0.1, round=0.01, advanced=True,
            tooltip="Guidance: -1 as released; at 1 there is no second pass.",
        ),
        io.Int.Input("steps", default=0, min=0, max=1000, advanced=True, tooltip="0: as released."),
    ]  # fmt: skip


class K5MemoryEstimate(io.ComfyNode):
    """Say what a run needs; nothing is loaded and no GPU is needed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's definition."""
        return io.Schema(
            node_id="K5MemoryEstimate",
            display_name="Kandinsky 5 Memory Estimate",
            category=CATEGORY,
            description="Memory, transfers and time class of a run, stage by stage, what fits on 8, 12, 16 and 24 GB, "
            "and the cheapest change that makes it fit. Needs neither weights nor a GPU.",
            search_aliases=["k5", "kandinsky", "vram", "out of memory", "how much memory", "block swap"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "variant", options=list(VARIANTS), default="lite_t2v_5s_sft",
                    tooltip="Which model; a connected one takes its place.",
                ),
                *size_inputs(),
                io.Combo.Input(
                    "precision", options=list(PRECISIONS), default="bf16",
                    tooltip="How the transformer's weights are held; 'published' is bf16 with float32 modulation. A "
                    "connected model takes its place.",
                ),
                *_attention_inputs(),
                io.Boolean.Input(
                    "start_image", default=False, advanced=True,
                    tooltip="A start image or a picture to edit is encoded, too.",
                ),
                *_budget_inputs(),
                io.Model.Input("model", optional=True, tooltip="Takes the place of variant, precision and attention."),
            ],
            outputs=[io.String.Output(display_name="report", tooltip="Show it with Preview as Text.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, width: int | None, height: int | None, length: int | None) -> bool | str:
        """Name an illegal size before anything runs."""
        return size_message(width, height, length)

    @classmethod
    def execute(
        cls, variant: str, width: int, height: int, length: int, batch_size: int, precision: str, attention: str,
        kept: float, cfg: float, steps: int, start_image: bool, budget: str, custom_gb: float, model: Any = None,
    ) -> io.NodeOutput:  # fmt: skip
        """Estimate."""
        row = VARIANTS[variant] if model is None else _row(model)
        job = Job(
            row=row,
            shape=VideoShape(width_px=width, height_px=height, frames=length),
            batch=batch_size,
            precision=precision if model is None else host().weights_of(model),
            guidance=None if cfg < 0 else cfg,
            steps=steps or None,
            has_start=start_image or row.needs_image,
        )
        job = _on_this_device(with_attention(host(), job, model, attention, kept), budget)
        mode = host().memory_mode()
        report = summary(job, budget_bytes=budget_bytes(budget, custom_gb))
        return io.NodeOutput(f"{report}\nHere weights are moved by: {mode.name} ({mode.note}).")


class K5MemoryPlan(io.ComfyNode):
    """Make a model run within a budget."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's definition."""
        return io.Schema(
            node_id="K5MemoryPlan",
            display_name="Kandinsky 5 Memory Plan",
            category=CATEGORY,
            description="Make a model run within a budget: chooses what stays on the device, what travels and in which "
            "pieces the work is done, and says so. In ComfyUI weights are moved by ComfyUI.",
            search_aliases=["k5", "kandinsky", "vram", "low vram", "block swap", "offload", "out of memory"],
            inputs=[
                io.Model.Input("model"),
                *size_inputs(),
                *_budget_inputs(),
                *_attention_inputs(),
                io.Int.Input(
                    "resident_blocks", default=-1, min=-1, max=1000, advanced=True,
                    tooltip="Blocks that stay on the device; -1: automatic. ComfyUI's own loader decides this itself.",
                ),
                io.Int.Input(
                    "prefetch", default=-1, min=-1, max=16, advanced=True,
                    tooltip="Blocks copied ahead of the one that computes; -1: automatic (1).",
                ),
                io.Int.Input(
                    "hidden_pieces", default=0, min=0, max=256, advanced=True,
                    tooltip="At least so many pieces of the feed-forward; 0: automatic.",
                ),
                io.Int.Input(
                    "head_groups", default=0, min=0, max=64, advanced=True,
                    tooltip="Groups of heads that attention runs in; 0: automatic.",
                ),
                io.Combo.Input(
                    "stream_text", options=[AUTO, ON, OFF], default=AUTO, advanced=True,
                    tooltip="Whether the text encoder visits the device layer by layer.",
                ),
                io.Combo.Input(
                    "decode_mode", options=[AUTO, *MODES], default=AUTO, advanced=True,
                    tooltip="How the latent is decoded.",
                ),
                io.Boolean.Input(
                    "measure", default=False, advanced=True,
                    tooltip="Count the tensors of each run on a processor, for the sampler's report; takes some time. "
                    "On a GPU the peak is always reported.",
                ),
                io.Latent.Input("latent", optional=True, tooltip="Takes the place of the sizes."),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder, to run as planned."),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                MemoryPlan.Output(display_name="plan"),
                io.String.Output(display_name="report", tooltip="Every choice, and the estimate of each stage."),
                io.Clip.Output(display_name="clip", tooltip="The connected text encoder, as planned."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, width: int | None, height: int | None, length: int | None) -> bool | str:
        """Name an illegal size before anything runs."""
        return size_message(width, height, length)

    @classmethod
    def execute(
        cls, model: Any, width: int, height: int, length: int, batch_size: int, budget: str, custom_gb: float,
        attention: str, kept: float, cfg: float, steps: int, resident_blocks: int, prefetch: int, hidden_pieces: int,
        head_groups: int, stream_text: str, decode_mode: str, measure: bool, latent: Latent | None = None,
        clip: Any = None,
    ) -> io.NodeOutput:  # fmt: skip
        """Plan; the given model and text encoder stay as they are."""
        shape, batch = (
            (VideoShape(width_px=width, height_px=height, frames=length), batch_size)
            if latent is None
            else shape_of(latent)
        )
        job = Job(
            row=_row(model), shape=shape, batch=batch, precision=host().weights_of(model),
            guidance=None if cfg < 0 else cfg, steps=steps or None, is_cpu=host().is_processor,
        )  # fmt: skip
        job = with_attention(host(), job, model, attention, kept)
        room = budget_bytes(budget, custom_gb)
        fixed: dict[str, Any] = {
            name: value
            for name, value, automatic in (
                ("resident_blocks", resident_blocks, -1),
                ("prefetch", prefetch, -1),
                ("hidden_pieces", hidden_pieces, 0),
                ("head_groups", head_groups, 0),
            )
            if value != automatic
        }
        if stream_text != AUTO:
            fixed["streams_text"] = stream_text == ON
        if decode_mode != AUTO:
            fixed["decode_mode"] = decode_mode
        plan = make_plan(job, room, fixed)
        mode = host().memory_mode()
        notes = [f"Weights are moved by: {mode.name} ({mode.note})."]
        if mode.host_moves_weights:
            notes.append("Which blocks travel is the loader's choice; what is shown is the plan's own count.")
        report = "\n".join((describe(job, plan), *notes, "", table(estimate(job, plan))))
        planned = host().with_plan(model, plan, measures=measure)
        return io.NodeOutput(planned, plan, report, None if clip is None else host().with_text_plan(clip, plan))


def budget_bytes(budget: str, custom_gb: float) -> int:
    """Return the device memory that a choice stands for."""
    if budget == CUSTOM:
        return round(custom_gb * GB)
    if budget in PROFILES:
        return PROFILES[budget]
    free = host().free_bytes()
    if not free:
        raise KandinskyError(
            "This device does not tell how much of its memory is free. Choose a budget: "
            f"{', '.join(PROFILES)}, or 'custom' with a number."
        )
    return free


def shape_of(latent: Latent) -> tuple[VideoShape, int]:
    """Return the size of a latent and how many clips it holds."""
    samples = latent["samples"]
    frames = samples.shape[2] if samples.ndim == 5 else 1
    rows, columns = samples.shape[-2:]
    return (
        VideoShape(width_px=columns * VAE_SPATIAL, height_px=rows * VAE_SPATIAL, frames=pixel_frames(frames)),
        len(samples),
    )


def job_of(here: Host, model: Any, row: Variant, latent: Latent, guidance: float, tokens: int) -> Job | None:
    """Return a sampling run with dense attention as the estimate takes it, None for sizes only the sampler takes."""
    if any(side % PATCH[1] for side in latent["samples"].shape[-2:]):
        return None
    shape, batch = shape_of(latent)
    return Job(
        row=row, shape=shape, batch=batch, precision=here.weights_of(model), guidance=guidance, text_tok=tokens,
        is_cpu=here.is_processor,
    )  # fmt: skip


def memory_lines(model: Any, row: Variant, latent: Latent, guidance: float, tokens: int) -> str:
    """Say how the run that just ended was made to fit, and what it needed with the estimate beside it, as far as known.

    A plan that a node gave is not repeated.
    """
    plan, measured = host().sampled_by(model), host().measured()
    if plan is None and measured is None:
        return ""
    job = job_of(host(), model, row, latent, guidance, tokens)
    lines = []
    if job is not None and plan is not None and plan != host().plan_of(model):
        lines.append(f"memory plan: {'; '.join(describe_sampling(job, plan))}")
    if measured is not None:
        lines.append(_measured_line(measured, job, plan, model))
    return "\n".join(lines)


def _measured_line(measured: Measured, job: Job | None, plan: Plan | None, model: Any) -> str:
    if job is None:
        return f"memory: {size(measured.peak_bytes)} at the peak"
    run = host().attention_of(model)
    if isinstance(run, Nabla) and run.record.attention.kind != "full":
        job = replace(job, kept=run.record.mean_kept)
    stage = sample_stage(job, plan or Plan(budget_bytes=0))
    if measured.with_weights:
        return (
            f"memory: {size(measured.peak_bytes)} of the device in use at the peak; estimated "
            f"{size(stage.weight_bytes)} of weights and {size(stage.work_bytes)} of work"
        )
    return f"memory: {size(measured.peak_bytes)} of live tensors at the peak; estimated {size(stage.work_bytes)}"


def _on_this_device(job: Job, budget: str) -> Job:
    """A budget that is read here is this device's; the named ones are those of cards."""
    return replace(job, is_cpu=budget == AUTO and host().is_processor)


def with_attention(here: Host, job: Job, model: Any, attention: str = AUTO, kept: float = KEPT) -> Job:
    """Fill in how much of the attention is computed."""
    if attention == AUTO:
        run = None if model is None else here.attention_of(model)
        if isinstance(run, Nabla):
            kind = policy(run.settings, run.row, job.shape.token_thw, run.is_assumed).kind
        else:
            kind = job.row.attention.kind if model is None else "full"
        attention = DENSE if kind == "full" else SPARSE
    return replace(job, kept=kept if attention == SPARSE else 1.0)


def _row(model: Any) -> Variant:
    row = host().variant_of(model)
    if row is None:
        raise KandinskyError(
            "The connected model is not a Kandinsky 5 one. Use the Kandinsky 5 Model Loader or core's loader."
        )
    return row
