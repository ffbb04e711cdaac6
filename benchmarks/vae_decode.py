"""Decoding of the video autoencoder: our modes against diffusers', same weights, same process, one thread.

    python benchmarks/vae_decode.py --out benchmarks/results/vae_decode_cpu.jsonl
    python benchmarks/vae_decode.py --device … --dtypes float16 --size 121 512 768     (a GPU)

timed: published widths, random weights, a small clip, against diffusers' windows; on a GPU with peak bytes.
counted: peak live bytes of a real size, the graphs run on the meta device, where nothing is computed.
planned: for published sizes and cards, what the planner chooses and its multiply-adds over those of one pass.

Sampling the statistics counts in the time of our modes and in `work`: 7 latent frames beside the 5 in 17 frames, but 12
beside the 31 in 121. `…_given` runs and `work_of_tiles` leave it out. `…_compiled` runs compile the norms while they
warm up. Random weights make pictures without meaning: `vae_quality.py` compares those.

    python benchmarks/vae_decode.py timed --runs stream_2 stream_2_compiled stream_2_given stream_2_compiled_given
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Run, cpu_seconds, device_seconds, emit, machine, peak_bytes
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kandinsky_core.memory.tracker import Tracker  # noqa: E402
from kandinsky_core.shapes import VideoShape, pixel_frames  # noqa: E402
from kandinsky_core.vae.compiled import Compiled  # noqa: E402
from kandinsky_core.vae.decoding import Decoding, exact_statistics  # noqa: E402
from kandinsky_core.vae.footprint import weight_bytes  # noqa: E402
from kandinsky_core.vae.hunyuan import HunyuanVideoVAE  # noqa: E402
from kandinsky_core.vae.passage import Piece  # noqa: E402
from kandinsky_core.vae.plan import (  # noqa: E402
    LATE_TILE,
    REFERENCE,
    SINGLE_PASS,
    STREAM,
    DecodePlan,
    plan_decode,
)
from kandinsky_core.vae.statistics import Normalise, Statistics, in_slices  # noqa: E402
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
GIVEN = "_given"  # ends the name of a run that gets its statistics
COMPILED = "_compiled"  # before that: of a run whose norms are compiled
PEERS = ("diffusers", "diffusers_tiled")
SIZE = ("FRAMES", "HEIGHT", "WIDTH")
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
        peers = {name: AutoencoderKLHunyuanVideo().eval() for name in PEERS}
    for peer in peers.values():
        peer.to(parameter.dtype).load_state_dict(ours.state_dict(), assign=True)
    peers["diffusers_tiled"].enable_tiling()
    return {name: lambda z, peer=peer: peer.decode(z).sample for name, peer in peers.items()}


def our_decode(
    vae: HunyuanVideoVAE, plan: DecodePlan, z: Tensor, statistics: Statistics | None, normalise: Normalise
) -> None:
    """Decode as the nodes do: pixels leave the device as bytes, piece by piece."""

    def take(piece: Piece) -> None:
        if not z.is_meta:
            piece.pixels_BCTHW.clamp(-1, 1).add(1).mul(127.5).to("cpu", torch.uint8)

    Decoding(vae, z, plan, on_piece=take, statistics=statistics, normalise=normalise).run()


def runs(
    vae: HunyuanVideoVAE, z: Tensor, names: Sequence[str]
) -> tuple[dict[str, Run], dict[str, DecodePlan]]:
    """Return the runs that were asked for, and the plans of ours."""
    chosen = {
        name: plan_decode(
            HUNYUAN_VAE,
            tuple(z.shape[2:]),
            free_bytes=None,
            itemsize=z.element_size(),
            **MODES[_mode(name)],
        )
        for name in names
        if _mode(name) in MODES
    }
    # Any statistics take the same time: those of one latent frame are quickly there.
    given = exact_statistics(vae, z[:, :, :1]) if any(name.endswith(GIVEN) for name in chosen) else None
    made: dict[str, Run] = {}
    for name, plan in chosen.items():
        normalise = Compiled(_never, _stop) if COMPILED in name else in_slices
        made[name] = partial(our_decode, vae, plan, z, given if name.endswith(GIVEN) else None, normalise)
    if importlib.util.find_spec("diffusers"):
        peers = diffusers_decodes(vae)
        made |= {name: partial(peers[name], z) for name in names if name in peers}
    return made, chosen


def _mode(name: str) -> str:
    return name.removesuffix(GIVEN).removesuffix(COMPILED)


def _never(_: BaseException) -> bool:
    return False


def _stop(line: str) -> None:
    raise SystemExit(f"What was to be measured is not there: {line}")


def ratios(values: Mapping[str, float], chosen: Iterable[str], what: str) -> dict[str, float]:
    """Return each of our values over each peer's."""
    return {
        f"{name}_{what}_vs_{peer}": round(values[name] / values[peer], 3)
        for name in chosen
        for peer in PEERS
        if peer in values
    }


@torch.no_grad()
def timed(
    device: torch.device, dtype: torch.dtype, shape: VideoShape, names: Sequence[str], repeats: int
) -> dict[str, Any]:
    """Return seconds of the runs and, on a GPU, their peak bytes; a processor's bytes are counted without computing."""
    vae = autoencoder(device, dtype)
    z = torch.randn(1, 16, *shape.latent_thw, device=device, dtype=dtype)
    made, chosen = runs(vae, z, names)
    if device.type == "cpu":
        seconds = cpu_seconds(made, repeats, warm_up=repeats > 1)
    else:
        seconds = device_seconds(made, device, repeats)
    record = _named("timed", dtype, shape) | {f"{name}_s": round(value, 3) for name, value in seconds.items()}
    record |= ratios(seconds, chosen, "time")
    if device.type != "cpu":
        peaks = {name: peak_bytes(run, device) for name, run in made.items()}
        record |= {f"{name}_bytes": value for name, value in peaks.items()} | ratios(peaks, chosen, "bytes")
    return record


@torch.no_grad()
def counted(shape: VideoShape, names: Sequence[str]) -> dict[str, Any]:
    """Return live bytes in float16, counted on the meta device, and what our plans say of them."""
    vae = autoencoder(torch.device("meta"), torch.float16)
    z = torch.empty(1, 16, *shape.latent_thw, device="meta", dtype=torch.float16)
    made, chosen = runs(vae, z, names)
    peaks = {}
    for name, run in made.items():
        with Tracker("meta") as tracker:
            run()
        peaks[name] = tracker.peak_bytes
    record = _named("counted", torch.float16, shape) | {
        f"{name}_bytes": value for name, value in peaks.items()
    }
    record |= {f"{name}_planned_bytes": plan.peak_bytes for name, plan in chosen.items()}
    return record | ratios(peaks, chosen, "bytes")


def _named(kind: str, dtype: torch.dtype, shape: VideoShape) -> dict[str, Any]:
    size = {"frames": shape.frames, "height": shape.height_px, "width": shape.width_px}
    return {"kind": kind, "dtype": str(dtype).removeprefix("torch.")} | size


def planned(shape: VideoShape, card_gib: int) -> dict[str, Any]:
    """Return what the planner chooses for a card, and its multiply-adds over those of one pass."""
    free_bytes = int(card_gib * FREE_SHARE * GIB) - weight_bytes(HUNYUAN_VAE, 2)
    plan = plan_decode(HUNYUAN_VAE, shape.latent_thw, free_bytes=free_bytes, itemsize=2)
    latents = shape.latent_thw[0]
    released = plan_decode(HUNYUAN_VAE, shape.latent_thw, free_bytes=None, itemsize=2, mode=REFERENCE)
    stream = plan_decode(HUNYUAN_VAE, shape.latent_thw, free_bytes=None, itemsize=2, mode=STREAM, chunk=1)
    tiles = plan.work / stream.work if plan.mode != REFERENCE else plan.work  # a stream's work is one pass and sampling
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
    parser.add_argument("kinds", nargs="*", default=["timed", "counted", "planned"])
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtypes", nargs="+", default=["float32"], help="16 bit is slow on most processors")
    parser.add_argument("--size", nargs=3, type=int, default=[17, 64, 64], metavar=SIZE, help="to time")
    parser.add_argument("--counted-size", nargs=3, type=int, default=[17, 512, 768], metavar=SIZE)
    parser.add_argument(
        "--runs", nargs="+", default=["stream_2", f"stream_2{GIVEN}", "late_2x2", "diffusers"]
    )
    parser.add_argument(
        "--counted-runs", nargs="+", default=["reference", "stream_1", "stream_2", "late_2x2", *PEERS]
    )
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    emit({"machine": machine(options.device)}, options.out)
    if "planned" in options.kinds:
        for size in SIZES:
            for card_gib in CARDS_GIB:
                emit(planned(_shape(size), card_gib), options.out)
    if "counted" in options.kinds:
        emit(counted(_shape(options.counted_size), options.counted_runs), options.out)
    if "timed" in options.kinds:
        for dtype in (getattr(torch, name) for name in options.dtypes):
            shape = _shape(options.size)
            emit(timed(options.device, dtype, shape, options.runs, options.repeats), options.out)


def _shape(size: Sequence[int]) -> VideoShape:
    frames, height, width = size
    return VideoShape(frames=frames, height_px=height, width_px=width)


if __name__ == "__main__":
    main()
