"""How long a stage takes, as a class: achieved rates of some cards, assumed until they are measured."""

from __future__ import annotations

from dataclasses import dataclass

from ..variants import CrossDiTSpec
from .estimate import Estimate, Stage

SPARSE_EFFICIENCY = 0.75  # of a dense kernel's rate, for block-sparse attention
WIDE_HEAD = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Rates in 10^12 operations a second, and of copies from page-locked main memory in bytes a second.

    Assumed: performance reference §1.5 and §2.4 (H100: §1.2, §1.5; its convolutions §1.4).
    """

    name: str
    product: float
    attention_64: float  # heads 64 wide
    attention_128: float
    convolution: float
    bus_bytes_s: float


CARDS = (
    Card(name="RTX 3060", product=21, attention_64=18, attention_128=20, convolution=14, bus_bytes_s=20e9),
    Card(name="RTX 4070", product=50, attention_64=46, attention_128=50, convolution=35, bus_bytes_s=24e9),
    Card(name="RTX 4090", product=140, attention_64=140, attention_128=155, convolution=95, bus_bytes_s=24e9),
    Card(name="H100", product=700, attention_64=480, attention_128=640, convolution=300, bus_bytes_s=50e9),
)

CLASSES = ((60, "seconds"), (600, "minutes"), (3600, "tens of minutes"))
LONGEST = "hours"


def stage_seconds(stage: Stage, card: Card, spec: CrossDiTSpec, *, is_sparse: bool = False) -> float:
    """Seconds of a whole stage, if its rates are reached; copies ahead hide behind computing, others do not."""
    attention = card.attention_128 if spec.head_dim >= WIDE_HEAD else card.attention_64
    if is_sparse:
        attention *= SPARSE_EFFICIENCY
    flops = stage.flops
    computing = 1e-12 * (
        flops.product / card.product + flops.attention / attention + flops.convolution / card.convolution
    )
    copying = stage.bus_bytes / card.bus_bytes_s
    return stage.steps * (max(computing, copying) if stage.is_ahead else computing + copying)


def run_seconds(estimate: Estimate, card: Card) -> float:
    """Seconds of all stages, loading and writing files left out."""
    job = estimate.job
    return sum(
        stage_seconds(stage, card, job.row.spec, is_sparse=job.is_sparse) for stage in estimate.stages
    )


def time_class(seconds: float) -> str:
    """Return "seconds", "minutes", "tens of minutes" or "hours"."""
    return next((name for limit, name in CLASSES if seconds < limit), LONGEST)
