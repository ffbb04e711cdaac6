"""The converter: what it packs, what it leaves, what it says, and that what it writes loads as what it was."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import gguf
import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import CheckpointError, VariantError
from comfyui_kandinsky5.kandinsky_core.io import (
    identify,
    load_crossdit,
    open_checkpoint,
    save_checkpoint,
    spec_metadata,
)
from comfyui_kandinsky5.kandinsky_core.io.convert import TARGETS, convert, metadata_of
from comfyui_kandinsky5.kandinsky_core.variants import NANO_VIDEO, VARIANTS
from safetensors import safe_open

SPEC = replace(
    NANO_VIDEO, model_dim=64, ff_dim=256, time_dim=32, num_visual_blocks=1, in_text_dim=24, in_text_dim2=16
)
ROW = replace(VARIANTS["nano_video"], spec=SPEC)
MATRIX = "visual_transformer_blocks.0.feed_forward.in_layer.weight"
MODULATION = "visual_transformer_blocks.0.visual_modulation.out_layer.weight"
# Root of the mean squared error of one packed weight, as a part of the weight's own.
ERRORS = {"fp8": 0.03, "gguf-Q8_0": 0.01, "gguf-Q5_0": 0.05, "gguf-Q4_0": 0.1, "bf16": 0.003, "fp16": 4e-4,
          "gguf-F16": 4e-4}  # fmt: skip


@pytest.fixture
def source(tmp_path, weights):
    """Matrices in bf16, modulation, time and vectors in float32, as published."""
    tensors = {
        name: tensor if tensor.ndim == 1 or "modulation" in name or "time_" in name else tensor.bfloat16()
        for name, tensor in weights(SPEC).items()
    }
    path = tmp_path / "source.safetensors"
    save_checkpoint(path, tensors, spec_metadata(ROW))
    return path


def target(tmp_path, to):
    return tmp_path / f"out.{'gguf' if to.startswith('gguf') else 'safetensors'}"


def numbers(path):
    model = load_crossdit(path, dtype=torch.float32).model
    layer = model.get_submodule(MATRIX.removesuffix(".weight"))
    x = torch.eye(layer.in_features)
    return layer(x).T


@pytest.mark.parametrize("to", TARGETS)
def test_what_is_written_loads_as_what_it_was(tmp_path, source, to):
    out = target(tmp_path, to)
    result = convert(source, out, to)
    loaded = load_crossdit(out)
    assert loaded.variant == ROW and loaded.identity.certain and result.identity.variant == ROW
    exact = numbers(source)
    error = ((numbers(out) - exact).norm() / exact.norm()).item()
    assert error <= ERRORS[to] and (error > 1e-4 or to in ("bf16", "gguf-F16", "fp16"))
    assert result.bytes_after == out.stat().st_size
    checkpoint = open_checkpoint(out)
    assert checkpoint.dtype(MODULATION) == torch.float32  # where the source has it so


@pytest.mark.parametrize("to", [name for name in TARGETS if name.startswith("gguf-Q")])
def test_the_package_reads_our_files_and_finds_its_own_bytes(tmp_path, source, to):
    out = target(tmp_path, to)
    convert(source, out, to)
    kind = gguf.GGMLQuantizationType[to.removeprefix("gguf-")]
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    weight = open_checkpoint(source).tensor(MATRIX).float().numpy()
    assert found[MATRIX].tensor_type == kind and tuple(found[MATRIX].shape) == (64, 256)
    assert (found[MATRIX].data == gguf.quants.quantize(weight, kind)).all()
    packed = {name for name, tensor in found.items() if tensor.tensor_type == kind}
    assert all(re.search(r"attention\.(to_|out_)|feed_forward", name) for name in packed)
    assert len(packed) == 2 * 6 + 4


def test_fp8_has_comfyuis_newer_layout_and_the_files_bytes_lie_aligned(tmp_path, source):
    out = target(tmp_path, "fp8")
    result = convert(source, out, "fp8")
    layer = MATRIX.removesuffix("weight")
    with safe_open(out, framework="pt") as file:  # the format's own reader takes it
        assert file.get_tensor(MATRIX).dtype == torch.float8_e4m3fn
        assert file.get_tensor(layer + "weight_scale").shape == ()
        assert bytes(file.get_tensor(layer + "comfy_quant").tolist()) == b'{"format": "float8_e4m3fn"}'
    assert result.counts["F8_E4M3"] == 16 and not result.unpacked
    position = 0
    for info in open_checkpoint(out).tensors.values():
        size = {"U8": 1, "F8_E4M3": 1, "BF16": 2, "F32": 4}[info.dtype]
        assert position % size == 0
        position += info.nbytes


def test_rows_that_are_no_whole_blocks_stay_f16_and_are_reported(tmp_path, weights):
    odd = replace(SPEC, model_dim=80, ff_dim=96, axes_dims=(4, 8, 8))
    source, out = tmp_path / "odd.safetensors", tmp_path / "odd.gguf"
    save_checkpoint(source, weights(odd), spec_metadata(replace(ROW, spec=odd)))
    result = convert(source, out, "gguf-Q8_0")
    kinds = Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors)
    assert kinds["Q8_0"] == 2 and len(result.unpacked) == 14
    assert "Kept as F16, since their rows are no whole blocks: " in result.report()
    assert load_crossdit(out).variant.spec == odd


def test_a_packed_file_converts_back(tmp_path, source):
    packed, back = tmp_path / "packed.gguf", tmp_path / "back.safetensors"
    convert(source, packed, "gguf-Q8_0")
    convert(packed, back, "bf16")
    assert torch.equal(numbers(back), numbers(packed).bfloat16().float())


def test_a_guess_is_not_written_down_as_certain(tmp_path, shapes, write_header):
    """Several published models have the same tensors: only their own file name or the user tells which it is."""
    row = VARIANTS["lite_t2v_10s_sft"]
    for name, variant, named in ((row.files[0], None, True), ("mine.safetensors", None, False),
                                 ("mine.safetensors", row.name, True)):  # fmt: skip
        checkpoint = open_checkpoint(write_header(tmp_path / name, shapes(row.spec)))
        metadata = metadata_of(checkpoint, identify(checkpoint, variant))
        assert (metadata.get("kandinsky5.variant") == row.name) is named


@pytest.mark.parametrize(
    ("to", "name", "said"),
    [
        ("int8", "out.safetensors", "cannot be converted to 'int8'. Possible: fp8"),
        ("fp8", "out.gguf", "fp8 makes a .safetensors file"),
        ("gguf-Q8_0", "out.safetensors", "makes a .gguf file"),
        ("fp8", "source.safetensors", "exists already"),
    ],
)
def test_targets_that_cannot_be_are_refused(tmp_path, source, to, name, said):
    before = source.read_bytes()
    with pytest.raises(CheckpointError, match=re.escape(said)):
        convert(source, tmp_path / name, to)
    assert source.read_bytes() == before


def test_other_models_and_other_variants_are_refused(tmp_path, source):
    foreign = tmp_path / "vae.safetensors"
    save_checkpoint(foreign, {"decoder.conv_in.weight": torch.ones(4, 4), "decoder.mid.x": torch.ones(4)})
    with pytest.raises(CheckpointError, match="not a Kandinsky 5 transformer"):
        convert(foreign, tmp_path / "out.gguf", "gguf-Q8_0")
    with pytest.raises(VariantError, match="another model"):
        convert(source, tmp_path / "out.gguf", "gguf-Q8_0", variant="lite_t2i")


@pytest.mark.parametrize("to", ["fp8", "gguf-Q8_0"])
def test_a_cancelled_or_full_disk_leaves_nothing(tmp_path, source, to, file_size_limit):
    out = target(tmp_path, to)

    def cancel(done, total):
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, to, on_tensor=cancel)
    with file_size_limit(20_000), pytest.raises(CheckpointError, match="cannot be written"):
        convert(source, out, to)
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]


@pytest.mark.skipif(sys.platform != "linux", reason="counts private memory the Linux way")
@pytest.mark.parametrize("to", ["fp8", "gguf-Q8_0"])
def test_one_tensor_is_in_memory_at_a_time(tmp_path, to):
    """172 MB of weights whose largest matrix is 17 MB in float32: a process of its own grows by a few of them."""
    program = f"""
import re, torch
from dataclasses import replace
from pathlib import Path
from comfyui_kandinsky5.kandinsky_core.io import save_checkpoint, spec_metadata
from comfyui_kandinsky5.kandinsky_core.io.convert import convert
from comfyui_kandinsky5.kandinsky_core.model import CrossDiT
from comfyui_kandinsky5.kandinsky_core.variants import NANO_VIDEO, VARIANTS
spec = replace(NANO_VIDEO, model_dim=1024, ff_dim=4096, num_visual_blocks=4)
folder = Path({str(tmp_path)!r})
names = CrossDiT(spec, device="meta").state_dict()
save_checkpoint(folder / "big.safetensors", {{name: torch.ones(t.shape, dtype=torch.bfloat16)
    for name, t in names.items()}}, spec_metadata(replace(VARIANTS["nano_video"], spec=spec)))
def private():
    return 1024 * int(re.search(r"Anonymous: *(\\d+)", open("/proc/self/smaps_rollup").read())[1])
import gguf
torch.ones(1).bfloat16()
before, most = private(), 0
def watch(*_):
    global most
    most = max(most, private() - before)
convert(folder / "big.safetensors", folder / {target(tmp_path, to).name!r}, {to!r}, on_tensor=watch)
print(most, (folder / "big.safetensors").stat().st_size)
"""
    # The C library gives freed memory back at once, not when it sees fit.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    grown, size = map(int, done.stdout.split())
    assert size > 140_000_000 and grown < 0.3 * size, (grown, size)
