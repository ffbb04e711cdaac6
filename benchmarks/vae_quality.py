"""What each way to decode does to the picture, on the built-in autoencoder and drawn clips.

    python benchmarks/vae_quality.py --out benchmarks/results/vae_quality_nano.jsonl

Against the source: PSNR, and flicker (mean change from frame to frame of each frame's mean error, in grey levels).
Against the decode in one pass: PSNR, and seams: the error's mean step across the borders of tiles (in time: of the
released windows) over the same step in one pass, so 1 means that nothing is seen of a border. Only clips that move.
"""

from __future__ import annotations

import argparse
import logging
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from measure import emit, machine
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kandinsky_core.io.load import load_vae  # noqa: E402
from kandinsky_core.nano import files  # noqa: E402
from kandinsky_core.nano.batch import whole_clips  # noqa: E402
from kandinsky_core.nano.draw import scenes  # noqa: E402
from kandinsky_core.shapes import VAE_SPATIAL, VAE_TEMPORAL  # noqa: E402
from kandinsky_core.vae.decoding import decode_with, exact_statistics  # noqa: E402
from kandinsky_core.vae.hunyuan import HunyuanVideoVAE  # noqa: E402
from kandinsky_core.vae.plan import (  # noqa: E402
    LATE_TILE,
    REFERENCE,
    SINGLE_PASS,
    STREAM,
    late_cuts,
    plan_decode,
    reference_tile_px,
)
from kandinsky_core.vae.tiling import WINDOW_STRIDE, single_plan, tile_spans  # noqa: E402
from kandinsky_core.variants import VAESpec  # noqa: E402

SEED, MANY = 7, 10_000  # scenes are drawn from this stream, as many as are asked for
LEVELS = 127.5  # grey levels per unit of pixels in -1…1
WAYS: dict[str, dict[str, Any]] = {
    "reference": {"mode": REFERENCE, "tiles": (1, 1)},
    "reference, 2 x 2 tiles": {"mode": REFERENCE, "tiles": (2, 2)},
    "stream, 1": {"mode": STREAM, "chunk": 1},
    "stream, 2": {"mode": STREAM, "chunk": 2},
    "late-tile, 2 x 2": {"mode": LATE_TILE, "chunk": 1, "tiles": (2, 2)},
    "single-pass, 2": {"mode": SINGLE_PASS, "chunk": 2},
}


def decibels(a: Tensor, b: Tensor) -> float:
    """Return the PSNR of pixels in -1…1."""
    error = (a - b).square().mean().clamp_min(1e-12)
    return (10 * torch.log10(4 / error)).item()


def flicker(error_BCTHW: Tensor) -> float:
    """Return the mean change from frame to frame of a frame's mean error, in grey levels."""
    return error_BCTHW.mean((1, 3, 4)).diff(dim=1).abs().mean().item() * LEVELS


def seam(error_BCTHW: Tensor, whole_error_BCTHW: Tensor, borders: list[int], dim: int) -> float | None:
    """Return the mean step of the error across the borders over that of the decode in one pass."""
    if not borders:
        return None
    made, whole = (
        error.diff(dim=dim).abs().transpose(0, dim)[[border - 1 for border in borders]].mean()
        for error in (error_BCTHW, whole_error_BCTHW)
    )
    return (made / whole).item()


def borders_px(mode: str, cells: int, count: int) -> list[int]:
    """Return where tiles end, along one side: hard cuts, or the ends of the cross-fades."""
    if count == 1:
        return []
    if mode == LATE_TILE:
        return [cut.start * VAE_SPATIAL // 2 for cut in late_cuts(cells, count)[1:]]
    spans = tile_spans(cells, reference_tile_px(cells, count))[1:]
    return [VAE_SPATIAL * edge for span in spans for edge in (span.start, span.start + span.blend)]


@torch.no_grad()
def compare(vae: HunyuanVideoVAE, clip_BCTHW: Tensor) -> dict[str, dict[str, float | None]]:
    """Decode one clip in every way and return each one's figures."""
    spec: VAESpec = vae.spec
    frames, height, width = clip_BCTHW.shape[2:]
    latent_thw = ((frames - 1) // VAE_TEMPORAL + 1, height // VAE_SPATIAL, width // VAE_SPATIAL)
    z = vae.encode(clip_BCTHW).mean
    whole = vae.decode(z, plan=single_plan(*latent_thw)).clamp(-1, 1)
    windows = list(range(1 + VAE_TEMPORAL * WINDOW_STRIDE, frames, VAE_TEMPORAL * WINDOW_STRIDE))
    made = {"one pass": (whole, (1, 1), "")}
    for name, asked in WAYS.items():
        plan = plan_decode(spec, latent_thw, free_bytes=None, itemsize=4, **asked)
        made[name] = (decode_with(vae, z, plan).clamp(-1, 1), plan.tiles, plan.mode)
    plan = plan_decode(spec, latent_thw, free_bytes=None, itemsize=4, mode=STREAM, chunk=2)
    exact = decode_with(vae, z, plan, statistics=exact_statistics(vae, z)).clamp(-1, 1)
    made["stream, 2, exact statistics"] = (exact, (1, 1), STREAM)
    figures = {}
    for name, (pixels, tiles, mode) in made.items():
        error, whole_error = pixels - clip_BCTHW, whole - clip_BCTHW
        sides = [
            seam(error, whole_error, borders_px(mode, cells, count), dim)
            for dim, cells, count in zip((3, 4), latent_thw[1:], tiles, strict=True)
        ]
        figures[name] = {
            "psnr_source_db": decibels(pixels, clip_BCTHW),
            "psnr_one_pass_db": None if name == "one pass" else decibels(pixels, whole),
            "flicker": flicker(error),
            "seam_space": None if None in sides else sum(sides) / 2,
            "seam_time": seam(error, whole_error, windows, 2),
        }
    return figures


def main() -> None:
    """Compare on clips of some sizes and lengths; one JSON line per way and size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    parser.add_argument("--clips", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", default=["49x64", "73x64"], help="FRAMESxSIDE")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    vae, *_ = load_vae(files()["vae"], dtype=torch.float32)
    emit({"machine": machine(), "clips": options.clips, "seed": SEED}, options.out)
    for size in options.sizes:
        frames, side = map(int, size.split("x"))
        moving = (scene for scene in scenes(SEED, MANY, unseen=True) if scene.motion != "still")
        clips = whole_clips(islice(moving, options.clips), size_px=side, frames=frames, at_once=1)
        results = [compare(vae, clip) for clip in clips]
        for name in results[0]:
            record: dict[str, Any] = {"way": name, "frames": frames, "side": side}
            for figure in results[0][name]:
                values = [result[name][figure] for result in results]
                record[figure] = None if None in values else round(sum(values) / len(values), 3)
            emit(record, options.out)


if __name__ == "__main__":
    main()
