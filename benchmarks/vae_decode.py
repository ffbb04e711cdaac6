"""Decoding of the video autoencoder: our modes against diffusers', same weights, same process, one thread.

    python benchmarks/vae_decode.py --out benchmarks/results/vae_decode_cpu.jsonl
    python benchmarks/vae_decode.py --device … --dtypes float16 --size 121 512 768     (a GPU)

measured: published widths, random weights, a small clip; time and peak live bytes beside those of diffusers' windows.
counted: peak live bytes of real sizes, the graphs run on the meta device, where nothing is computed.
planned: for published sizes and cards, what the planner chooses and its multiply-adds over those of one pass.

Statistics that our modes sample count in their time; `work` has them, `work_of_tiles` leaves them out. Random weights
make pictures without meaning: `vae_quality.py` compares those.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import cpu_seconds, device_seconds, emit, machine, peak_bytes
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kandinsky_core.memory.tracker import Tracker  # noqa: E402
from kandinsky_core.shapes import VideoShape, pixel_frames  # noqa: E402
from kandinsky_core.vae.decoding import Decoding  # noqa: E402
from kandinsky_core.vae.footprint import weight_bytes  # noqa: E402
from kandinsky_core.vae.hunyuan import HunyuanVideoVAE  # noqa: E402
from kandinsky_core.vae.plan import (  # noqa: E402
    LATE_TILE,
    REFERENCE,
    SINGLE_PASS,
    STREAM,
    DecodePlan,
    plan_decode,
)
from kandinsky_core.vae.tiling import sampled_latents  # noqa: E402
from kandinsky_core.variants import HUNYUAN_VAE  # noqa: E402

GIB = 2**30
# What our modes are asked for, and the name each has in the results.
MODES: dict[str, dict[str, Any]] = {
    "reference": {"mode": REFERENCE, "tiles": (1, 1)},
    "stream_1": {"mode": STREAM, "chunk": 1},
    "stream_2": {"mode": STREAM, "chunk": 2},
    "late_2x2": {"mode": LATE_TILE, "chunk": 1, "tiles": (2, 2)},
    "single_pass_1": {"mode": SINGLE_PASS, "chunk": 1},
}
CARDS_GIB = (6, 8, 12, 16, 24)
FREE_SHARE = 0.92  # of a card is there for the decode and its weights when nothing else is resident
SIZES = ((121, 512, 768), (241, 512, 768), (121, 768, 1280), (241, 768, 1280), (121, 640, 1408))


def autoencoder(device: torch.device, dtype: torch.dtype) -> HunyuanVideoVAE:
    """Return a random autoencoder of the published widths."""
    torch.manual_seed(0)
    return HunyuanVideoVAE(HUNYUAN_VAE, device=device, dtype=dtype).eval().requires_grad_(False)


def diffusers_decodes(ours: HunyuanVideoVAE) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return diffusers' decode with our weights: its windows of time, and these with `enable_tiling`."""
    from diffusers import AutoencoderKLHunyuanVideo

    parameter = next(ours.parameters())
    with torch.device("meta"):
        peers = {name: AutoencoderKLHunyuanVideo().eval() for name in ("diffusers", "diffusers_tiled")}
    for peer in peers.values():
        peer.to(parameter.dtype).load_state_dict(ours.state_dict(), assign=True)
    peers["diffusers_tiled"].enable_tiling()
    return {name: lambda z, peer=peer: peer.decode(z).sample for name, peer in peers.items()}


def our_decode(vae: HunyuanVideoVAE, plan: DecodePlan, z: Tensor) -> int:
    """Decode as the nodes do: pixels leave the device as bytes, piece by piece; returns how many came."""
    count = 0

    def take(piece: Any) -> None:
        nonlocal count
        if not z.is_meta:
            count += piece.pixels_BCTHW.clamp(-1, 1).add(1).mul(127.5).to("cpu", torch.uint8).numel()

    Decoding(vae, z, plan, on_piece=take).run()
    return count


def plans(latent_thw: tuple[int, int, int], itemsize: int) -> dict[str, DecodePlan]:
    """Return the plan of each of our modes."""
    return {
        name: plan_decode(HUNYUAN_VAE, latent_thw, free_bytes=None, itemsize=itemsize, **asked)
        for name, asked in MODES.items()
    }


@torch.no_grad()
def measured(
    device: torch.device, dtype: torch.dtype, shape: VideoShape, repeats: int, names: list[str]
) -> dict[str, Any]:
    """Return seconds and peak bytes of every mode, and their ratios to diffusers'."""
    vae = autoencoder(device, dtype)
    z = torch.randn(1, 16, *shape.latent_thw, device=device, dtype=dtype)
    chosen = plans(shape.latent_thw, dtype.itemsize)
    runs: dict[str, Callable[[], Any]] = {
        name: lambda plan=plan: our_decode(vae, plan, z) for name, plan in chosen.items() if name in names
    }
    peers = diffusers_decodes(vae) if importlib.util.find_spec("diffusers") else {}
    runs |= {name: lambda decode=decode: decode(z) for name, decode in peers.items() if name in names}
    peaks = {name: peak_bytes(run, device) for name, run in runs.items()}
    if device.type == "cpu":
        seconds = cpu_seconds(runs, repeats, warm_up=False)
    else:
        seconds = device_seconds(runs, device, repeats)
    record: dict[str, Any] = {"kind": "measured", "dtype": str(dtype).removeprefix("torch.")}
    record |= {"frames": shape.frames, "height": shape.height_px, "width": shape.width_px}
    for name in runs:
        record |= {f"{name}_s": round(seconds[name], 3), f"{name}_peak_bytes": peaks[name]}
        if name in chosen:
            record[f"{name}_planned_bytes"] = chosen[name].peak_bytes
            for peer in peers.keys() & runs.keys():
                record[f"{name}_time_vs_{peer}"] = round(seconds[name] / seconds[peer], 3)
                record[f"{name}_bytes_vs_{peer}"] = round(peaks[name] / peaks[peer], 3)
    return record


@torch.no_grad()
def counted(shape: VideoShape) -> dict[str, Any]:
    """Return live bytes of one real size in float16, counted on the meta device, and their ratios to diffusers'."""
    device, dtype = torch.device("meta"), torch.float16
    vae = autoencoder(device, dtype)
    z = torch.empty(1, 16, *shape.latent_thw, device=device, dtype=dtype)
    chosen = plans(shape.latent_thw, dtype.itemsize)
    runs: dict[str, Callable[[], Any]] = {
        name: lambda plan=plan: our_decode(vae, plan, z)
        for name, plan in chosen.items()
        if name != "single_pass_1"
    }
    peers = diffusers_decodes(vae) if importlib.util.find_spec("diffusers") else {}
    runs |= {name: lambda decode=decode: decode(z) for name, decode in peers.items()}
    record: dict[str, Any] = {"kind": "counted", "dtype": "float16"}
    record |= {"frames": shape.frames, "height": shape.height_px, "width": shape.width_px}
    peaks = {}
    for name, run in runs.items():
        with Tracker("meta") as tracker:
            run()
        peaks[name] = tracker.peak_bytes
        record[f"{name}_bytes"] = tracker.peak_bytes
    for name in chosen.keys() & runs.keys():
        record[f"{name}_planned_bytes"] = chosen[name].peak_bytes
        record |= {f"{name}_bytes_vs_{peer}": round(peaks[name] / peaks[peer], 3) for peer in peers}
    return record


def planned(shape: VideoShape, card_gib: int) -> dict[str, Any]:
    """Return what the planner chooses for a card, and its multiply-adds over those of one pass."""
    free_bytes = int(card_gib * FREE_SHARE * GIB) - weight_bytes(HUNYUAN_VAE, 2, encoder=False)
    plan = plan_decode(HUNYUAN_VAE, shape.latent_thw, free_bytes=free_bytes, itemsize=2)
    latents = shape.latent_thw[0]
    released = plan_decode(HUNYUAN_VAE, shape.latent_thw, free_bytes=None, itemsize=2, mode=REFERENCE)
    tiles = plan.work / (1 + sampled_latents(latents) / latents) if plan.mode != REFERENCE else plan.work
    return {
        "kind": "planned", "frames": pixel_frames(latents), "height": shape.height_px, "width": shape.width_px,
        "card_gib": card_gib, "plan": str(plan), "peak_gib": round(plan.peak_bytes / GIB, 2),
        "work": round(plan.work, 3), "work_of_tiles": round(tiles, 3),
        "work_of_released_windows": round(released.work, 3),
    }  # fmt: skip


def main() -> None:
    """Run what was asked for and write one JSON line each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", default=["measured", "counted", "planned"])
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtypes", nargs="+", default=["float32"], help="16 bit is slow on most processors")
    parser.add_argument(
        "--size", nargs=3, type=int, default=[17, 64, 64], metavar=("FRAMES", "HEIGHT", "WIDTH")
    )
    parser.add_argument("--counted-size", nargs=3, type=int, default=[33, 512, 768])
    parser.add_argument("--modes", nargs="+", default=[*MODES, "diffusers", "diffusers_tiled"])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    emit({"machine": machine(options.device)}, options.out)
    if "planned" in options.kinds:
        for frames, height, width in SIZES:
            shape = VideoShape(frames=frames, height_px=height, width_px=width)
            for card_gib in CARDS_GIB:
                emit(planned(shape, card_gib), options.out)
    if "counted" in options.kinds:
        frames, height, width = options.counted_size
        emit(counted(VideoShape(frames=frames, height_px=height, width_px=width)), options.out)
    if "measured" in options.kinds:
        frames, height, width = options.size
        shape = VideoShape(frames=frames, height_px=height, width_px=width)
        for dtype in options.dtypes:
            emit(
                measured(options.device, getattr(torch, dtype), shape, options.repeats, options.modes),
                options.out,
            )


if __name__ == "__main__":
    main()
