"""Colours of nano latents, for live previews: red, green and blue (-1…1) of a latent cell in model units.

Fitted by least squares on latents of drawn clips and pictures. The first three channels of both nano latent spaces
carry the mean colour of a cell (root mean square of what is left: 0.001 of 2).
"""

from __future__ import annotations

from ..kandinsky_core.variants import NANO_IMAGE_VAE, NANO_VAE, VAESpec

Colors = tuple[list[list[float]], list[float]]  # a row a latent channel, and the bias


def _colors(*channels: list[float], bias: list[float]) -> Colors:
    return [*channels, *([0.0] * 3 for _ in range(NANO_VAE.latent_channels - len(channels)))], bias


NANO_COLORS: dict[VAESpec, Colors] = {
    NANO_VAE: _colors(
        [0.3140, 0.2217, 0.2076], [-0.1102, -0.0163, 0.1842], [-0.0854, 0.1560, -0.0374],
        bias=[-0.1300, -0.1618, -0.2185],
    ),
    NANO_IMAGE_VAE: _colors(
        [0.3090, 0.2143, 0.2018], [0.1085, 0.0133, -0.1803], [0.0818, -0.1538, 0.0380],
        bias=[-0.1211, -0.1513, -0.2177],
    ),
}  # fmt: skip
