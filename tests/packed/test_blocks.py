"""Block formats against the `gguf` package: the same numbers from the same bytes, and the same bytes back."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.packed.blocks import BLOCKS
from comfyui_kandinsky5.kandinsky_core.packed.nf4 import LEVELS, NF4, pack_nf4
from comfyui_kandinsky5.kandinsky_core.packed.quantise import PACKERS, fp8_scale, to_fp8

# Bytes of each format that are float16 scales: random ones would often be NaN.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def random_blocks(name: str, count: int = 40) -> np.ndarray:
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (count, BLOCKS[name].nbytes), dtype=np.uint8)
    for start in HALVES[name]:
        blocks[:, start : start + 2] = generator.normal(size=(count, 1)).astype(np.float16).view(np.uint8)
    return blocks


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_unpack_to_the_same_bits(name):
    kind = gguf.GGMLQuantizationType[name]
    assert gguf.GGML_QUANT_SIZES[kind] == (BLOCKS[name].elements, BLOCKS[name].nbytes)
    blocks = random_blocks(name)
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, kind)).view(len(blocks), -1)
    assert torch.equal(BLOCKS[name].unpack(torch.from_numpy(blocks)), expected)


@pytest.mark.parametrize("name", PACKERS)
def test_numbers_pack_to_the_same_bytes(name):
    torch.manual_seed(0)
    values = torch.randn(200, 32) * torch.logspace(-3, 2, 200).unsqueeze(1)
    values[7] = 0
    expected = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[name])
    assert torch.equal(PACKERS[name](values), torch.from_numpy(expected))


def test_nf4_takes_the_nearest_level():
    torch.manual_seed(0)
    values = torch.randn(50, 64)
    values[3] = 0
    blocks = pack_nf4(values)
    assert blocks.shape == (50, NF4.nbytes)
    scale = values.abs().amax(1, keepdim=True).half().float()
    choices = torch.tensor(LEVELS) * scale.unsqueeze(-1)
    nearest = (choices - values.unsqueeze(-1)).abs().amin(-1)
    torch.testing.assert_close((NF4.unpack(blocks) - values).abs(), nearest, atol=1e-6, rtol=0)


def test_fp8_uses_its_whole_range_and_stays_finite():
    values = torch.tensor([[3.0, -7.0], [0.5, 1e-3]])
    scale = fp8_scale(values)
    packed = to_fp8(values, scale)
    assert packed.float().abs().max() == torch.finfo(torch.float8_e4m3fn).max
    torch.testing.assert_close(packed.float() * scale, values, rtol=1 / 16, atol=1e-4)
    assert to_fp8(torch.zeros(2, 2), fp8_scale(torch.zeros(2, 2))).float().eq(0).all()
