"""Pieces give what the whole gives, in less memory; float16 matrices survive what float16 cannot hold."""

from __future__ import annotations

import math

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.memory.tracker import Tracker
from comfyui_kandinsky5.kandinsky_core.model import CrossDiT, Regime, regime, rope_3d
from comfyui_kandinsky5.kandinsky_core.variants import CrossDiTSpec
from torch import nn

SPEC = CrossDiTSpec(
    model_dim=320, ff_dim=512, time_dim=64, num_text_blocks=1, num_visual_blocks=2, axes_dims=(16, 24, 24),
    visual_cond=True,
)  # fmt: skip
GRID = (3, 6, 5)


def random_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = CrossDiT(SPEC, dtype=dtype).eval()
    for modulation in model.modulations():
        nn.init.normal_(modulation.out_layer.weight, std=0.05)
        nn.init.normal_(modulation.out_layer.bias, std=0.3)
    return model


def arguments(batch=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    t, h, w = GRID
    shapes = ((batch, t, 2 * h, 2 * w, SPEC.visual_embed_dim), (batch, 7, SPEC.in_text_dim), (batch, SPEC.in_text_dim2))
    return (*(torch.randn(shape, generator=generator).to(dtype) for shape in shapes), torch.full((batch,), 400.0))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("pieces", "groups"), [(1, 2), (1, 5), (1, 3), (7, 1), (200, 1), (4, 9)])
@torch.no_grad()
def test_pieces_equal_the_whole_to_rounding(monkeypatch, batch, pieces, groups):
    monkeypatch.setattr(regime, "PIECE_BYTES", 4 * SPEC.model_dim * 17 * batch)  # of 90 tokens
    model, given = random_model(), arguments(batch)
    wanted = model(*given)
    model.set_regime(Regime(hidden_pieces=pieces, head_groups=groups))
    got = model(*given)
    assert (got - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@torch.no_grad()
def test_attention_sees_one_group_of_heads_at_a_time():
    model, given, seen = random_model(), arguments(), []
    model.set_regime(Regime(head_groups=2))

    def attend(q, k, v):
        seen.append(q.shape[1])
        return nn.functional.scaled_dot_product_attention(q, k, v)

    model(*given, attend=attend)
    assert seen == [3, 2] * SPEC.num_visual_blocks


class Doubling(nn.Linear):
    """A host's layer: its weights are not its output features one by one."""

    def forward(self, x):
        return super().forward(x) * 2


@torch.no_grad()
def test_layers_of_a_host_are_called_and_not_cut(monkeypatch):
    monkeypatch.setattr(regime, "PIECE_BYTES", 4 * SPEC.model_dim * 17)
    model, given = random_model(), arguments()
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Doubling
    wanted = model(*given)
    model.set_regime(Regime(hidden_pieces=3, head_groups=5))
    assert (model(*given) - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def test_gradients_do_not_know_of_pieces():
    model, given = random_model(), arguments()
    model(*given).square().sum().backward()
    wanted = model.visual_transformer_blocks[0].self_attention.to_key.weight.grad.clone()
    model.zero_grad()
    model.set_regime(Regime(hidden_pieces=3, head_groups=5))
    model(*given).square().sum().backward()
    assert torch.equal(model.visual_transformer_blocks[0].self_attention.to_key.weight.grad, wanted)


@torch.no_grad()
def test_a_block_in_pieces_needs_little_more_than_its_input_and_its_output():
    spec = CrossDiTSpec(
        model_dim=1792, ff_dim=7168, time_dim=512, num_text_blocks=1, num_visual_blocks=1, axes_dims=(16, 24, 24),
        visual_cond=True,
    )  # fmt: skip
    model = CrossDiT(spec, device="meta", dtype=torch.bfloat16)
    grid = (61, 32, 48)
    x = torch.empty(1, math.prod(grid), spec.model_dim, device="meta", dtype=torch.bfloat16)
    given = (
        x,
        torch.empty(1, 256, spec.model_dim, device="meta", dtype=torch.bfloat16),
        torch.empty(1, spec.time_dim, device="meta"),
        rope_3d(grid, spec.axes_dims).to("meta"),
    )

    def peak(chosen):
        model.set_regime(chosen)
        with Tracker() as tracker:
            model.visual_transformer_blocks[0](*given)
        return tracker.peak_bytes / x.nbytes  # in sizes of the tokens, the input not counted

    whole, pieces = peak(Regime()), peak(Regime(hidden_pieces=16, head_groups=4))
    assert whole >= 4.2
    assert pieces <= 2.6  # the stream, a branch, and pieces of hidden and float32 values


def loud(model, factor):
    """Make branches that float16 cannot hold, and a residual stream that carries them on."""
    for block in model.visual_transformer_blocks:
        block.feed_forward.out_layer.weight.data *= factor
        block.self_attention.out_layer.weight.data *= factor
    return model


@pytest.mark.parametrize("pieces", [False, True])
@torch.no_grad()
def test_float16_matrices_survive_activations_beyond_float16(pieces):
    given = arguments()
    reference = loud(random_model(), 3e5)
    blocks = []
    reference.visual_transformer_blocks[0].register_forward_hook(lambda block, given, out: blocks.append(out))
    wanted = reference(*given)
    assert blocks[0].abs().max() > 2 * torch.finfo(torch.float16).max

    half = [x.half() if x.is_floating_point() and x.ndim > 1 else x for x in given]
    plain = loud(random_model(), 3e5).half()
    assert not plain(*half).isfinite().all()  # what a float16 model without the policy gives

    safe = loud(random_model(), 3e5)
    for name, parameter in safe.named_parameters():
        if "modulation" not in name and "time_embeddings" not in name:
            parameter.data = parameter.data.half()
    safe.set_regime(Regime(dtype=torch.float16, hidden_pieces=3 if pieces else 1, head_groups=2 if pieces else 1))
    got = safe(*half)
    assert got.dtype is torch.float16
    assert got.isfinite().all()
    assert (got.float() - wanted).norm() <= 0.02 * wanted.norm()


@torch.no_grad()
def test_float16_keeps_the_stream_in_float32():
    model = random_model().half()
    model.set_regime(Regime(dtype=torch.float16))
    seen = []
    block = model.visual_transformer_blocks[1]
    block.register_forward_pre_hook(lambda block, given: seen.extend(x.dtype for x in given[:2]))
    block.feed_forward.register_forward_pre_hook(lambda layer, given: seen.append(given[0].dtype))
    model(*(x.half() if x.ndim > 1 else x for x in arguments()))
    assert seen == [torch.float32, torch.float16, torch.float16]
