"""Statistics for the norms of a clip too long for one pass: taken from a few windows of it."""

from __future__ import annotations

from collections.abc import Callable

from .statistics import Recorded, Statistics
from .tiling import WINDOW

Pass = Callable[[slice, Recorded], None]  # runs the network on some latent frames


def sample_windows(latents: int) -> tuple[slice, ...]:
    """Choose what is sampled: the first, the middle and the last 5 latent frames, fewer windows of a short clip."""
    last = max(latents - WINDOW, 0)
    starts = {0, last} if latents < 3 * WINDOW else {0, last // 2, last}
    return tuple(slice(start, min(start + WINDOW, latents)) for start in sorted(starts))


def sampled_latents(latents: int) -> int:
    """Return how many latent frames sampling computes: its windows, twice."""
    return 2 * sum(window.stop - window.start for window in sample_windows(latents))


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
