"""A transformer on a device as a memory plan says: as a whole, or with blocks that travel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..memory.cargo import DtypeOf, as_stored, in_dtype
from ..memory.plan import Plan
from ..memory.stream import BlockStream, spread
from ..model.crossdit import CrossDiT
from ..model.modulation import ModulationTable
from ..model.regime import Regime
from ..variants import CrossDiTSpec
from .conditioning import TextCondition


def streams_blocks(spec: CrossDiTSpec, plan: Plan | None) -> bool:
    """Whether a plan leaves less than all visual blocks on the device."""
    return plan is not None and plan.resident_blocks is not None and plan.resident_blocks < spec.num_visual_blocks


def stream_transformer(
    model: CrossDiT,
    plan: Plan,
    device: torch.device,
    *,
    dtype_of: DtypeOf = as_stored,
    pinned_bytes: int = 0,
    lean: bool = False,
) -> BlockStream:
    """Stream the blocks that the plan does not keep on the device, the text blocks with them.

    Text blocks travel whenever visual ones do: they run once an evaluation. A plan that keeps all blocks gives a stream
    that only holds the model on the device. `lean` leaves the modulation weights where
    they are, for a sampler that has their vectors from `tabulate`.
    """
    visual = spread(model.visual_transformer_blocks, plan.resident_blocks)
    text = list(model.text_transformer_blocks) if visual else []
    return BlockStream(
        model,
        [*text, *visual],
        device,
        prefetch=plan.prefetch,
        pinned_bytes=pinned_bytes,
        dtype_of=dtype_of,
        keep=list(model.modulations()) if lean else (),
    )


def weight_dtypes(model: CrossDiT, dtype: torch.dtype) -> DtypeOf:
    """Return the policy for the weights of a model that computes in `dtype`.

    For float16 those of modulation and time stay float32, the dtype they are computed in: scales and gates lose their
    small values in float16, and these layers take next to no time.
    """
    if dtype != torch.float16:
        return in_dtype(dtype)
    wide = {id(layer) for part in (*model.modulations(), model.time_embeddings) for layer in part.modules()}
    narrow_of, wide_of = in_dtype(dtype), in_dtype(torch.float32)
    return lambda owner, name, tensor: (wide_of if id(owner) in wide else narrow_of)(owner, name, tensor)


def regime_of(plan: Plan | None, dtype: torch.dtype) -> Regime:
    """Return how blocks treat their tokens under a plan: float16 needs a float32 residual stream beside it."""
    pieces = {} if plan is None else {"hidden_pieces": plan.hidden_pieces, "head_groups": plan.head_groups}
    return Regime(dtype=dtype if dtype == torch.float16 else None, **pieces)


@torch.no_grad()
def tabulate(
    model: CrossDiT,
    times: Tensor,
    texts: Sequence[TextCondition],
    device: torch.device,
    *,
    batch: int,
    dtype: torch.dtype,
    dtype_of: DtypeOf = as_stored,
) -> ModulationTable:
    """Return the vectors of every (flow time as a float, place in `texts`) a sampler will evaluate.

    `times` are in 0..1, without the final 0. Give the batch and the dtype that the sampler evaluates with: the
    vectors then have the bits that the model would compute.
    """
    embeddings = {}
    for place, text in enumerate(texts):
        pooled_BP = text.to(device, dtype).expand(batch).pooled_BP
        for t in times:
            time_B = (t.float() * 1000).to(device).expand(batch)
            embeddings[float(t), place] = model.embed_time(time_B, pooled_BP)

    def moved(module: nn.Module) -> Mapping[str, Tensor]:
        weights = {name: tensor.to(device) for name, tensor in module.named_buffers()}
        for name, tensor in module.named_parameters():
            owner, _, own_name = name.rpartition(".")
            weights[name] = tensor.to(device, dtype_of(module.get_submodule(owner), own_name, tensor))
        return weights

    return ModulationTable(model, embeddings, moved)
