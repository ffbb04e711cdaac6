"""Statistics for the norms of a clip too long for one pass: taken from a few windows of it."""

from __future__ import annotations

from collections.abc import Callable

from .statistics import Recorded, Statistics
from .tiling import sample_windows

Pass = Callable[[slice, Recorded], None]  # runs the network on some latent frames


def sample(latents: int, once: Pass) -> Statistics:
    """Estimate a clip's statistics from its windows.

    Each is computed twice: normalised by the sums so far for a rough idea, then by that idea while the sums are taken.
    What is recorded under fixed statistics does not depend on chunks or tiles.
    """
    rough = Recorded()
    for window in sample_windows(latents):
        once(window, rough)
    refined = Recorded(rough.statistics)
    for window in sample_windows(latents):
        once(window, refined)
    return refined.statistics
