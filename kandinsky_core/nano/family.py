"""The loaded models of one nano family member: video, image or editing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..io.load import load_crossdit, load_vae
from ..sampling.flow import Transformer
from ..text.encoder import TextEncoder, load_text_encoder
from ..variants import Variant
from .codec import Codec, ScaledVAE

MEMBERS = {"video": ("model", "vae"), "image": ("image_model", "image_vae"), "edit": ("edit_model", "image_vae")}
TEXT = ("text_encoder", "clip")  # what every member has


@dataclass(frozen=True, slots=True)
class Family:
    """A transformer with its codec, its text encoder and the settings of its variant."""

    transformer: Transformer
    vae: Codec
    text: TextEncoder
    variant: Variant

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.text.device


def load_family(
    files: Mapping[str, Path], device: torch.device, member: str = "video", *, codec: Codec | None = None
) -> Family:
    """Load a member of `MEMBERS` from the files that `nano.files()` names, in float32.

    `codec` takes the place of the autoencoder's file.
    """
    model, vae = MEMBERS[member]
    loaded = load_crossdit(files[model], dtype=torch.float32, device=device)
    text = load_text_encoder(*(files[kind] for kind in TEXT), dtype=torch.float32, device=device)
    if codec is None:
        codec = ScaledVAE(load_vae(files[vae], dtype=torch.float32, device=device).vae.eval())
    return Family(loaded.model.eval(), codec, text.eval(), loaded.variant)
