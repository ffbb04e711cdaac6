"""Modulation vectors of many evaluations, computed before the first of them.

They depend on the time and the pooled text only. A sampler that knows its times needs the modulation weights (an
eighth of the model) once a sample instead of once a step.

Shapes: S evaluations, B batch, E time width, V all vectors of the model side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

import torch
from torch import Tensor, nn

from .crossdit import CrossDiT
from .layers import Modulate, Modulation

Place = Callable[[nn.Module], Mapping[str, Tensor]]
"""A modulation's parameters and buffers by name, where and in the dtype in which they are to be used."""


def in_place(module: nn.Module) -> Mapping[str, Tensor]:
    """Use the weights as they are."""
    return dict((*module.named_parameters(), *module.named_buffers()))


class ModulationTable:
    """The vectors of the evaluations named by `embeddings`' keys, float32, in main memory.

    `embeddings` are results of `CrossDiT.embed_time`. `place` brings one modulation's weights after the other to them.
    The vectors have the bits that the modulations give when they are called one evaluation at a time.
    """

    @torch.no_grad()
    def __init__(self, model: CrossDiT, embeddings: Mapping[Hashable, Tensor], place: Place = in_place) -> None:
        self._rows = {key: row for row, key in enumerate(embeddings)}
        self._device = next(iter(embeddings.values())).device
        self._slices: dict[Modulation, slice] = {}
        columns, end = [], 0
        for modulation in model.modulations():
            weights = place(modulation)
            # Row by row: a product of all rows at once would round differently.
            vectors = [torch.func.functional_call(modulation, weights, (time_BE,)) for time_BE in embeddings.values()]
            columns.append(torch.stack(vectors).cpu())
            self._slices[modulation] = slice(end, end + columns[-1].shape[-1])
            end += columns[-1].shape[-1]
        self._vectors_SBV = torch.cat(columns, dim=-1)

    @property
    def nbytes(self) -> int:
        """Main memory of all vectors."""
        return self._vectors_SBV.nbytes

    def at(self, key: Hashable) -> Modulate:
        """Return the `modulate` option of one evaluation; a key that was not given raises `KeyError`."""
        vectors_BV = self._vectors_SBV[self._rows[key]].to(self._device)

        def modulate(modulation: Modulation, time_BE: Tensor) -> Tensor:  # noqa: ARG001
            return vectors_BV[:, self._slices[modulation]]

        return modulate
