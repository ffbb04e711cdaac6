"""The colours of live previews are those of the decoded frames."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from comfyui_kandinsky5.kandinsky_core import nano
from comfyui_kandinsky5.kandinsky_core.io import load_vae
from comfyui_kandinsky5.kandinsky_core.nano.draw import draw, scenes
from comfyui_kandinsky5.kandinsky_core.variants import NANO_VAE
from comfyui_kandinsky5.nodes.preview import NANO_BIAS, NANO_FACTORS


def test_nano_preview_shows_the_clips_colours():
    vae, spec = load_vae(nano.files()["vae"], dtype=torch.float32)
    assert spec == NANO_VAE
    for scene in scenes(31, 4):
        pixels_THWC = draw(scene) * 2 - 1
        with torch.no_grad():
            z_CTHW = vae.encode(pixels_THWC.permute(3, 0, 1, 2)[None]).mean[0] * spec.scaling_factor
        shown_HWC = z_CTHW[:, 0].permute(1, 2, 0) @ torch.tensor(NANO_FACTORS) + torch.tensor(NANO_BIAS)
        wanted_CHW = F.avg_pool2d(pixels_THWC[0].permute(2, 0, 1), 8)
        assert (shown_HWC - wanted_CHW.permute(1, 2, 0)).pow(2).mean().sqrt() < 0.08
