"""Weights that travel block by block: memory, equality and overhead, with full-size random weights.

    python benchmarks/streaming.py lite --out benchmarks/results/streaming_cpu.jsonl
    python benchmarks/streaming.py text --out benchmarks/results/streaming_cpu.jsonl
    python benchmarks/streaming.py overhead --out benchmarks/results/streaming_cpu.jsonl
    (--device … for an accelerator)

lite: Video Lite 2B (32 visual and 2 text blocks, bf16 with float32 modulation as published) runs one forward of
512 x 768 x 17 frames with all blocks streamed, in a fresh process; a second fresh process does the same with all
weights in memory, and the results are compared bit by bit.
text: the text tower of Qwen2.5-VL 7B encodes one prompt of random token ids, streamed layer by layer, its embeddings
looked up on the host.
overhead: processor seconds (or device seconds) and peak bytes of a few Lite blocks resident, streamed, and in
diffusers' transformer with and without its group offload at block level (which needs accelerate), in one process.

Memory on a processor is the most anonymous RAM (RssAnon, Linux) above what the imports left: pages mapped from the
file are not in it, since the system can drop them at any time. The files (4.6 and 14.2 GB) are written tensor by
tensor into a temporary folder and deleted afterwards. A processor without bf16 instructions multiplies bf16 matrices
about eight times slower than float32 ones; `--wide` (lite, text) then lets every Linear, resident or streamed,
multiply the bf16 values in float32 and round once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from crossdit import ROPE_SCALE, Forward, diffusers_forward, diffusers_model, inputs
from crossdit import model as random_model
from loading import peak_anonymous_bytes
from measure import device_seconds, emit, machine, peak_bytes
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kandinsky_core.io import load_crossdit, open_checkpoint, save_checkpoint, spec_metadata  # noqa: E402
from kandinsky_core.memory.cargo import Cargo  # noqa: E402
from kandinsky_core.memory.plan import Plan  # noqa: E402
from kandinsky_core.model import CrossDiT  # noqa: E402
from kandinsky_core.sampling.streaming import stream_transformer  # noqa: E402
from kandinsky_core.text.qwen import load_text_tower  # noqa: E402
from kandinsky_core.text.streaming import stream_qwen  # noqa: E402
from kandinsky_core.variants import VARIANTS, CrossDiTSpec  # noqa: E402

ROW = VARIANTS["lite_t2v_5s_sft"]
LATENT = (5, 64, 96)  # frames, rows, columns: of 512 x 768 x 17 frames
TEXT_TOK = 256
PROMPT_TOK = 200  # the video template's 129 and a prompt of 71
LITE_LIMIT, TEXT_LIMIT = 1_500_000_000, 3_000_000_000
ALL_STREAMED = Plan(budget_bytes=0, resident_blocks=0)
SPARE_BYTES = 2_000_000_000  # disk that has to be left
PIECE_TOK = 1024
Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
QWEN_7B = {"vocab": 152_064, "width": 3584, "inner": 18_944, "keys": 512, "layers": 28}


class WideLinear(nn.Linear):
    """A linear layer that multiplies 16-bit values in float32, a piece of the tokens at a time, and rounds once."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the product in the dtype of `x`."""
        weight = self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        rows = x.reshape(-1, x.shape[-1])
        out = x.new_empty(len(rows), len(weight))
        for given, result in zip(rows.split(PIECE_TOK), out.split(PIECE_TOK), strict=True):
            result.copy_(F.linear(given.float(), weight, bias))
        return out.view(*x.shape[:-1], -1)


WIDE = SimpleNamespace(Linear=WideLinear, LayerNorm=nn.LayerNorm, RMSNorm=nn.RMSNorm)


def write_file(path: Path, shapes: Shapes, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file of random unit-gain tensors, never holding more than one of them."""
    names = {torch.bfloat16: "BF16", torch.float32: "F32"}
    header, end = {"__metadata__": dict(metadata)}, 0
    for name, (shape, dtype) in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    if shutil.disk_usage(path.parent).free < end + SPARE_BYTES:
        raise SystemExit(f"{path.parent} has no room for {end / 1e9:.1f} GB. Choose another --folder.")
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (shape, dtype) in shapes.items():
            std = 0.02 if len(shape) < 2 or "modulation" in name else shape[-1] ** -0.5
            values = torch.randn(shape, generator=generator).mul_(std)
            if len(shape) == 1 and name.endswith("norm.weight"):
                values += 1
            file.write(values.to(dtype).view(-1).view(torch.uint8).numpy().data)


def lite_shapes() -> Shapes:
    """Return Video Lite's tensors: bf16, modulation float32, as published."""
    tensors = CrossDiT(ROW.spec, device="meta").state_dict()
    return {
        name: (tuple(tensor.shape), torch.float32 if "modulation" in name else torch.bfloat16)
        for name, tensor in tensors.items()
    }


def qwen_shapes() -> Shapes:
    """Return the tensors of Qwen2.5-VL 7B's text tower under the names of ComfyUI's single file."""
    width, inner, keys = QWEN_7B["width"], QWEN_7B["inner"], QWEN_7B["keys"]
    layer = {f"{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    for name, rows in (("q", width), ("k", keys), ("v", keys)):
        layer |= {f"self_attn.{name}_proj.weight": (rows, width), f"self_attn.{name}_proj.bias": (rows,)}
    layer |= {"self_attn.o_proj.weight": (width, width), "mlp.down_proj.weight": (width, inner)}
    layer |= {f"mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
    shapes = {"model.embed_tokens.weight": (QWEN_7B["vocab"], width)}
    for index in range(QWEN_7B["layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes |= {"model.norm.weight": (width,)}
    return {name: (shape, torch.bfloat16) for name, shape in shapes.items()}


def lite_inputs(options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return random arguments of a forward, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    spec = ROW.spec
    latent = torch.randn(1, *options.latent, spec.visual_embed_dim, generator=generator).bfloat16()
    text = torch.randn(1, TEXT_TOK, spec.in_text_dim, generator=generator).bfloat16()
    pooled = torch.randn(1, spec.in_text_dim2, generator=generator).bfloat16()
    return (*(x.to(options.device) for x in (latent, text, pooled)), torch.tensor([500.0], device=options.device))


def lite_run(path: Path, options: argparse.Namespace) -> dict[str, object]:
    """Run one forward in this process, streamed or resident."""
    ops = WIDE if options.wide else nn
    with peak_memory(options.device) as peak, torch.no_grad():
        model = load_crossdit(path, ops=ops, check_finite=False).model.eval()
        given = lite_inputs(options)
        record: dict[str, object] = {}
        if options.way == "streamed":
            stream = stream_transformer(model, ALL_STREAMED, options.device, pinned_bytes=options.pinned_bytes)
            record |= {"ring_bytes": stream.ring_bytes, "pass_bytes": stream.pass_bytes}
        else:
            cargo = Cargo(model.modules(), in_line=options.device.type == "cpu")
            whole = torch.empty(cargo.nbytes, dtype=torch.uint8, device=options.device)
            cargo.write(whole)
            cargo.bind(whole)
        out = timed(lambda: model(*given, rope_scale=ROW.rope_scale), record)
        if options.way == "streamed":
            record["moved_bytes"] = stream.moved_bytes
    return record | {"peak_bytes": peak[0], **fingerprint(out)}


def text_run(path: Path, options: argparse.Namespace) -> dict[str, object]:
    """Encode random token ids in this process, streamed."""
    with peak_memory(options.device) as peak, torch.no_grad():
        tower = load_text_tower(open_checkpoint(path), None)
        if options.wide:
            for module in tower.modules():
                if type(module) is nn.Linear:
                    module.__class__ = WideLinear
        stream = stream_qwen(tower, options.device, pinned_bytes=options.pinned_bytes)
        ids_L = torch.randint(QWEN_7B["vocab"], (PROMPT_TOK,), generator=torch.Generator().manual_seed(1))
        embeds_LD = tower.embed_tokens(ids_L).to(options.device)
        record: dict[str, object] = {}
        out = timed(lambda: tower(inputs_embeds=embeds_LD[None], use_cache=False).last_hidden_state, record)
        record |= {"ring_bytes": stream.ring_bytes, "pass_bytes": stream.pass_bytes, "moved_bytes": stream.moved_bytes}
    return record | {"peak_bytes": peak[0], **fingerprint(out)}


def timed(run: Callable[[], Tensor], record: dict[str, object]) -> Tensor:
    """Return the result of a run and record its processor and wall seconds."""
    start_cpu_s, start_s = time.process_time(), time.perf_counter()
    out = run()
    record |= {"cpu_s": round(time.process_time() - start_cpu_s, 1), "wall_s": round(time.perf_counter() - start_s, 1)}
    return out


def fingerprint(out: Tensor) -> dict[str, object]:
    """Return what tells a result from any other, and that it is not empty."""
    raw = out.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return {"sha256": hashlib.sha256(raw).hexdigest(), "std": round(out.float().std().item(), 6)}


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Give, after the block, the most memory it needed: anonymous RAM on a processor, else the device's."""
    peak: list[int] = []
    if device.type == "cpu":
        with peak_anonymous_bytes(0.05) as seen:
            yield peak
        peak.append(max(seen) - seen[0])
        return
    memory = torch.get_device_module(device)
    memory.reset_peak_memory_stats(device)
    yield peak
    memory.synchronize(device)
    peak.append(memory.max_memory_allocated(device))


RUNS: dict[str, Callable[[Path, argparse.Namespace], dict[str, object]]] = {"lite": lite_run, "text": text_run}


def in_fresh_process(way: str, path: Path, options: argparse.Namespace) -> dict[str, object]:
    """Return a run's record from a new interpreter."""
    command = [sys.executable, __file__, options.what, "--way", way, "--file", str(path)]
    command += ["--device", str(options.device), "--pinned-bytes", str(options.pinned_bytes)]
    command += ["--latent", *map(str, options.latent)]
    command += ["--wide"] if options.wide else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def full_size(options: argparse.Namespace) -> None:
    """Write the file, run it in fresh processes, delete it."""
    is_lite = options.what == "lite"
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = options.file or Path(folder) / "random.safetensors"
        if not path.exists():
            write_file(path, lite_shapes() if is_lite else qwen_shapes(), spec_metadata(ROW) if is_lite else {})
        common = {"what": options.what, "file_bytes": path.stat().st_size}
        common["linear"] = "float32" if options.wide else "bf16"
        common |= {"tokens": math.prod(options.latent) // 4} if is_lite else {"tokens": PROMPT_TOK}
        streamed = in_fresh_process("streamed", path, options)
        limit = LITE_LIMIT if is_lite else TEXT_LIMIT
        emit(common | {"way": "streamed"} | streamed | {"within_limit": streamed["peak_bytes"] <= limit}, options.out)
        if is_lite:
            resident = in_fresh_process("resident", path, options)
            equal = {"bit_equal": resident["sha256"] == streamed["sha256"]}
            emit(common | {"way": "resident"} | resident | equal, options.out)


@torch.no_grad()
def overhead(options: argparse.Namespace) -> None:
    """A few Lite blocks: resident and streamed, and diffusers' own without and with group offload."""
    from diffusers.hooks import apply_group_offloading

    spec, device = replace(ROW.spec, num_visual_blocks=options.blocks), options.device
    for dtype in (getattr(torch, name) for name in options.dtypes):
        for grid in ((1, 16, 16), (3, 32, 32)):
            given = tuple(x.to(device) for x in inputs(spec, grid, TEXT_TOK, dtype))
            ours = {"resident": random_model(spec, dtype).to(device), "streamed": mapped(spec, dtype, options.folder)}
            stream = stream_transformer(ours["streamed"], ALL_STREAMED, device, pinned_bytes=options.pinned_bytes)
            theirs = {way: diffusers_model(random_model(spec, dtype)) for way in ("diffusers", "diffusers_offload")}
            theirs["diffusers"].to(device)
            apply_group_offloading(
                theirs["diffusers_offload"], onload_device=device, offload_type="block_level", num_blocks_per_group=1,
                use_stream=device.type != "cpu",
            )  # fmt: skip
            forwards = {way: partial(model, *given, rope_scale=ROPE_SCALE) for way, model in ours.items()}
            forwards |= {way: diffusers_forward(peer, given, grid) for way, peer in theirs.items()}
            weights = sum(parameter.nbytes for parameter in ours["resident"].parameters())
            held = dict.fromkeys(forwards, weights) | {"streamed": stream.ring_bytes + weights - stream.pass_bytes}
            if device.type != "cpu":
                held["diffusers_offload"] = 0  # all it brings to the device is allocated during the run
            record = compare(forwards, held, options) | {"pass_bytes": stream.pass_bytes}
            emit(record | {"dtype": str(dtype), "tokens": math.prod(grid)}, options.out)
            stream.close()


def mapped(spec: CrossDiTSpec, dtype: torch.dtype, folder: Path | None) -> CrossDiT:
    """Return the random model from a file: its weights are in no other memory."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place) / "random.safetensors"
        save_checkpoint(path, random_model(spec, dtype).state_dict(), spec_metadata(replace(ROW, spec=spec)))
        return load_crossdit(path, check_finite=False).model.eval()


def compare(
    forwards: dict[str, Forward], held: Mapping[str, int], options: argparse.Namespace
) -> dict[str, object]:
    """Return seconds and bytes of every way, the ratios the targets speak of, and whether streaming is exact.

    Bytes are the weights a way holds on the device between runs (`held`) and the peak of a run beyond them. On a
    processor diffusers' offload holds all weights, since they have nowhere else to go; ours are mapped from the file.
    """
    outputs = {way: forward() for way, forward in forwards.items()}
    seconds = device_seconds(forwards, options.device, options.repeats)
    peak = {way: peak_bytes(forward, options.device) for way, forward in forwards.items()}
    record: dict[str, object] = {"what": "overhead", "visual_blocks": options.blocks}
    for way in forwards:
        record |= {f"{way}_s": float(f"{seconds[way]:.4g}"), f"{way}_bytes": held[way] + peak[way]}
    record["streamed_vs_resident_time"] = round(seconds["streamed"] / seconds["resident"], 3)
    record["streamed_vs_diffusers_offload_time"] = round(seconds["streamed"] / seconds["diffusers_offload"], 3)
    for other in ("resident", "diffusers_offload"):
        record[f"streamed_vs_{other}_bytes"] = round(record["streamed_bytes"] / record[f"{other}_bytes"], 3)
    record["bit_equal"] = torch.equal(outputs["streamed"], outputs["resident"])
    return record


def main() -> None:
    """Run one kind of measurement and write a JSON line a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("lite", "text", "overhead"))
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--pinned-bytes", type=int, default=0, help="limit of page-locked copies on the host")
    parser.add_argument("--wide", action="store_true", help="multiply 16-bit matrices in float32")
    parser.add_argument("--latent", nargs=3, type=int, default=LATENT, help="frames, rows and columns in 'lite'")
    parser.add_argument("--blocks", type=int, default=4, help="visual blocks in 'overhead'")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--file", type=Path, help="the random file, written if it does not exist, and kept")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.way:
        sys.stdout.write(json.dumps(RUNS[options.what](options.file, options)))
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    emit({"machine": machine(options.device)}, options.out)
    overhead(options) if options.what == "overhead" else full_size(options)


if __name__ == "__main__":
    main()
