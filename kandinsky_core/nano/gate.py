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

LEAST_READING = 0.95  # share of held-out prompts that the text encoders read right, for every label
LEAST_DROP = 20  # points that a break must cost where it must show
# The same for the report of the controls.
CONTROLS: dict[str, float] = {
    f"{path}/drop/{measure}": LEAST_DROP
    for path, measures in {
        "video/t2v/prompts_shuffled": ("color", "shape", "motion", "background", "all"),
        "video/t2v/shift_inverse": ("all",),
        "video/t2v/axes_swapped": ("all",),
        "video/continuation/prompts_shuffled": ("motion",),
        "video/continuation/mask_dropped": ("identity",),
        "edit/i2i/prompts_shuffled": ("asked",),
    }.items()
    for measure in measures
}


def above_chance(report: Mapping[str, object]) -> list[str]:
    """Return what follows shuffled prompts in a report of the controls: hits that chance hardly explains."""
    return [
        f"{member}/{task}/prompts_shuffled: {name} is above chance"
        for member, tasks in report.items() for task, found in tasks.items() if isinstance(found, Mapping)
        for name in found.get("prompts_shuffled", {}).get("above_chance", ())
    ]  # fmt: skip


def gate(report: Mapping[str, object], part: str = "", *, limits: Mapping[str, float] = LIMITS) -> list[str]:
    """Return what misses its limit, or was not measured; `part` looks at the paths that begin with it only.

    An unknown part raises `KeyError`: a gate that checks nothing would always be open.
    """
    limits = {path: least for path, least in limits.items() if path.startswith(part)}
    if not limits:
        raise KeyError(f"No limit begins with {part!r}.")
    failures = []
    for path, least in limits.items():
        value: object = report
        for key in path.split("/"):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is None:
            failures.append(f"{path} was not measured; at least {least} is needed")
        elif not value >= least:  # NaN included
            failures.append(f"{path} is {value}; at least {least} is needed")
    return failures
