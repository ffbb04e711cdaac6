"""The colours of live previews are those of the decoded frames."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comfyui_kandinsky5.kandinsky_core import nano
from comfyui_kandinsky5.kandinsky_core.io import load_vae
from comfyui_kandinsky5.kandinsky_core.nano.codec import ScaledVAE, pixels
from comfyui_kandinsky5.kandinsky_core.nano.draw import draw, scenes
from comfyui_kandinsky5.nodes.preview import NANO_COLORS


@pytest.mark.parametrize(("file", "frames"), [("vae", 17), ("image_vae", 1)])
def test_nano_preview_shows_the_first_frames_colours(file, frames):
    vae, spec = load_vae(nano.files()[file], dtype=torch.float32)
    factors, bias = map(torch.tensor, NANO_COLORS[spec])
    x_BCTHW = pixels(torch.stack([draw(scene, frames=frames) for scene in scenes(31, 4)]))
    with torch.no_grad():
        z_BCTHW = ScaledVAE(vae).encode(x_BCTHW)
    shown_BHWC = z_BCTHW[:, :, 0].movedim(1, -1) @ factors + bias
    wanted_BCHW = F.avg_pool2d(x_BCTHW[:, :, 0], 8)
    error_B = (shown_BHWC - wanted_BCHW.movedim(1, -1)).square().flatten(1).mean(1).sqrt()
    assert (error_B < 0.08).all()
