"""Colours of nano latents, for live previews: red, green and blue (-1…1) of a latent cell in model units.

Fitted by least squares on drawn clips. The nano autoencoder's first three channels carry almost all of the colour.
"""

from __future__ import annotations

from ..kandinsky_core.variants import NANO_VAE

_CHANNELS = ((0.3133, 0.2222, 0.2055), (-0.1016, -0.0285, 0.1891), (-0.0927, 0.1575, -0.0251))
NANO_FACTORS = [list(row) for row in _CHANNELS] + [
    [0.0] * 3 for _ in range(NANO_VAE.latent_channels - len(_CHANNELS))
]
NANO_BIAS = [-0.1570, -0.1650, -0.2337]
