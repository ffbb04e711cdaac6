"""Block-sparse attention nodes: switch NABLA on, see what it did, measure what it costs in accuracy."""

from __future__ import annotations

from typing import Any

from ..kandinsky_core.errors import KandinskyError
from ..kandinsky_core.shapes import NABLA_MULTIPLE_PX
from ..kandinsky_core.sparse.error import Measurement
from ..kandinsky_core.sparse.kernels.choice import NAMES
from ..kandinsky_core.sparse.nabla import AUTO, MIN_TOK, MODES, Nabla, NablaSettings
from ..kandinsky_core.variants import Variant
from .comfy_io import io
from .host import Conditioning, Latent, host
from .sampling import K5Sample

CATEGORY = "Kandinsky 5/attention"
TILE = f"tiles of {NABLA_MULTIPLE_PX} px"
UI_KEY = "kandinsky5_nabla"  # of the data a browser widget gets


def _window_inputs() -> list[Any]:
    """Return the three widgets of the sliding window."""
    return [
        io.Int.Input(
            name, default=released, min=0, max=999,
            tooltip=f"Sliding window that is always seen, in {unit}. Released: {released}.",
        )
        for name, released, unit in (("wT", 11, "latent frames"), ("wH", 3, TILE), ("wW", 3, TILE))
    ]  # fmt: skip


class K5Nabla(io.ComfyNode):
    """Patch a MODEL with block-sparse attention."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's definition."""
        return io.Schema(
            node_id="K5Nabla",
            display_name="Kandinsky 5 NABLA Attention",
            category=CATEGORY,
            description="Block-sparse attention (NABLA), which the 10 s and HD models were trained with: each query "
            "block attends to the key blocks that matter. Works with models of this pack and of ComfyUI's own loader, "
            "on any device, at any size that is a multiple of 16.",
            search_aliases=["k5", "kandinsky", "sparse attention", "flex attention", "sliding tile"],
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input(
                    "attention",
                    options=list(MODES),
                    default=AUTO,
                    tooltip="'auto': as the model was trained (10 s: P 0.9; HD 5 s: 0.8; HD 10 s: 0.7; otherwise "
                    "dense). 'on': with the values below. 'off': dense.",
                ),
                io.Float.Input(
                    "P",
                    default=0.9,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.001,
                    tooltip="Share of the attention that is kept: less is faster and coarser; 1 is dense. For 'on'.",
                ),
                *_window_inputs(),
                io.Combo.Input(
                    "kernel",
                    options=list(NAMES),
                    default=AUTO,
                    advanced=True,
                    tooltip="'auto': the first that works here. torch needs no compiler; flex compiles; spargeattn "
                    "rounds to 8 bits. One that fails is left for the rest of the run, and the log says so.",
                ),
                *(
                    io.Int.Input(
                        f"dense_{which}_{kind}", default=0, min=0, max=1000, advanced=True,
                        tooltip=f"How many of the {which} {name} stay dense.",
                    )  # fmt: skip
                    for kind, name in (("steps", "steps"), ("blocks", "layers"))
                    for which in ("first", "last")
                ),
                io.Int.Input(
                    "min_tokens",
                    default=MIN_TOK,
                    min=0,
                    max=10_000_000,
                    advanced=True,
                    tooltip="Below this many tokens (frames/4 x height/16 x width/16) attention is dense: choosing "
                    "blocks would cost what it saves.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.String.Output(display_name="report", tooltip="What was set. NABLA Report says what it did."),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, attention: str, P: float, wT: int, wH: int, wW: int, kernel: str, dense_first_steps: int,
        dense_last_steps: int, dense_first_blocks: int, dense_last_blocks: int, min_tokens: int,
    ) -> io.NodeOutput:  # fmt: skip
        """Return a patched copy; the given model stays as it is."""
        row = _row(model)
        settings = NablaSettings(
            mode=attention, mass=P, window_thw=(wT, wH, wW), kernel=kernel, dense_first_steps=dense_first_steps,
            dense_last_steps=dense_last_steps, dense_first_blocks=dense_first_blocks,
            dense_last_blocks=dense_last_blocks, min_tok=min_tokens,
        )  # fmt: skip
        note = host().variant_note(model)
        patched = host().with_attention(model, Nabla(settings, row, is_assumed=bool(note)))
        return io.NodeOutput(patched, "\n".join(filter(None, (_plan(settings, row), note))))


class K5NablaReport(io.ComfyNode):
    """Show what block-sparse attention did in a run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's definition."""
        return io.Schema(
            node_id="K5NablaReport",
            display_name="Kandinsky 5 NABLA Report",
            category=CATEGORY,
            description="After sampling: how much of the attention was kept in each layer and step, by which kernel, "
            "and what that saved.",
            search_aliases=["k5", "kandinsky", "sparsity", "heat map"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that NABLA Attention gave, or one made from it."),
                io.Latent.Input("latent", tooltip="The sampler's latent, so that this node runs after it."),
            ],
            outputs=[
                io.String.Output(display_name="report"),
                io.Image.Output(display_name="picture", tooltip="Kept share by layer and step, and one head's blocks."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, latent: Latent) -> io.NodeOutput:  # noqa: ARG003
        """Read the last run of the model."""
        from ..kandinsky_core.sparse.report import payload, picture, summary

        run = host().attention_of(model)
        if not isinstance(run, Nabla):
            raise KandinskyError(
                "This model has no NABLA attention to report on. Connect the model that comes out of Kandinsky 5 "
                "NABLA Attention, or of a node after it."
            )
        return io.NodeOutput(summary(run), picture(run), ui={UI_KEY: [payload(run)]})


class K5AttentionError(io.ComfyNode):
    """Measure how far NABLA is from dense attention for one prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's definition."""
        return io.Schema(
            node_id="K5AttentionError",
            display_name="Kandinsky 5 Attention Error",
            category=CATEGORY,
            description="Choose P by number: samples once densely and once for every P, and reports the relative error "
            "of each layer's attention and of the final latent.",
            search_aliases=["k5", "kandinsky", "nabla", "sparsity", "compare"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input("latent"),
                io.String.Input("P_values", default="0.95, 0.9, 0.8, 0.7", tooltip="Shares to try, with commas."),
                *_window_inputs(),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="Noise of all runs.",
                ),  # fmt: skip
                io.Int.Input("steps", default=0, min=0, max=1000, tooltip="0: as released."),
                io.Float.Input(
                    "cfg", default=-1.0, min=-1.0, max=100.0, step=0.1, round=0.01, tooltip="-1: as released."
                ),
                io.Float.Input(
                    "shift", default=0.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="0: as released."
                ),
            ],
            outputs=[
                io.String.Output(display_name="report"),
                io.Latent.Output(display_name="dense", tooltip="The latent of the dense run."),
            ],
        )

    @classmethod
    def validate_inputs(cls, P_values: str | None) -> bool | str:
        """Refuse what is no list of shares before anything runs."""
        try:
            _masses("1" if P_values is None else P_values)  # None: a link will bring it
        except KandinskyError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, model: Any, positive: Conditioning, negative: Conditioning, latent: Latent, P_values: str, wT: int,
        wH: int, wW: int, seed: int, steps: int, cfg: float, shift: float,
    ) -> io.NodeOutput:  # fmt: skip
        """Sample densely with every P measured beside it, then with every P."""
        from ..kandinsky_core.sparse.report import error_table

        row = _row(model)
        masses = _masses(P_values)
        runs = [
            Nabla(NablaSettings(mode="on", mass=mass, window_thw=(wT, wH, wW), min_tok=0), row) for mass in masses
        ]

        def sampled(run: Any) -> Any:
            return K5Sample.execute(
                host().with_attention(model, run), positive, negative, latent, seed=seed, steps=steps, cfg=cfg,
                shift=shift, sampler_name="euler", first_frame=AUTO, denoise=1.0,
            )[0]  # fmt: skip

        measurement = Measurement(runs)
        dense = sampled(measurement)
        layer_errors = [measurement.errors(index) for index in range(len(runs))]
        kept = [run.record.mean_kept for run in runs]
        latents = [sampled(run)["samples"] for run in runs]
        table = error_table(masses, kept, layer_errors, dense["samples"], latents)
        return io.NodeOutput(table, dense)


def _row(model: Any) -> Variant:
    row = host().variant_of(model)
    if row is None:
        raise KandinskyError(
            "The connected model is not a Kandinsky 5 one. Use the Kandinsky 5 Model Loader or core's loader."
        )
    return row


def _plan(settings: NablaSettings, row: Variant) -> str:
    """Say what the settings will do."""
    if settings.mode == "off":
        return "Attention is dense."
    dense = f" Dense below {settings.min_tok:,} tokens." if settings.min_tok else ""
    if settings.mode == AUTO:
        policy = row.attention
        as_trained = (
            f"NABLA with P {policy.P:g}, window {policy.wT}/{policy.wH}/{policy.wW}"
            if policy.kind == "nabla"
            else "dense at its usual size; the size sampled decides"
        )
        return f"{row.title}: {as_trained}.{dense}"
    window = "/".join(map(str, settings.window_thw))
    sizes = "" if row.attention.kind == "nabla" else " These weights were trained with dense attention."
    return (
        f"NABLA with P {settings.mass:g}, window {window}.{dense}{sizes} Sizes that are multiples of "
        f"{NABLA_MULTIPLE_PX} px are the trained ones; others work, with smaller blocks at the edges."
    )


def _masses(text: str) -> list[float]:
    """Return the numbers of "0.95, 0.9"."""
    try:
        masses = [float(part) for part in text.replace(";", ",").split(",") if part.strip()]
    except ValueError as error:
        raise KandinskyError(f"P_values '{text}' are not numbers. Write them like 0.95, 0.9, 0.8.") from error
    if not masses or not all(0 <= mass <= 1 for mass in masses):
        raise KandinskyError(f"P_values '{text}': give one or more numbers from 0 to 1, like 0.95, 0.9, 0.8.")
    return masses
