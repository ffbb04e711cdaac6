"""Flow-matching sampler: x_t = (1 - t) data + t noise, velocity = noise - data, Euler from t = 1 to 0.

B batch, C latent channels, T/H/W latent frames/rows/columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..variants import CrossDiTSpec
from .conditioning import NOTHING_KNOWN, Known, TextCondition, keep_known, transformer_input

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x_BCTHW, t as a 0-dim float32 tensor in 0..1) -> velocity_BCTHW"""

OptionsAt = Callable[[tuple[int, int, int], Tensor], Mapping[str, object]]
"""(frames, rows, columns of tokens; t as a 0-dim float32 tensor in 0..1) -> options of one transformer call"""

StepCallback = Callable[[int, int, Tensor, Tensor], None]
"""(steps done, steps in all, x_BCTHW, estimate of the clean latent_BCTHW); raise from it to cancel"""


class Transformer(Protocol):
    """What the sampler needs of a model: `CrossDiT.forward`."""

    spec: CrossDiTSpec

    def token_grid(self, x_BTHWC: Tensor) -> tuple[int, int, int]:
        """Frames, rows and columns of tokens of a latent."""
        ...

    def __call__(
        self, x_BTHWC: Tensor, text_BLD: Tensor, pooled_BP: Tensor, time_B: Tensor, **options: object
    ) -> Tensor:
        """Velocity, channels last."""
        ...


def noise(shape: Sequence[int], seed: int) -> Tensor:
    """Unit Gaussian float32, drawn on the host so that a seed gives the same clip on every device."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def velocity_of(
    model: Transformer,
    text: TextCondition,
    *,
    dtype: torch.dtype,
    rope_scale: tuple[float, float, float],
    known: Known = NOTHING_KNOWN,
    options_at: OptionsAt | None = None,
    **options: object,
) -> Velocity:
    """The model's velocity for one prompt, computed in `dtype`, returned in the state's dtype.

    `text` and `known` should already be on the model's device: they are read at every step. `options` (attend,
    on_block) go to the transformer as they are, `options_at` gives those that depend on size and time.
    """

    def velocity(x_BCTHW: Tensor, t: Tensor) -> Tensor:
        batch = x_BCTHW.shape[0]
        condition = text.to(x_BCTHW.device, dtype).expand(batch)
        x_BTHWC = transformer_input(model.spec, x_BCTHW.to(dtype), known.to(x_BCTHW.device, dtype))
        time_B = (t.float() * 1000).to(x_BCTHW.device).expand(batch)
        varying = {} if options_at is None else options_at(model.token_grid(x_BTHWC), t)
        out_BTHWC = model(
            x_BTHWC,
            condition.features_BLD,
            condition.pooled_BP,
            time_B,
            text_mask_BL=condition.mask_BL,
            rope_scale=rope_scale,
            **options,
            **varying,
        )
        return out_BTHWC.movedim(-1, 1).to(x_BCTHW.dtype)

    return velocity


def guide(conditional: Velocity, null: Velocity | None, weight: float) -> Velocity:
    """Classifier-free guidance: v_null + w (v_text - v_null); at w = 1 the null pass is not run."""
    if null is None or abs(weight - 1) <= 1e-6:
        return conditional

    def guided(x_BCTHW: Tensor, t: Tensor) -> Tensor:
        v_text = conditional(x_BCTHW, t)  # conditional first: step caches count passes in this order
        v_null = null(x_BCTHW, t)
        return v_null + weight * (v_text - v_null)

    return guided


def integrate(
    velocity: Velocity,
    x_BCTHW: Tensor,
    times: Tensor,
    *,
    known: Known = NOTHING_KNOWN,
    on_step: StepCallback | None = None,
) -> Tensor:
    """Euler over `times` (float32 `[N+1]`, falling); N evaluations of `velocity`. dtype in, same dtype out.

    `known` only matters for what `on_step` sees: the velocity of known frames means nothing.
    """
    total = len(times) - 1
    for i in range(total):
        t, t_next = times[i], times[i + 1]
        v_BCTHW = velocity(x_BCTHW, t)
        clean_BCTHW = x_BCTHW - v_BCTHW * t.to(v_BCTHW)
        x_BCTHW = x_BCTHW + (t_next - t).to(v_BCTHW) * v_BCTHW
        if on_step is not None:
            on_step(i + 1, total, x_BCTHW, keep_known(clean_BCTHW, known))
    return x_BCTHW


def sample(
    velocity: Velocity,
    noise_BCTHW: Tensor,
    times: Tensor,
    *,
    start_BCTHW: Tensor | None = None,
    known: Known = NOTHING_KNOWN,
    on_step: StepCallback | None = None,
) -> Tensor:
    """Run the sampler and return the clean latent in model units, known frames kept exactly.

    `start_BCTHW` is the latent to start from when `times` begins below 1 (image-to-image, denoise < 1).
    """
    x_BCTHW = noise_BCTHW
    if start_BCTHW is not None:
        first = times[0].to(noise_BCTHW)
        x_BCTHW = first * noise_BCTHW + (1 - first) * start_BCTHW.to(noise_BCTHW)
    return keep_known(integrate(velocity, x_BCTHW, times, known=known, on_step=on_step), known)
