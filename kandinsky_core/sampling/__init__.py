"""Schedule, guidance, conditioning and the flow-matching loop."""

from .conditioning import Known, TextCondition, keep_known, normalise_first_frames, transformer_input
from .flow import guide, integrate, noise, sample, velocity_of
from .schedule import timesteps

__all__ = [
    "Known",
    "TextCondition",
    "guide",
    "integrate",
    "keep_known",
    "noise",
    "normalise_first_frames",
    "sample",
    "timesteps",
    "transformer_input",
    "velocity_of",
]
