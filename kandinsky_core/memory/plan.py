"""A memory plan: every choice that makes a run fit, as one value."""

from __future__ import annotations

from dataclasses import dataclass

from ..vae.plan import AUTO, DecodePlan, EncodePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is kept on the device, what travels, and in which pieces the work is done."""

    budget_bytes: int  # device memory that may be used
    resident_blocks: int | None = None  # visual blocks that stay on the device (None: all); the others are streamed
    prefetch: int = 1  # streamed blocks that are copied ahead
    streams_text: bool = False  # the text tower is streamed layer by layer
    hidden_pieces: int = 1  # at least so many pieces of a feed-forward's hidden tensor
    head_groups: int = 1  # visual self-attention runs in so many groups of heads
    decode_mode: str = AUTO  # how the latent is to be decoded, a mode of `vae.plan`
    decode: DecodePlan | None = None  # None: chosen in that mode when the latent is there
    encode: EncodePlan | None = None
