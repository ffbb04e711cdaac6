"""What a run did, as words, as data for a widget, and as a picture.

Shapes: H, W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .nabla import Nabla
from .record import Record
from .tiles import Tiles

if TYPE_CHECKING:
    from PIL import Image

PICTURE_PX = 480  # longest side of the heat map and of the mask
GAP_PX = 24
TITLE_PX = 22
# A perceptually even scale from dark (little kept) to bright (all kept); dense steps and layers are grey.
COLORS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
DENSE_COLOR = (200, 200, 200)


def summary(run: Nabla) -> str:
    """Return lines for the user: size, policy, kept shares, kernel, what was saved."""
    record = run.record
    if record.token_thw is None:
        return "NABLA has not run yet: connect the latent that the sampler gives, so that this node comes after it."
    tokens = prod(record.token_thw)
    size = f"{tokens:,} tokens ({' x '.join(map(str, record.token_thw))})"
    kept = record.kept
    if not kept:
        return f"Dense attention on {size}: {why_dense(run)}."
    policy = record.attention
    lines = [
        f"NABLA with P {policy.P:g}, window {policy.wT}/{policy.wH}/{policy.wW}, on {size}, "
        f"{Tiles(record.token_thw).blocks:,} blocks of up to 64 tokens.",
        f"Kept {record.mean_kept:.1%} of the block pairs; {spread('layers', by_layer(kept))}, "
        f"{spread('steps', by_step(kept))}.",
        f"Kernel: {', '.join(f'{name} ({count} calls)' for name, count in run.kernels.used.items())}.",
        f"Attention left out: about {flops(record.flops_saved)}.",
    ]
    if record.dense:
        every = len(record.dense) + len(kept)
        lines.append(f"{len(record.dense)} of {every} layers (over all steps) were dense, as set.")
    lines += [f"The {name} kernel was left: {reason}" for name, reason in run.kernels.left.items()]
    return "\n".join(lines)


def why_dense(run: Nabla) -> str:
    """Return the reason that a run had no block-sparse layer."""
    settings = run.settings
    if settings.mode == "off":
        return "it is switched off"
    if prod(run.record.token_thw or (0,)) < settings.min_tok:
        return f"that is below min_tokens ({settings.min_tok:,})"
    if settings.mode == "auto" and run.record.attention.kind == "full":
        whose = f"the model, taken for {run.row.title}," if run.is_assumed and run.row else "this model"
        return f"{whose} was trained with full attention at this size; set attention to on to try NABLA"
    if run.kernels.used["dense"]:
        left = [f"{name}: {reason}" for name, reason in run.kernels.left.items()]
        return "; ".join(["no block-sparse kernel was used", *left])
    return "all steps or layers were set to be dense"


def payload(run: Nabla) -> dict[str, Any]:
    """Return the same as JSON-able data; `kept[step][layer]` is None where attention was dense."""
    record, policy = run.record, run.record.attention
    kept = record.kept
    return {
        "tokens_thw": record.token_thw,
        "tokens": 0 if record.token_thw is None else prod(record.token_thw),
        "P": policy.P,
        "window": [policy.wT, policy.wH, policy.wW],
        "kept": record.grid,
        "mean_kept": record.mean_kept if kept else None,
        "kernels": dict(run.kernels.used),
        "left": dict(run.kernels.left),
        "flops_saved": record.flops_saved,
    }


def by_layer(kept: dict[tuple[int, int], float]) -> list[float]:
    """Return each layer's mean over the steps."""
    return [_mean(share for (_, block), share in kept.items() if block == at) for at in sorted({b for _, b in kept})]


def by_step(kept: dict[tuple[int, int], float]) -> list[float]:
    """Return each step's mean over the layers."""
    return [_mean(share for (step, _), share in kept.items() if step == at) for at in sorted({s for s, _ in kept})]


def spread(name: str, shares: Sequence[float]) -> str:
    """Return "layers 21.0 to 35.2 %"."""
    return f"{name} {100 * min(shares):.1f} to {100 * max(shares):.1f} %"


def flops(count: float) -> str:
    """Return a number of floating-point operations with a unit."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if count < 1000 or unit == "P":
            break
        count /= 1000
    return f"{count:.3g} {unit}FLOP"


def error_table(
    masses: Sequence[float], kept: Sequence[float], layer_errors: Sequence[dict[tuple[int, int], float]],
    dense: Tensor, latents: Sequence[Tensor],
) -> str:  # fmt: skip
    """Return a table of relative errors (norm of the difference over norm): a row a P, a column a layer.

    `layer_errors` are by (step, visual block), shown as the mean over the steps; `latents` are the final ones.
    """
    layers = sorted({block for errors in layer_errors for _, block in errors})
    lines = [
        "Relative error against dense attention: of the final latent, then of each layer's attention (mean of steps).",
        "P      kept   latent  " + "  ".join(f"layer {block:<2}" for block in layers),
    ]
    for mass, share, errors, latent in zip(masses, kept, layer_errors, latents, strict=True):
        error = float((latent.float() - dense.float()).norm() / dense.float().norm())
        means = [_mean(value for (_, block), value in errors.items() if block == layer) for layer in layers]
        cells = "  ".join(f"{value:<8.4f}" for value in means)
        lines.append(f"{mass:<5g}  {share:>5.1%}  {error:.4f}  {cells}".rstrip())
    return "\n".join(lines)


def picture(run: Nabla) -> Tensor:
    """Draw the kept shares (layer by step) and one head's blocks, float `[1,H,W,3]` in 0…1."""
    from PIL import Image

    panels = [_heat_map(run.record)] if run.record.kept else []
    if run.record.example is not None:
        panels.append(_mask(run.record))
    if not panels:
        panels = [_titled(Image.new("RGB", (PICTURE_PX, GAP_PX), "white"), summary(run).splitlines()[0][:70])]
    width = sum(panel.width + GAP_PX for panel in panels) + GAP_PX
    sheet = Image.new("RGB", (width, max(panel.height for panel in panels) + 2 * GAP_PX), "white")
    left = GAP_PX
    for panel in panels:
        sheet.paste(panel, (left, GAP_PX))
        left += panel.width + GAP_PX
    pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8)
    return pixels.view(1, sheet.height, sheet.width, 3).float() / 255


def _heat_map(record: Record) -> Image.Image:
    kept = record.kept
    cells = torch.tensor([[-1.0 if share is None else share for share in row] for row in record.grid]).T
    least, most = min(kept.values()), max(kept.values())
    span = f"{least:.0%}" if most - least < 0.005 else f"{least:.0%} (dark) to {most:.0%} (bright)"
    return _titled(_enlarged(_colored(cells, least, most)), f"kept: {span}; down: layers, across: steps")


def _mask(record: Record) -> Image.Image:
    from PIL import Image

    example = record.example
    live = example.live()
    shown = Image.fromarray(((1 - live.byte()) * 255).numpy())
    # Averaging shows the density of masks that have more blocks than the picture pixels.
    is_large = len(live) > PICTURE_PX
    shown = shown.resize((PICTURE_PX, PICTURE_PX), Image.Resampling.BOX) if is_large else _enlarged(shown)
    share = live.float().mean().item()
    return _titled(
        shown.convert("RGB"), f"blocks of layer {example.block}, step {example.step}, head 0: {share:.0%} kept"
    )


def _colored(cells_HW: Tensor, least: float, most: float) -> Image.Image:
    from PIL import Image

    scale = torch.tensor(COLORS, dtype=torch.float32)
    place = (cells_HW - least).div(max(most - least, 1e-6)).clamp(0, 1) * (len(COLORS) - 1)
    below = place.floor().clamp(max=len(COLORS) - 2).long()
    color = torch.lerp(scale[below], scale[below + 1], (place - below).unsqueeze(-1))
    color[cells_HW < 0] = torch.tensor(DENSE_COLOR, dtype=torch.float32)
    return Image.fromarray(color.round().byte().numpy())


def _enlarged(image: Image.Image) -> Image.Image:
    from PIL import Image

    factor = max(1, PICTURE_PX // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _titled(image: Image.Image, title: str) -> Image.Image:
    from PIL import Image, ImageDraw

    width = max(image.width, round(ImageDraw.Draw(image).textlength(title)) + 2)
    out = Image.new("RGB", (width, image.height + TITLE_PX), "white")
    ImageDraw.Draw(out).text((0, 0), title, fill="black")
    out.paste(image, (0, TITLE_PX))
    return out


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found)
