"""The diagonal Gaussian an encoder returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0  # published clamp: keeps exp() finite in float16


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and log variance of the latent posterior, unscaled, `[B,C,(t,)h,w]`."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def split(cls, parameters: Tensor) -> Moments:
        """Read `[B,2C,...]` encoder output: the first half of the channels is the mean, the second log variance."""
        mean, logvar = parameters.chunk(2, dim=1)
        return cls(mean, logvar.clamp(LOGVAR_MIN, LOGVAR_MAX))

    def mode(self) -> Tensor:
        """Return the most likely latent: the mean."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw a latent; noise comes from the generator's device (CPU without one), so a seed means one result."""
        device = generator.device if generator is not None else "cpu"
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=torch.float32)
        return self.mean + (0.5 * self.logvar).exp() * noise.to(self.mean)
