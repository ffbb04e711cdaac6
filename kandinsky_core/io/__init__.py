"""Files: weights in and out, pictures and clips."""

from .checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from .identity import Identity, identify, spec_metadata
from .load import LoadedCrossDiT, LoadedVAE, fill, load_crossdit, load_vae

__all__ = [
    "Checkpoint",
    "Identity",
    "LoadedCrossDiT",
    "LoadedVAE",
    "fill",
    "identify",
    "load_crossdit",
    "load_vae",
    "open_checkpoint",
    "save_checkpoint",
    "spec_metadata",
]
