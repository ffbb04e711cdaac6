"""GGUF transformers: read as packed layers, whoever wrote them, and refused with a reason when they are broken."""

from __future__ import annotations

import sys
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import BackendUnavailable, CheckpointError
from comfyui_kandinsky5.kandinsky_core.io import identify, load_crossdit, open_checkpoint, spec_metadata
from comfyui_kandinsky5.kandinsky_core.packed.layers import PackedLinear, unpack
from comfyui_kandinsky5.kandinsky_core.variants import NANO_VIDEO, VARIANTS

SPEC = replace(
    NANO_VIDEO, model_dim=64, ff_dim=256, time_dim=32, num_visual_blocks=1, in_text_dim=24, in_text_dim2=16
)
ROW = replace(VARIANTS["nano_video"], spec=SPEC)
LAYER = "visual_transformer_blocks.0.feed_forward.in_layer"


def write(path, tensors, kind="Q8_0", *, architecture="wan", metadata=None, aside=()):
    """As the gguf package writes it: quantised where its blocks fit, F32 for vectors; `aside` stays F16."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (spec_metadata(ROW) if metadata is None else metadata).items():
        writer.add_string(key, value)
    for name, tensor in tensors.items():
        wanted = gguf.GGMLQuantizationType[kind]
        if tensor.ndim == 1:
            wanted = gguf.GGMLQuantizationType.F32
        elif tensor.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] or name in aside:
            wanted = gguf.GGMLQuantizationType.F16
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tensors(weights):
    return {name: 0.1 * tensor for name, tensor in weights(SPEC).items()}


@pytest.fixture
def path(tmp_path, tensors):
    return write(tmp_path / "model.gguf", tensors)


def forward(model, dtype=torch.float32):
    torch.manual_seed(0)
    inputs = (torch.randn(1, 2, 4, 4, 33), torch.randn(1, 3, 24), torch.randn(1, 16))
    return model(*(x.to(dtype) for x in inputs), torch.tensor([500.0])).float()


def test_a_file_of_the_package_is_recognised_and_held_packed(path, tensors):
    model, variant, identity = load_crossdit(path, dtype=torch.float32)
    assert variant == ROW and identity.certain
    layer = model.get_submodule(LAYER)
    assert type(layer) is PackedLinear and layer.weight.dtype == torch.uint8
    data = gguf.GGUFReader(path)
    stored = next(tensor for tensor in data.tensors if tensor.name == f"{LAYER}.weight")
    expected = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))
    assert torch.equal(unpack(layer.weight, None, layer.packing, torch.float32), expected)
    assert torch.equal(model.out_layer.out_layer.bias, tensors["out_layer.out_layer.bias"])
    assert open_checkpoint(path).shape(f"{LAYER}.weight") == (256, 64)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "BF16", "F16", "F32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_computes_as_with_the_unpacked_weights(tmp_path, tensors, kind, dtype):
    path = write(tmp_path / "model.gguf", tensors, kind)
    model = load_crossdit(path, dtype=dtype).model
    plain = {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in gguf.GGUFReader(path).tensors
    }
    expected = load_crossdit(path, dtype=dtype).model.__class__(SPEC)
    expected.load_state_dict({name: value.view(tensors[name].shape) for name, value in plain.items()})
    out, reference = forward(model, dtype), forward(expected.to(dtype), dtype)
    torch.testing.assert_close(out, reference, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0)


def test_without_a_dtype_what_is_not_packed_becomes_bfloat16(path):
    state = load_crossdit(path).model.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.uint8, torch.bfloat16}


def test_weights_are_mapped_not_copied_and_the_file_stays(path):
    before = path.read_bytes()
    model = load_crossdit(path).model
    packed = [layer.weight for layer in model.modules() if isinstance(layer, PackedLinear)]
    offsets = [info.offset for info in open_checkpoint(path).tensors.values() if info.dtype == "Q8_0"]
    assert len(packed) > 20
    assert {weight.data_ptr() for weight in packed} == {
        min(weight.data_ptr() for weight in packed) + offset - min(offsets) for offset in offsets
    }
    packed[0].data.zero_()
    assert path.read_bytes() == before


def test_a_published_file_is_identified_by_its_tensors_and_name(tmp_path, shapes):
    row = VARIANTS["lite_t2v_5s_sft"]
    file = tmp_path / row.files[0].replace(".safetensors", ".gguf")
    writer = gguf.GGUFWriter(file, "kandinsky5-dit")
    for name, tensor in shapes(row.spec).items():
        kind = gguf.GGMLQuantizationType.F32 if tensor.ndim == 1 else gguf.GGMLQuantizationType.Q8_0
        kind = gguf.GGMLQuantizationType.F16 if tensor.shape[-1] == 132 else kind  # no whole blocks
        size, nbytes = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(name, tuple(tensor.shape), None, tensor.numel() // size * nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = file.stat().st_size
    with file.open("r+b") as stream:  # a hole on disk where the data would be
        stream.truncate(header + 2_000_000_000 * 4)
    identity = identify(open_checkpoint(file))
    assert identity.spec == row.spec and identity.variant == row


def test_several_converters_names_are_found_under_their_prefix(tmp_path, tensors):
    named = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    path = write(tmp_path / "model.gguf", named)
    assert load_crossdit(path).identity.certain


def test_one_report_for_everything_that_does_not_fit(tmp_path, tensors):
    del tensors["out_layer.out_layer.bias"]
    tensors["visual_transformer_blocks.0.cross_attention.to_key.weight"] = torch.zeros(64, 96)
    path = write(tmp_path / "model.gguf", tensors)
    with pytest.raises(CheckpointError, match=r"1 missing: out_layer.out_layer.bias\n.*to_key.weight \[64, 96\]"):
        load_crossdit(path)


def test_a_format_we_do_not_know_is_named(tmp_path, tensors):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "wan")
    for key, value in spec_metadata(ROW).items():
        writer.add_string(key, value)
    for name, tensor in tensors.items():
        if name == f"{LAYER}.weight":
            kind = gguf.GGMLQuantizationType.IQ4_NL
            writer.add_tensor(name, np.zeros((256, 36), dtype=np.uint8), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="quantised as IQ4_NL.*Q8_0"):
        load_crossdit(path)


def test_broken_numbers_in_blocks_are_found(path):
    info = open_checkpoint(path).tensors[f"{LAYER}.weight"]
    raw = bytearray(path.read_bytes())
    raw[info.offset + 34 * 100 : info.offset + 34 * 100 + 2] = np.float16("nan").tobytes()
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=f"{LAYER}.weight contains NaN or Inf"):
        load_crossdit(path)


@pytest.mark.parametrize("keep", [5, 100, 3000, -1000])
def test_a_file_cut_off_anywhere_is_refused(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="damaged or incomplete GGUF file"):
        open_checkpoint(path)


def test_without_the_package_the_message_says_how_to_get_it(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BackendUnavailable, match=r"model\.gguf is a GGUF file.*pip install gguf"):
        open_checkpoint(path)
