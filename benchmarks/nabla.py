"""Block-sparse attention and its selection against dense attention, FlexAttention and the published recipe.

    python benchmarks/nabla.py attention --out benchmarks/results/nabla_cpu.jsonl
    python benchmarks/nabla.py selection --out benchmarks/results/nabla_cpu.jsonl
    python benchmarks/nabla.py step --device … (a GPU: a full-size Lite 10 s forward, dense and block-sparse)

attention: random queries, keys and values and random blocks of a given share, so the figures are the kernels' alone.
selection: smooth maps (random ones are flat, which no model's are), against the released mask construction.
On a processor one thread and processor time, on a GPU the time between synchronisations; runs take turns.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import device_seconds, emit, machine, peak_bytes
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kandinsky_core.model import CrossDiT  # noqa: E402
from kandinsky_core.sparse import nabla  # noqa: E402
from kandinsky_core.sparse.kernels import blockwise, flex, fused  # noqa: E402
from kandinsky_core.sparse.kernels.choice import FAILURES, Kernels  # noqa: E402
from kandinsky_core.sparse.kernels.trial import relative_error  # noqa: E402
from kandinsky_core.sparse.layout import BlockLayout, from_live  # noqa: E402
from kandinsky_core.sparse.selection import published, select_from_means  # noqa: E402
from kandinsky_core.sparse.tiles import Tiles  # noqa: E402
from kandinsky_core.sparse.window import sliding_window  # noqa: E402
from kandinsky_core.variants import VARIANTS  # noqa: E402

GRIDS = {4096: (8, 16, 32), 8192: (8, 32, 32), 16_384: (16, 32, 32), 47_616: (31, 32, 48), 93_696: (61, 32, 48)}
KEPT = (0.5, 0.25, 0.1)
KERNELS = {"torch": blockwise.attend, "flex": flex.attend, "triton": fused.attend}
LONG_TOK = 20_000
LITE_10S = (61, 32, 48)

logger = logging.getLogger("kandinsky5.benchmark")


def random_layout(tiles: Tiles, heads: int, kept: float) -> BlockLayout:
    """Return random blocks, the given share of all in every row give or take a fifth, its own always among them."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(1, heads, tiles.blocks, tiles.blocks, generator=generator)
    order.diagonal(dim1=-2, dim2=-1).fill_(-1)
    count = kept * tiles.blocks * (0.8 + 0.4 * torch.rand(1, heads, tiles.blocks, 1, generator=generator))
    live = order.argsort(-1).argsort(-1) < count.round().clamp(min=1)
    return from_live(tiles, live.to(tiles.device))


def random_tokens(tiles: Tiles, heads: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Return q, k, v, strided as the model's projections leave them."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, tiles.tokens, heads, width)
    return [torch.randn(shape, generator=generator).to(tiles.device, dtype).transpose(1, 2) for _ in range(3)]


def attention(options: argparse.Namespace) -> None:
    """Every kernel against dense attention, by length, kept share and dtype."""
    for dtype in (getattr(torch, name) for name in options.dtypes):
        for tokens, grid in GRIDS.items():
            if not options.min_tokens <= tokens <= options.max_tokens:
                continue
            tiles = Tiles(grid, options.device)
            q, k, v = random_tokens(tiles, options.heads, options.width, dtype)
            for kept in KEPT:
                layout = random_layout(tiles, options.heads, kept)
                runs = {"dense": partial(F.scaled_dot_product_attention, q, k, v)}
                runs |= {name: partial(KERNELS[name], q, k, v, layout) for name in options.kernels}
                record = {"what": "attention", "dtype": str(dtype).removeprefix("torch."), "tokens": tokens}
                record |= {"heads": options.heads, "head_dim": options.width, "kept": round(layout.kept, 4)}
                # Long sequences take seconds a run: a turn is enough for a steady figure.
                turns = options.repeats if tokens <= LONG_TOK else 1
                emit(record | compared(runs, options.device, turns), options.out)


def compared(runs: dict[str, Callable[[], Tensor]], device: torch.device, turns: int) -> dict[str, float | str]:
    """Return seconds, peak bytes, speed against dense and the largest error of a kernel to the first one's result."""
    record: dict[str, float | str] = {}
    outputs = {}
    for name in list(runs):
        try:
            outputs[name] = runs[name]()
        except FAILURES as error:
            record[f"{name}_failed"] = str(error).partition("\n")[0]
            del runs[name]
    seconds = device_seconds(runs, device, turns)
    first = next((name for name in runs if name != "dense"), None)
    for name, run in runs.items():
        record |= {f"{name}_s": float(f"{seconds[name]:.4g}"), f"{name}_peak_bytes": peak_bytes(run, device)}
        if name != "dense":
            record[f"{name}_speed_vs_dense"] = round(seconds["dense"] / seconds[name], 3)
            record[f"{name}_bytes_vs_dense"] = round(record[f"{name}_peak_bytes"] / record["dense_peak_bytes"], 3)
        if name not in ("dense", first):
            record[f"{name}_error_to_{first}"] = float(f"{relative_error(outputs[name], outputs[first]):.2e}")
    return record


def smooth_means(tiles: Tiles, heads: int, amplitude: float, width: int = 64) -> list[Tensor]:
    """Return float32 block means of q and k: waves over the clip of random directions, and noise."""
    generator = torch.Generator().manual_seed(0)
    t, h, w = tiles.blocks_thw
    places = torch.cartesian_prod(torch.arange(t) / t, torch.arange(h) / h, torch.arange(w) / w)
    turns = places @ (6 * torch.randn(heads, 3, width, generator=generator))
    waves = torch.cos(turns + 2 * math.pi * torch.rand(width, generator=generator)) * 2 * amplitude
    return [
        (waves + 0.3 * torch.randn(waves.shape, generator=generator))[None].to(tiles.device) for _ in range(2)
    ]


def released(q_BAKE: Tensor, k_BAKE: Tensor, mass: float, window_KK: Tensor) -> tuple[Tensor, Tensor]:
    """Build the index that the released recipe hands to FlexAttention: three sorts of the whole map."""
    weight = torch.softmax(q_BAKE @ k_BAKE.mT / math.sqrt(q_BAKE.shape[-1]), dim=-1)
    values, places = weight.sort(-1)
    keep = (values.cumsum_(-1) >= 1 - mass).int()
    keep = torch.logical_or(keep.gather(-1, places.argsort(-1)), window_KK)
    return keep.sum(-1).int(), keep.int().argsort(dim=-1, descending=True).int()


def selection(options: argparse.Namespace) -> None:
    """Our selection against the released one, from the same block means to what the kernel reads."""
    for grid in (LITE_10S, (31, 32, 48)):
        tiles = Tiles(grid, options.device)
        window_KK = sliding_window(tiles, (11, 3, 3))
        for amplitude in (0.55, 0.8):
            q, k = smooth_means(tiles, 4, amplitude)
            # The published selection takes tokens: blocks of 64 equal ones have these means.
            tokens = [x.repeat_interleave(64, dim=2) for x in (q, k)]
            for mass in (0.9, 0.7):
                find = Kernels().threshold
                ours = select_from_means(q, k, tiles, mass, window_KK, find)
                exact = published(*tokens, tiles, mass) | window_KK
                runs = {
                    "released": partial(released, q, k, mass, window_KK),
                    "ours": partial(select_from_means, q, k, tiles, mass, window_KK, find),
                }
                seconds = device_seconds(runs, options.device, options.repeats)
                peaks = {name: peak_bytes(run, options.device) for name, run in runs.items()}
                record = {"what": "selection", "blocks": tiles.blocks, "heads": 4, "P": mass, "amplitude": amplitude}
                record |= {"kept": round(ours.kept, 4)}
                record |= {f"{name}_s": float(f"{value:.4g}") for name, value in seconds.items()}
                record |= {f"{name}_peak_bytes": value for name, value in peaks.items()}
                record |= {
                    "time_vs_released": round(seconds["ours"] / seconds["released"], 3),
                    "bytes_vs_released": round(peaks["ours"] / peaks["released"], 3),
                    "equal_entries": round(1 - (ours.live() != exact).float().mean().item(), 6),
                }
                emit(record, options.out)


@torch.no_grad()
def step(options: argparse.Namespace) -> None:
    """One forward of Lite at 10 s with full-size random weights: dense, and block-sparse at given shares.

    Random weights give flat maps, so the blocks are drawn (`random_layout`) and the selection is run and thrown away:
    its cost counts.
    """
    row = VARIANTS["lite_t2v_10s_sft"]
    spec = replace(row.spec, num_visual_blocks=options.blocks or row.spec.num_visual_blocks)
    torch.manual_seed(0)
    with torch.device(options.device):
        model = CrossDiT(spec, dtype=torch.bfloat16).eval()
        t, h, w = LITE_10S
        latent = torch.randn(1, t, 2 * h, 2 * w, spec.visual_embed_dim, dtype=torch.bfloat16)
        text = torch.randn(1, 256, spec.in_text_dim, dtype=torch.bfloat16)
        given = (latent, text, torch.randn(1, spec.in_text_dim2, dtype=torch.bfloat16), torch.tensor([500.0]))
    settings = nabla.NablaSettings(mode="on", mass=0.9, window_thw=(11, 3, 3), kernel=options.kernels[0])
    run = nabla.Nabla(settings, row)
    run.begin((1.0, 0.0))
    forward = run.forward(LITE_10S, spec.num_visual_blocks, 1.0, latent.device)
    runs = {"dense": lambda: model(*given, rope_scale=row.rope_scale)}
    for kept in KEPT:
        layout = random_layout(forward.tiles, spec.heads, kept)

        def attend(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout = layout, selects: bool = True) -> Tensor:
            if selects:
                nabla.select(q, k, forward.tiles, forward.mass, forward.window_KK, find=run.kernels.threshold)
            return run.kernels.attend(q, k, v, layout)

        sparse = {"rope_scale": row.rope_scale, "order_N": forward.tiles.order_N}
        runs[f"kept_{kept:g}"] = lambda a=attend, o=sparse: model(*given, attend=a, **o)
        runs[f"kept_{kept:g}_without_selection"] = lambda a=attend, o=sparse: model(
            *given, attend=lambda q, k, v: a(q, k, v, selects=False), **o
        )
    seconds = device_seconds(runs, options.device, options.repeats)
    record = {"what": "step", "variant": row.name, "visual_blocks": spec.num_visual_blocks}
    record |= {"tokens": math.prod(LITE_10S)}
    record |= {f"{name}_s": float(f"{value:.4g}") for name, value in seconds.items()}
    for kept in KEPT:
        name = f"kept_{kept:g}"
        record[f"{name}_speed_vs_dense"] = round(seconds["dense"] / seconds[name], 3)
        record[f"{name}_selection_share"] = round(1 - seconds[f"{name}_without_selection"] / seconds[name], 4)
    emit(record | {"kernels": dict(run.kernels.used), "left": run.kernels.left}, options.out)


def main() -> None:
    """Run one kind of measurement and write a JSON line a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("attention", "selection", "step"))
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--kernels", nargs="+", default=["torch", "flex"], choices=KERNELS)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--min-tokens", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=93_696)
    parser.add_argument("--blocks", type=int, help="visual blocks of the model in 'step' (default: all)")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    emit({"machine": machine(options.device)}, options.out)
    {"attention": attention, "selection": selection, "step": step}[options.what](options)


if __name__ == "__main__":
    main()
