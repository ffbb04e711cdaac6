"""MODEL without ComfyUI: a handle that names a transformer file, loaded when the sampler works with it.

Legend of shape suffixes: B batch, C channels, T frames (pixels or latent), H rows, W columns,
L text tokens, D text width, P pooled width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..kandinsky_core.errors import KandinskyError
from ..kandinsky_core.io import identify, load_crossdit, open_checkpoint
from ..kandinsky_core.io.mapped import mapping_dtype
from ..kandinsky_core.io.quant import packed_formats
from ..kandinsky_core.memory.plan import Plan
from ..kandinsky_core.memory.ram import free_ram_bytes
from ..kandinsky_core.memory.stream import BlockStream
from ..kandinsky_core.model import CrossDiT, dense
from ..kandinsky_core.sampling import Known, TextCondition, guide, velocity_of
from ..kandinsky_core.sampling.flow import Velocity
from ..kandinsky_core.sampling.streaming import (
    regime_of,
    stream_transformer,
    streams_blocks,
    tabulate,
    weight_dtypes,
)
from ..kandinsky_core.sparse.nabla import AttentionRun, options
from ..kandinsky_core.variants import Variant
from .host import KNOWN_EDIT, KNOWN_FRAMES, SPARSE_HINT, Conditioning, LoadedModel, SampleRequest
from .standalone_device import dtype_of, has_bf16

PINNED_SHARE = 0.5  # of the free main memory: page-locked copies of streamed blocks may take it
FLOAT16_NOTE = (
    "Matrices and attention are float16; the residual stream, modulation and norms are float32, since their values "
    "pass float16's range. If float16 still overflows, sampling says so."
)


@dataclass(frozen=True, slots=True)
class ModelHandle:
    """MODEL: a transformer file and the table row it runs as."""

    path: Path
    variant: Variant
    dtype: torch.dtype
    attention: AttentionRun | None = field(default=None, compare=False)  # the weights are the same with and without
    plan: Plan | None = None  # None: all weights on the device
    measures: bool = field(default=False, compare=False)  # count tensors on a processor


def recognised(path: Path, variant: str | None, dtype: str, device: torch.device) -> LoadedModel:
    """Recognise a transformer file; no weights are read."""
    checkpoint = open_checkpoint(path)
    identity = identify(checkpoint, variant)
    lacks_bf16 = dtype == "auto" and not has_bf16(device)
    handle = ModelHandle(path, identity.variant, torch.float16 if lacks_bf16 else dtype_of(dtype, path, device))
    row = identity.variant
    report = (
        f"{row.title}\n{identity.hint}\n"
        f"Preset: {row.steps} steps, guidance {row.guidance:g}, shift {row.shift:g}.\n"
        f"Runs on {device} in {handle.dtype}."
    )
    if packed := packed_formats(checkpoint):
        report += f" Packed weights stay as they are stored: {', '.join(packed)}."
    if lacks_bf16:
        report += f" ({device} does not compute in bfloat16.)"
    if handle.dtype == torch.float16:
        report += f"\n{FLOAT16_NOTE}"
    if row.attention.kind != "full":
        report += f"\n{SPARSE_HINT}"
    return LoadedModel(handle, row, report)


def load(model: ModelHandle, device: torch.device) -> tuple[CrossDiT, list[BlockStream]]:
    """Load a transformer as its plan says: onto the device, or mapped with blocks that visit it, as streams."""
    row, travels = model.variant, streams_blocks(model.variant.spec, model.plan)
    streams: list[BlockStream] = []
    if travels or model.dtype == torch.float16:  # float16 is not for all weights
        dtype = mapping_dtype(open_checkpoint(model.path), model.dtype)
        transformer = load_crossdit(model.path, variant=row.name, dtype=dtype).model
        streams.append(stream_transformer(
            transformer, model.plan or Plan(budget_bytes=0), device, lean=travels,
            dtype_of=weight_dtypes(transformer, model.dtype), pinned_bytes=int(free_ram_bytes() * PINNED_SHARE),
        ))  # fmt: skip
    else:
        transformer = load_crossdit(model.path, variant=row.name, dtype=model.dtype, device=device).model
    transformer.set_regime(regime_of(model.plan, model.dtype))
    return transformer, streams


def guided(
    transformer: CrossDiT, model: ModelHandle, request: SampleRequest, start_BCTHW: Tensor, known: Known
) -> Velocity:
    """Return the guided velocity field of a run that begins at a latent of the size of `start_BCTHW`."""
    device, rope_scale = start_BCTHW.device, model.variant.rope_at(*start_BCTHW.shape[3:])
    run, blocks = model.attention, model.variant.spec.num_visual_blocks
    texts = [_text(given) for given in (request.positive, request.negative) if given is not None]
    # The weights of the modulation do not travel: their vectors are known before the first step.
    table = None if not streams_blocks(model.variant.spec, model.plan) else tabulate(
        transformer, request.sigmas[:-1], texts, device, batch=len(start_BCTHW), dtype=model.dtype,
        dtype_of=weight_dtypes(transformer, model.dtype),
    )  # fmt: skip

    def velocity(place: int) -> Velocity:
        def at(token_thw: tuple[int, int, int], t: Tensor) -> dict[str, object]:
            found = {} if run is None else options(
                run.forward(token_thw, blocks, float(t), device), blocks, dense
            )  # fmt: skip
            return found if table is None else found | {"modulate": table.at((float(t), place))}

        return velocity_of(
            transformer, texts[place], dtype=model.dtype, rope_scale=rope_scale, known=known, options_at=at
        )  # fmt: skip

    if run is not None:
        run.begin(request.sigmas.tolist())
    return guide(velocity(0), velocity(1) if len(texts) > 1 else None, request.guidance)


def known(conditioning: Conditioning, row: Variant, device: torch.device) -> Known:
    """Return what the conditioning gives besides text, as the network takes it."""

    def given(key: str) -> Tensor | None:
        raw = conditioning[0][1].get(key)
        return None if raw is None else raw.to(device, torch.float32) * row.vae.scaling_factor

    edit_BCHW = given(KNOWN_EDIT)
    return Known(given(KNOWN_FRAMES), None if edit_BCHW is None else edit_BCHW.unsqueeze(2))


def _text(conditioning: Conditioning) -> TextCondition:
    if len(conditioning) != 1:
        raise KandinskyError(
            f"The conditioning has {len(conditioning)} parts; outside ComfyUI the sampler takes one. "
            "Do not combine prompts."
        )
    features_BLD, extra = conditioning[0]
    return TextCondition(features_BLD, extra["pooled_output"])
