"""What the family must reach before it ships: the limits of the recipe as a table."""

from __future__ import annotations

from collections.abc import Mapping

# Path into a report `{"video": …, "image": …, "edit": …}` -> the least value.
LIMITS: dict[str, float] = {
    "video/vae/psnr_mean_db": 28.0,
    "video/vae/grades/all/share": 0.95,
    "image/vae/psnr_mean_db": 28.0,
    "video/t2v/held_out/all/count": 200,
    "video/t2v/held_out/color/share": 0.95,
    "video/t2v/held_out/background/share": 0.95,
    "video/t2v/held_out/shape/share": 0.90,
    "video/t2v/held_out/motion/share": 0.90,
    "video/t2v/held_out/all/share": 0.80,
    "video/i2v/held_out/motion/share": 0.90,
    "video/i2v/held_out/identity/share": 0.95,
    "video/t2i/held_out/color/share": 0.90,
    "video/t2i/held_out/shape/share": 0.90,
    "image/t2i/held_out/color/share": 0.90,
    "image/t2i/held_out/shape/share": 0.90,
    "edit/i2i/held_out/asked/share": 0.80,
    "edit/i2i/held_out/kept/share": 0.80,
}


def gate(report: Mapping[str, object], part: str = "") -> list[str]:
    """Return what misses its limit, or was not measured; `part` looks at the paths that begin with it only.

    An unknown part raises `KeyError`: a gate that checks nothing would always be open.
    """
    limits = {path: least for path, least in LIMITS.items() if path.startswith(part)}
    if not limits:
        raise KeyError(f"No limit begins with {part!r}; known: {', '.join(LIMITS)}.")
    failures = []
    for path, least in limits.items():
        value: object = report
        for key in path.split("/"):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is None:
            failures.append(f"{path} was not measured; at least {least} is needed.")
        elif value < least:
            failures.append(f"{path} is {value}; at least {least} is needed.")
    return failures
