"""How a latent is decoded, and pixels are encoded, in bounded memory: plans as values that print themselves."""

from __future__ import annotations

from dataclasses import dataclass

REFERENCE, STREAM, LATE_TILE, SINGLE_PASS = "reference", "stream", "late-tile", "single-pass"
MODES = (REFERENCE, STREAM, LATE_TILE, SINGLE_PASS)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """One way to decode one clip. `reference` follows the released windows, the others are causal chunks.

    `stream` and `late-tile` freeze GroupNorm's statistics from a few sampled windows; `single-pass` takes them from a
    running causal window; `late-tile` decodes the late levels tile by tile with hard cuts.
    """

    mode: str
    latent_thw: tuple[int, int, int]
    chunk: int = 2  # latent frames decoded at once (all modes but reference)
    tiles: tuple[int, int] = (1, 1)  # (rows, columns) of late tiles, or of the reference mode's tiles
    caches_on_host: bool = False  # convolution caches and features wait in main memory between chunks
    peak_bytes: int = 0  # estimated live bytes of activations and caches on the device, without weights
    work: float = 1.0  # estimated FLOPs over those of one pass without overlap


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodePlan:
    """One way to encode one clip: the first frame alone, then `chunk` latent frames (4 frames each) at once."""

    mode: str  # reference or stream
    latent_thw: tuple[int, int, int]
    chunk: int = 2
    caches_on_host: bool = False
    peak_bytes: int = 0
    work: float = 1.0
