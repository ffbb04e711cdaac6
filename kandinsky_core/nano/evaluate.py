"""Measure the nano family on clips and prompts it has never seen, and draw a contact sheet of what it made."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..io.load import load_crossdit, load_vae
from ..model.crossdit import CrossDiT
from ..sampling.conditioning import Known, TextCondition
from ..sampling.flow import guide, noise, sample, velocity_of
from ..sampling.schedule import timesteps
from ..shapes import latent_frames
from ..text.encoder import TextEncoder, load_text_encoder
from ..vae.hunyuan import HunyuanVideoVAE
from ..variants import Variant
from .autoencoder import psnr
from .caption import caption
from .draw import Scene, draw, scenes
from .grade import ATTRIBUTES, Grade, grade
from .text import encode_batch

BATCH = 16
SHEET_FRAMES = 6
UNSEEN_SEED = 1_000_003  # stream of evaluation clips; training streams use small seeds


@dataclass(frozen=True, slots=True)
class Family:
    """The loaded models and the settings of their variant."""

    transformer: CrossDiT
    vae: HunyuanVideoVAE
    text: TextEncoder
    variant: Variant

    @property
    def scale(self) -> float:
        """Model latents per raw latent."""
        return self.vae.spec.scaling_factor


def load_family(files: dict[str, Path], device: torch.device) -> Family:
    """Load the four files that `nano.files()` names, in float32."""
    loaded = load_crossdit(files["model"], dtype=torch.float32, device=device)
    text = load_text_encoder(files["text_encoder"], files["clip"], dtype=torch.float32, device=device)
    vae = load_vae(files["vae"], dtype=torch.float32, device=device).vae
    return Family(loaded.model.eval(), vae.eval(), text.eval(), loaded.variant)


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % Wilson confidence interval of a share."""
    if count == 0:
        return 0.0, 1.0
    share = hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def summary(pairs: Sequence[tuple[Scene, Grade]], attributes: Sequence[str] = ATTRIBUTES) -> dict[str, object]:
    """Return for each attribute the share of clips that show what was asked for, with its interval."""
    out: dict[str, object] = {}
    for attribute in attributes:
        hits = sum(result.matches(item)[attribute] for item, result in pairs)
        low, high = wilson(hits, len(pairs))
        out[attribute] = {
            "right": hits, "count": len(pairs), "share": round(hits / max(1, len(pairs)), 4),
            "interval": [round(low, 4), round(high, 4)],
        }  # fmt: skip
    return out


def pixels(clip_BTHWC: Tensor) -> Tensor:
    """Turn clips `[B,T,H,W,3]` in 0…1 into `[B,3,T,H,W]` in -1…1."""
    return clip_BTHWC.movedim(-1, 1) * 2 - 1


def clips(pixels_BCTHW: Tensor) -> Tensor:
    """Turn pixels `[B,3,T,H,W]` into clips `[B,T,H,W,3]` in 0…1 on the CPU."""
    return ((pixels_BCTHW.float().clamp(-1, 1) + 1) / 2).movedim(1, -1).cpu()


@torch.no_grad()
def reconstruct(vae: HunyuanVideoVAE, clip_BTHWC: Tensor) -> Tensor:
    """Encode and decode clips, both `[B,T,H,W,3]` in 0…1."""
    weight = next(vae.parameters())
    parts = [vae.decode(vae.encode(pixels(part).to(weight)).mean) for part in clip_BTHWC.split(BATCH)]
    return torch.cat([clips(part) for part in parts])


@torch.no_grad()
def generate(
    family: Family, prompts: Sequence[str], *, images_BHWC: Tensor | None = None, frames: int = 17, size_px: int = 64,
    seed: int = 0, steps: int | None = None, guidance: float | None = None, shift: float | None = None,
) -> Tensor:  # fmt: skip
    """Make one clip per prompt, `[B,T,H,W,3]` in 0…1; with images they are the first frames."""
    row = family.variant
    device = next(family.transformer.parameters()).device
    times = timesteps(steps or row.steps, shift or row.shift)
    template = "video" if frames > 1 else "image"
    latent = (family.vae.spec.latent_channels, latent_frames(frames), size_px // 8, size_px // 8)
    out = []
    for start in range(0, len(prompts), BATCH):
        part = list(prompts[start : start + BATCH])
        known = Known()
        if images_BHWC is not None:
            first = pixels(images_BHWC[start : start + BATCH][:, None].to(device))
            known = Known(frames_BCTHW=family.vae.encode(first).mean * family.scale)
        velocities = []
        for texts in (part, [""]):
            features, mask, pooled = encode_batch(family.text, texts, template)
            condition = TextCondition(features, pooled, mask)
            velocities.append(
                velocity_of(
                    family.transformer, condition, dtype=torch.float32, rope_scale=row.rope_scale, known=known
                )
            )
        # One draw per clip, so that a clip does not depend on its neighbours in the batch.
        start_noise = torch.cat([noise((1, *latent), seed + start + index) for index in range(len(part))])
        velocity = guide(*velocities, row.guidance if guidance is None else guidance)
        z = sample(velocity, start_noise.to(device), times, known=known)
        out.append(clips(family.vae.decode(z / family.scale)))
    return torch.cat(out)


def graded(made_BTHWC: Tensor, asked: Sequence[Scene]) -> list[tuple[Scene, Grade]]:
    """Grade clips against the scenes they should show."""
    return [(item, grade(clip)) for item, clip in zip(asked, made_BTHWC, strict=True)]


def measure_vae(vae: HunyuanVideoVAE, count: int = 64, *, size_px: int = 64, frames: int = 17) -> dict[str, object]:
    """Reconstruct unseen clips: PSNR in dB and what the grader still recognises."""
    asked = list(scenes(UNSEEN_SEED + 1, count))
    real = torch.stack([draw(item, size_px=size_px, frames=frames) for item in asked])
    made = reconstruct(vae, real)
    each = psnr(pixels(made), pixels(real))
    still = psnr(pixels(reconstruct(vae, real[:, :1])), pixels(real[:, :1]))
    return {
        "count": count,
        "psnr_mean_db": round(each.mean().item(), 2),
        "psnr_least_db": round(each.min().item(), 2),
        "psnr_of_mean_error_db": round(-10 * torch.log10((10 ** (-each / 10)).mean()).item(), 2),
        "psnr_picture_mean_db": round(still.mean().item(), 2),
        "grades": summary(graded(made, asked)),
    }


def evaluate(
    family: Family, count: int, *, frames: int = 17, size_px: int = 64, sheet: Path | None = None,
    note: Callable[[str], None] = lambda _: None, **sampling: float,
) -> dict[str, object]:  # fmt: skip
    """Grade generations for `count` held-out combinations in every task."""
    rng = random.Random("evaluation")
    asked = list(scenes(UNSEEN_SEED, count, unseen=True))
    real = torch.stack([draw(item, size_px=size_px, frames=frames) for item in asked])
    words = [caption(item, rng) for item in asked]
    common = {"size_px": size_px, **sampling}
    note("text to video")
    t2v = generate(family, words, frames=frames, **common)
    note("image to video")
    i2v = generate(family, words, images_BHWC=real[:, 0], frames=frames, seed=50_000, **common)
    note("text to image")
    t2i = generate(family, [caption(item, rng, moving=False) for item in asked], frames=1, seed=90_000, **common)
    own = reconstruct(family.vae, real[:, :1])
    kept = psnr(pixels(i2v[:, :1]), pixels(own))
    kept_real = psnr(pixels(i2v[:, :1]), pixels(real[:, :1]))
    if sheet is not None:
        rows = [(f"T2V: {word}", clip) for word, clip in zip(words[:8], t2v, strict=False)]
        rows += [(f"I2V: {word}", clip) for word, clip in zip(words[:8], i2v, strict=False)]
        contact_sheet(rows, sheet)
    return {
        "count": count,
        "t2v": summary(graded(t2v, asked)),
        "i2v": summary(graded(i2v, asked)),
        "t2i": summary(graded(t2i, asked), ("color", "shape", "background")),
        "i2v_first_frame": {
            "psnr_to_reconstruction_mean_db": round(kept.mean().item(), 2),
            "psnr_to_reconstruction_least_db": round(kept.min().item(), 2),
            "psnr_to_image_mean_db": round(kept_real.mean().item(), 2),
        },
    }


def contact_sheet(rows: Sequence[tuple[str, Tensor]], path: Path, *, columns: int = 2, zoom: int = 1) -> None:
    """Write a PNG with a few frames of every clip `[T,H,W,3]` and its prompt under them."""
    from PIL import Image, ImageDraw

    label_px = 14
    _, height, width, _ = rows[0][1].shape
    cell = (SHEET_FRAMES * width * zoom + 4, height * zoom + label_px + 4)
    lines = -(-len(rows) // columns)
    picture = Image.new("RGB", (columns * cell[0], lines * cell[1]), "white")
    pen = ImageDraw.Draw(picture)
    for index, (text, clip) in enumerate(rows):
        left, top = index % columns * cell[0], index // columns * cell[1]
        chosen = torch.linspace(0, len(clip) - 1, SHEET_FRAMES).round().long()
        strip = torch.cat(list(clip[chosen]), 1)
        image = Image.fromarray((strip * 255).round().byte().numpy())
        picture.paste(image.resize((image.width * zoom, image.height * zoom)), (left, top))
        pen.text((left + 2, top + height * zoom + 1), text[:64], fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
