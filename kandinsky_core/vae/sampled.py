"""Statistics for the norms of a clip too long for one pass: taken from a few windows of it.

One pass (see `Recorded`). A second pass recorded under the statistics of the first does not refine them: what a layer
then records belongs to layers below that the decode itself normalises otherwise, and the error grows from layer to
layer (nano autoencoder: 47 dB to the un-tiled decode fell to 25 dB).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .passage import Passage
from .plan import DecodePlan
from .statistics import Recorded
from .tiling import sample_windows


class Sampling:
    """Statistics on the way, in the memory of a decode under the plan; goes on after an exception as a decode does."""

    def __init__(self, latents: int, start: Callable[[slice, Recorded], Passage]) -> None:
        self.source = Recorded()
        self._windows = list(sample_windows(latents))
        self._start = start
        self._passage: Passage | None = None

    @property
    def under_way(self) -> int:
        """Latent frames of the present window still to be fed, as `Passage.left` counts them."""
        return self._passage.left if self._passage is not None else 0

    @property
    def waiting(self) -> int:
        """Latent frames of the windows to come."""
        windows = self._windows[1:] if self._passage is not None else self._windows
        return sum(window.stop - window.start for window in windows)

    def run(self) -> None:
        """Run the windows that are left."""
        while self._windows:
            if self._passage is None:
                self._passage = self._start(self._windows[0], self.source)
            self._passage.run()
            self._passage = None
            del self._windows[0]

    def replan(self, plan: DecodePlan, device: torch.device) -> None:
        """Go on under another plan."""
        self.source.to(device)
        if self._passage is not None:
            self._passage.replan(plan, self.source, device)
