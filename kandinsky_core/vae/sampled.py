"""Statistics for the norms of a clip too long for one pass: taken from a few windows of it.

Every window is run, after a look at the first latent frame of each (see `Sampled`). Running the windows again under
the statistics of a first run does not refine these: what a layer then records belongs to layers below that the decode
itself normalises otherwise, and the error grows from layer to layer (tried without looks: 47 dB to the decode in one
pass fell to 25).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .passage import Passage
from .plan import DecodePlan
from .statistics import Sampled
from .tiling import sample_windows, samples


def source_for(latents: int) -> Sampled:
    """Return what learns the statistics of a clip of so many latent frames from its windows."""
    return Sampled([window.stop - window.start for window in sample_windows(latents)])


class Sampling:
    """Statistics on the way, in the memory of a decode under the plan; goes on after an exception as a decode does."""

    def __init__(self, latents: int, start: Callable[[slice, Sampled], Passage]) -> None:
        self.source = source_for(latents)
        self._samples = list(samples(latents))
        self._start = start
        self._passage: Passage | None = None

    @property
    def under_way(self) -> int:
        """Latent frames of the present window or look still to be fed, as `Passage.left` counts them."""
        return self._passage.left if self._passage is not None else 0

    @property
    def waiting(self) -> int:
        """Latent frames still to come behind the present ones."""
        waiting = self._samples[1:] if self._passage is not None else self._samples
        return sum(sample.latents for sample in waiting)

    def run(self) -> None:
        """Run what is left."""
        while self._samples:
            if self._passage is None:
                sample = self._samples[0]
                self.source.enter(sample.window, is_look=sample.is_look)
                self._passage = self._start(sample.frames, self.source)
            self._passage.run()
            self._passage = None
            del self._samples[0]

    def replan(self, plan: DecodePlan, device: torch.device) -> None:
        """Go on under another plan."""
        self.source.to(device)
        if self._passage is not None:
            self._passage.replan(plan, self.source, device)
