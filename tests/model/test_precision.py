"""What computes in float32 does: 16-bit in, one rounding out, on both execution paths."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comfyui_kandinsky5.kandinsky_core.errors import ShapeError
from comfyui_kandinsky5.kandinsky_core.model import CrossDiT, layers
from comfyui_kandinsky5.kandinsky_core.model.attention import Attention
from comfyui_kandinsky5.kandinsky_core.model.rope import rope_1d, rotate
from comfyui_kandinsky5.kandinsky_core.variants import CrossDiTSpec
from torch import Tensor, nn

WIDTH, TOKENS = 64, 96
HALF_ULP = 2**-8  # relative error of one rounding to bfloat16


@pytest.fixture(params=["traced", "whole", "pieces"], autouse=True)
def path(request, monkeypatch):
    """Recording gradients; one expression; pieces of five tokens."""
    monkeypatch.setattr(layers, "PIECE_BYTES", 4 * WIDTH * (5 if request.param == "pieces" else TOKENS))
    with torch.set_grad_enabled(request.param == "traced"):
        yield


def rounded_once(got: Tensor, exact: Tensor) -> bool:
    """Whether bfloat16 `got` is `exact` (float64) with a single rounding; float32 noise is allowed for."""
    assert got.dtype == torch.bfloat16
    return bool(((got.double() - exact).abs() <= 1.01 * HALF_ULP * exact.abs() + 1e-5).all())


@pytest.fixture(params=[1, 2])
def tokens(request) -> Tensor:
    torch.manual_seed(0)
    return (torch.randn(request.param, TOKENS, WIDTH) * 3 + 1).bfloat16()


def vectors(batch: int) -> Tensor:
    return torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(4))


def test_modulated_norm(tokens):
    shift, scale = vectors(len(tokens)), vectors(len(tokens)) * 0.7
    normed = F.layer_norm(tokens.double(), (WIDTH,), eps=1e-5)
    exact = normed * (1 + scale.double()[:, None]) + shift.double()[:, None]
    assert rounded_once(layers.modulated_norm(tokens, shift, scale), exact)
    assert not rounded_once((normed.bfloat16() * (1 + scale[:, None]) + shift[:, None]).bfloat16(), exact)


def test_gated_residual(tokens):
    branch, gate = tokens.flip(1) * 0.3, vectors(len(tokens))
    exact = tokens.double() + branch.double() * gate.double()[:, None]
    sixteen_bit = tokens + branch * gate[:, None].bfloat16()
    assert rounded_once(layers.gated_residual(tokens, branch.clone(), gate), exact)
    assert not rounded_once(sixteen_bit, exact)


def test_query_norm_and_rotation(tokens):
    attention = Attention(WIDTH, 32, nn, dtype=torch.bfloat16)
    nn.init.normal_(attention.query_norm.weight)
    rope = rope_1d(TOKENS, 32)
    heads = tokens.unflatten(-1, (-1, 32))
    mean_square = heads.double().square().mean(-1, keepdim=True)
    normed = heads.double() / (mean_square + layers.RMS_EPS).sqrt() * attention.query_norm.weight.double()
    cos, sin = rope.double()[:, None].unbind(-1)
    even, odd = normed.unflatten(-1, (-1, 2)).unbind(-1)
    exact = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    # Products of two roundings' size cancel in the rotation, so errors are measured against the pair's length.
    length = exact.unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True).expand(*exact.shape[:-1], 16, 2).flatten(-2)
    got = attention.heads(tokens.clone(), attention.query_norm, rope)
    twice = rotate(normed.bfloat16().float(), rope).bfloat16()

    def worst(value: Tensor) -> float:
        return ((value.double() - exact).abs() / length).max().item()

    assert worst(got) <= 1.01 * HALF_ULP < worst(twice)


def test_time_embedding(tokens):
    torch.manual_seed(1)
    embed = layers.TimeEmbeddings(WIDTH, 32, nn, dtype=torch.bfloat16)
    time = torch.tensor([987.654, 3.2])
    half = WIDTH // 2
    angles = time.double()[:, None] * torch.exp(-torch.arange(half).double() / half * torch.log(torch.tensor(1e4)))
    wave = torch.cat((angles.cos(), angles.sin()), -1)
    hidden = F.silu(F.linear(wave, embed.in_layer.weight.double(), embed.in_layer.bias.double()))
    exact = F.linear(hidden, embed.out_layer.weight.double(), embed.out_layer.bias.double())
    got = embed(time)
    assert got.dtype == torch.float32
    assert (got - exact).abs().max() <= 2e-4 * exact.abs().max()  # float32 angles near 1000 radians
    assert (embed.double().bfloat16()(time.bfloat16()) - exact).abs().max() > 1e-3 * exact.abs().max()


def test_accelerators_are_not_drowned_in_launches():
    image, clip = (torch.empty(1, n, width, device="meta") for n, width in ((4096, 2560), (47_616, 1792)))
    assert layers.piece_tokens(image) >= 4096  # a 1024 x 1024 picture runs whole
    assert 4 <= 47_616 / layers.piece_tokens(clip) <= 8


def test_batches_that_differ_are_named():
    spec = CrossDiTSpec(
        model_dim=64, ff_dim=64, time_dim=32, num_text_blocks=1, num_visual_blocks=1, axes_dims=(8, 12, 12),
        in_text_dim=8, in_text_dim2=8,
    )  # fmt: skip
    with pytest.raises(ShapeError, match="batch sizes 2, 1, 1, 1"):
        CrossDiT(spec)(torch.zeros(2, 1, 4, 4, 16), torch.zeros(1, 3, 8), torch.zeros(1, 8), torch.zeros(1))
