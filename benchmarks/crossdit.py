"""CrossDiT against diffusers' and ComfyUI's Kandinsky 5 transformers: same weights, same process, one thread.

    python benchmarks/crossdit.py --out benchmarks/results/crossdit_cpu.jsonl
    python benchmarks/crossdit.py --comfyui PATH --out ...      (with an interpreter that can run ComfyUI)

The model has the width of Video Lite (1792, 28 heads of 64) with two text and two visual blocks, random weights,
modulation and time layers in float32 as published. Peers that cannot be imported are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from measure import cpu_seconds, emit, machine, peak_live_bytes
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kandinsky_core.model import CrossDiT  # noqa: E402
from kandinsky_core.variants import CrossDiTSpec  # noqa: E402

Forward = Callable[[], Tensor]
Inputs = tuple[
    Tensor, Tensor, Tensor, Tensor
]  # latent, text, pooled, time: the arguments of CrossDiT.forward

ROPE_SCALE = (1.0, 2.0, 2.0)
# (token grid, text tokens, visual blocks); the last two are the settings of the stated targets C1 and C2
CASES = (
    ((1, 1, 1), 8, 2),
    ((1, 4, 4), 64, 2),
    ((1, 16, 16), 256, 2),
    ((1, 32, 32), 256, 2),
    ((3, 32, 32), 256, 2),
    ((9, 32, 32), 256, 1),
)


def spec(visual_blocks: int, width: int) -> CrossDiTSpec:
    """Return Video Lite with fewer blocks, `width` wide."""
    return CrossDiTSpec(
        model_dim=width,
        ff_dim=4 * width,
        time_dim=512,
        num_text_blocks=2,
        num_visual_blocks=visual_blocks,
        axes_dims=(16, 24, 24),
        visual_cond=True,
    )


def model(of: CrossDiTSpec, dtype: torch.dtype) -> CrossDiT:
    """Return a random CrossDiT whose modulation is not zero and, with the time layers, is kept in float32."""
    torch.manual_seed(0)
    made = CrossDiT(of, dtype=dtype).eval()
    for name, parameter in made.named_parameters():
        if "modulation" in name:
            nn.init.normal_(parameter, std=0.02)
        if "modulation" in name or "time_embeddings" in name:
            parameter.data = parameter.data.float()
    return made


def inputs(of: CrossDiTSpec, grid: tuple[int, int, int], text_tok: int, dtype: torch.dtype) -> Inputs:
    """Return random arguments for a token grid."""
    t, h, w = grid
    latent = torch.randn(1, t, 2 * h, 2 * w, of.visual_embed_dim).to(dtype)
    text = torch.randn(1, text_tok, of.in_text_dim).to(dtype)
    return latent, text, torch.randn(1, of.in_text_dim2).to(dtype), torch.tensor([500.0])


def diffusers_model(ours: CrossDiT) -> nn.Module:
    """Return diffusers' model on our weights."""
    from diffusers import Kandinsky5Transformer3DModel

    of = ours.spec
    peer = Kandinsky5Transformer3DModel(
        in_visual_dim=of.in_visual_dim,
        out_visual_dim=of.out_visual_dim,
        in_text_dim=of.in_text_dim,
        in_text_dim2=of.in_text_dim2,
        time_dim=of.time_dim,
        model_dim=of.model_dim,
        ff_dim=of.ff_dim,
        num_text_blocks=of.num_text_blocks,
        num_visual_blocks=of.num_visual_blocks,
        axes_dims=of.axes_dims,
        visual_cond=of.visual_cond,
    ).eval()
    peer.load_state_dict(ours.state_dict(), assign=True)
    return peer


def diffusers_forward(peer: nn.Module, args: Inputs, grid: tuple[int, int, int]) -> Forward:
    """Return the forward of diffusers' model."""
    latent, text, pooled, time = args
    places = [torch.arange(length, device=latent.device) for length in grid]
    text_places = torch.arange(text.shape[1], device=latent.device)
    return lambda: peer(latent, text, time, pooled, places, text_places, scale_factor=ROPE_SCALE).sample


def comfyui_forward(ours: CrossDiT, args: Inputs, dtype: torch.dtype) -> Forward:
    """Return the forward of ComfyUI's own model on our weights (all of them in `dtype`), with torch's attention."""
    import comfy.ops
    import comfy.patcher_extension  # noqa: F401  (the model looks it up when called)
    from comfy.ldm.kandinsky5.model import Kandinsky5
    from comfy.ldm.modules import attention

    if attention.optimized_attention is not attention.attention_pytorch:
        raise RuntimeError(
            "ComfyUI did not choose torch's attention; the comparison would not be like for like."
        )
    of = ours.spec
    peer = Kandinsky5(
        in_text_dim=of.in_text_dim,
        in_text_dim2=of.in_text_dim2,
        time_dim=of.time_dim,
        model_dim=of.model_dim,
        ff_dim=of.ff_dim,
        visual_embed_dim=4 * of.visual_embed_dim,
        num_text_blocks=of.num_text_blocks,
        num_visual_blocks=of.num_visual_blocks,
        axes_dims=of.axes_dims,
        rope_scale_factor=ROPE_SCALE,
        dtype=dtype,
        operations=comfy.ops.disable_weight_init,
    ).eval()
    peer.load_state_dict({key: value.to(dtype) for key, value in ours.state_dict().items()})
    latent, text, pooled, time = args
    latent_BCTHW = latent.movedim(-1, 1).contiguous()
    return lambda: peer(latent_BCTHW, time, text, pooled).movedim(1, -1)


def import_comfyui(folder: Path) -> None:
    """Make ComfyUI importable for the processor, with torch's attention."""
    sys.path.insert(0, str(folder))
    sys.argv = ["benchmark", "--cpu", "--use-pytorch-cross-attention"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management  # noqa: F401  (reads the options)


def main() -> None:
    """Run every case in both dtypes and write one JSON line each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    parser.add_argument("--comfyui", type=Path, help="ComfyUI checkout to compare with")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--width", type=int, default=1792)
    parser.add_argument("--min-tokens", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=9216)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    if options.comfyui is not None:
        import_comfyui(options.comfyui.expanduser())
    emit({"machine": machine()}, options.out)
    for dtype in (getattr(torch, name) for name in options.dtypes):
        for grid, text_tok, visual_blocks in CASES:
            tokens = grid[0] * grid[1] * grid[2]
            if options.min_tokens <= tokens <= options.max_tokens:
                ours = model(spec(visual_blocks, options.width), dtype)
                args = inputs(ours.spec, grid, text_tok, dtype)
                runs: dict[str, Forward] = {"ours": lambda m=ours, a=args: m(*a, rope_scale=ROPE_SCALE)}
                if importlib.util.find_spec("diffusers"):
                    runs["diffusers"] = diffusers_forward(diffusers_model(ours), args, grid)
                if options.comfyui is not None:
                    runs["comfyui"] = comfyui_forward(ours, args, dtype)
                record = {
                    "dtype": str(dtype).removeprefix("torch."),
                    "tokens": tokens,
                    "text_tokens": text_tok,
                }
                record |= {"width": options.width, "text_blocks": 2, "visual_blocks": visual_blocks}
                # Small cases are quick and their ratios near one: more turns for them.
                turns = options.repeats * (5 if tokens <= 256 else 1)
                emit(record | compare(runs, turns), options.out)


@torch.no_grad()
def compare(runs: dict[str, Forward], repeats: int) -> dict[str, float]:
    """Return seconds, peak live bytes and, per peer, ratios (ours / peer) and the largest relative difference."""
    seconds = cpu_seconds(runs, repeats)
    outputs = {name: run().float() for name, run in runs.items()}
    live = {name: peak_live_bytes(run) for name, run in runs.items()}
    record: dict[str, float] = {}
    for name in runs:
        record |= {f"{name}_cpu_s": round(seconds[name], 5), f"{name}_peak_live_bytes": live[name]}
        if name != "ours":
            difference = (outputs["ours"] - outputs[name]).abs().max() / outputs[name].abs().max()
            record |= {
                f"time_vs_{name}": round(seconds["ours"] / seconds[name], 3),
                f"bytes_vs_{name}": round(live["ours"] / live[name], 3),
                f"max_relative_difference_to_{name}": float(f"{difference.item():.2e}"),
            }
    return record


if __name__ == "__main__":
    main()
