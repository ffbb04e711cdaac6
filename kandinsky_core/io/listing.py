"""Many names in one readable line."""

from __future__ import annotations

from collections.abc import Iterable


def some(names: Iterable[str], limit: int = 4) -> str:
    """Join the first `limit` names and count the rest."""
    listed = list(names)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")
