"""Modulation vectors from a table have the bits of vectors computed inside."""

from __future__ import annotations

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.model import CrossDiT, ModulationTable
from comfyui_kandinsky5.kandinsky_core.variants import CrossDiTSpec
from torch import nn

SPEC = CrossDiTSpec(
    model_dim=128, ff_dim=256, time_dim=64, num_text_blocks=2, num_visual_blocks=3, axes_dims=(16, 24, 24),
    visual_cond=True,
)  # fmt: skip


def random_model(dtype):
    torch.manual_seed(0)
    model = CrossDiT(SPEC, dtype=dtype).eval()
    for modulation in model.modulations():
        nn.init.normal_(modulation.out_layer.weight, std=0.05)
        nn.init.normal_(modulation.out_layer.bias, std=0.05)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_a_table_changes_no_bit(dtype, batch):
    model = random_model(dtype)
    x = torch.randn(batch, 2, 4, 6, SPEC.visual_embed_dim, dtype=dtype)
    text = torch.randn(batch, 5, SPEC.in_text_dim, dtype=dtype)
    pooled = {name: torch.randn(batch, SPEC.in_text_dim2, dtype=dtype) for name in ("text", "null")}
    evaluations = [(t, name) for t in (1000.0, 700.5, 12.25) for name in pooled]
    wanted = [model(x, text, pooled[name], torch.full((batch,), t)) for t, name in evaluations]
    embeddings = {(t, name): model.embed_time(torch.full((batch,), t), pooled[name]) for t, name in evaluations}
    table = ModulationTable(model, embeddings)
    for modulation in model.modulations():  # from here on their weights are of no use
        for parameter in modulation.parameters():
            parameter.data = torch.full_like(parameter, torch.nan)
    for (t, name), want in zip(evaluations, wanted, strict=True):
        got = model(x, text, pooled[name], torch.full((batch,), t), modulate=table.at((t, name)))
        assert torch.equal(got, want)
    width = SPEC.model_dim * (6 * SPEC.num_text_blocks + 9 * SPEC.num_visual_blocks + 2)
    assert table.nbytes == len(evaluations) * batch * width * 4


@torch.no_grad()
def test_an_evaluation_that_was_not_announced_is_not_guessed():
    model = random_model(torch.float32)
    table = ModulationTable(model, {0: model.embed_time(torch.ones(1), torch.zeros(1, SPEC.in_text_dim2))})
    with pytest.raises(KeyError):
        table.at(1)
