"""Packed layers: what they compute, in which dtype, what they hold, and that gradients reach the input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comfyui_kandinsky5.kandinsky_core.packed import layers
from comfyui_kandinsky5.kandinsky_core.packed.formats import FORMATS
from comfyui_kandinsky5.kandinsky_core.packed.layers import (
    PackedEmbedding,
    PackedLinear,
    Packing,
    can_hold,
    unpack,
)
from comfyui_kandinsky5.kandinsky_core.packed.nf4 import pack_nf4
from comfyui_kandinsky5.kandinsky_core.packed.quantise import PACKERS, fp8_scale, to_fp8
from torch import nn
from torch.testing import assert_close

ROWS, WIDTH = 96, 64
KINDS = ("Q8_0", "Q4_0", "NF4", "fp8", "fp8 rows", "plain fp8")


def pack(kind: str, rows: int = ROWS) -> tuple[Packing, torch.Tensor, torch.Tensor | None]:
    """A random weight in one kind of storage."""
    torch.manual_seed(0)
    weight = torch.randn(rows, WIDTH)
    if "fp8" in kind:
        scale = {"fp8": fp8_scale(weight), "fp8 rows": weight.abs().amax(1, keepdim=True) / 448}.get(kind)
        packing = Packing("F8_E4M3", (rows, WIDTH), None if scale is None else scale.numel())
        return packing, to_fp8(weight, torch.tensor(1.0) if scale is None else scale), scale
    packer = pack_nf4 if kind == "NF4" else PACKERS[kind]
    return Packing(kind, (rows, WIDTH)), packer(weight.view(-1, FORMATS[kind].elements)), None


def fill(layer: nn.Module, packed: torch.Tensor, scale: torch.Tensor | None) -> None:
    state = {"weight": packed} | ({} if scale is None else {"weight_scale": scale})
    if getattr(layer, "bias", None) is not None:
        state["bias"] = torch.randn(ROWS)
    layer.load_state_dict(state, strict=True, assign=True)


@pytest.fixture(params=KINDS)
def linear(request):
    packing, packed, scale = pack(request.param)
    layer = PackedLinear(packing, bias=True)
    fill(layer, packed, scale)
    layer.bias.requires_grad_(False)
    return layer


def dense(layer: PackedLinear, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return unpack(layer.weight, layer.weight_scale, layer.packing, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_computes_in_the_inputs_dtype(linear, dtype):
    x = torch.randn(2, 5, WIDTH).to(dtype)
    out = linear(x)
    assert out.dtype == dtype
    assert torch.equal(out, F.linear(x, dense(linear).to(dtype), linear.bias.to(dtype)))


def test_gradients_reach_the_input_and_the_unpacked_weight_is_not_kept(linear):
    x = torch.randn(3, WIDTH, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = linear(x).square()
    plain = x.detach().requires_grad_()
    expected = F.linear(plain, dense(linear), linear.bias).square()
    assert_close(*(torch.autograd.grad(y.sum(), z)[0] for y, z in ((out, x), (expected, plain))))
    assert all(tensor.shape != (ROWS, WIDTH) or tensor.dtype == linear.weight.dtype for tensor in kept)


def test_a_layer_holds_what_is_stored_and_nothing_else(linear):
    held = {name: tensor.nbytes for name, tensor in linear.state_dict().items()}
    assert held.pop("bias") == 4 * ROWS and held.pop("weight_scale", 4) in (4, 4 * ROWS)
    per_weight = {"Q8_0": 34 / 32, "Q4_0": 18 / 32, "NF4": 34 / 64, "F8_E4M3": 1}[linear.packing.format]
    assert held == {"weight": ROWS * WIDTH * per_weight}
    # A streamer swaps `.data` of plain tensors.
    before = linear(torch.ones(1, WIDTH))
    linear.weight.data = linear.weight.data.clone()
    assert type(linear.weight.data) is torch.Tensor and torch.equal(linear(torch.ones(1, WIDTH)), before)


def test_pieces_make_no_difference(linear, monkeypatch):
    whole = dense(linear)
    monkeypatch.setattr(layers, "PIECE", 7 * WIDTH)
    assert torch.equal(dense(linear), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_unpacks_the_rows_asked_for(kind):
    packing, packed, scale = pack(kind)
    table = PackedEmbedding(packing, dtype=torch.bfloat16)
    fill(table, packed, scale)
    ids = torch.tensor([[3, 0], [95, 3]])
    expected = unpack(packed, scale, packing, torch.bfloat16)[ids]
    assert torch.equal(table(ids), expected) and table(ids).shape == (2, 2, WIDTH)


def test_only_whole_blocks_make_a_packed_table():
    assert can_hold(nn.Linear(48, 2), Packing("Q8_0", (2, 48)))  # the blocks run on over the rows
    assert not can_hold(nn.Embedding(2, 48), Packing("Q8_0", (2, 48)))
    assert can_hold(nn.Embedding(2, 48), Packing("F8_E4M3", (2, 48)))
    assert not can_hold(nn.LayerNorm(64), Packing("Q8_0", (1, 64)))
