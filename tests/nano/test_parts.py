"""The pieces of the recipe: fast layers equal the real ones, the latent basis, Muon, and the objective."""

from __future__ import annotations

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.nano import latent_basis
from comfyui_kandinsky5.kandinsky_core.nano.autoencoder import new_vae
from comfyui_kandinsky5.kandinsky_core.nano.layers import FastGroupNorm
from comfyui_kandinsky5.kandinsky_core.nano.objective import flow_matching_loss, logit_normal_times
from comfyui_kandinsky5.kandinsky_core.nano.optimizer import Muon, orthogonalize
from comfyui_kandinsky5.kandinsky_core.sampling.conditioning import TextCondition
from comfyui_kandinsky5.kandinsky_core.vae.hunyuan import HunyuanVideoVAE
from comfyui_kandinsky5.kandinsky_core.variants import NANO_VAE, NANO_VIDEO
from torch import nn
from torch.testing import assert_close


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_the_training_autoencoder_is_the_shipped_one(frames):
    torch.manual_seed(0)
    fast, real = new_vae(NANO_VAE), HunyuanVideoVAE(NANO_VAE)
    with torch.no_grad():
        for weight in fast.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    real.load_state_dict(fast.state_dict())
    x = torch.rand(2, 3, frames, 16, 16) * 2 - 1
    gradients = []
    for vae in (fast, real):
        z = vae.encode(x).mean
        out = vae.decode(z)
        (out - x).square().mean().backward()
        gradients.append((z, out, vae.encoder.conv_in.conv.weight.grad, vae.decoder.conv_out.conv.weight.grad))
    for mine, theirs in zip(*gradients, strict=True):
        assert_close(mine, theirs, atol=2e-4, rtol=1e-3)


def test_group_norm_has_torchs_gradients():
    torch.manual_seed(0)
    fast, real = FastGroupNorm(4, 8), nn.GroupNorm(4, 8)
    weights = {"weight": torch.randn(8), "bias": torch.randn(8)}
    x = torch.randn(3, 8, 2, 5, 4, dtype=torch.float64)
    found = []
    for norm in (fast, real):
        norm.load_state_dict(weights)
        norm.double()
        leaf = x.clone().requires_grad_()
        norm(leaf).pow(3).sum().backward()
        found.append((leaf.grad, norm.weight.grad, norm.bias.grad))
    for mine, theirs in zip(*found, strict=True):
        assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_the_latent_basis_has_unit_scale_and_is_causal():
    torch.manual_seed(0)
    x = nn.functional.avg_pool3d(torch.randn(12, 3, 9, 36, 36), (1, 5, 5), 1).repeat_interleave(1, 2)[..., :32, :32]
    basis = latent_basis.fit(x, 16)
    z = basis.encode(x)
    assert z.shape == (12, 16, 3, 4, 4)
    assert z.square().mean().item() == pytest.approx(1, abs=0.02)
    changed = x.clone()
    changed[:, :, 5:] += 1
    again = basis.encode(changed)
    assert torch.equal(again[:, :, :2], z[:, :, :2]) and not torch.equal(again[:, :, 2], z[:, :, 2])
    # A picture is the first latent of the clip it begins.
    assert_close(basis.encode(x[:, :, :1]), z[:, :, :1], atol=1e-5, rtol=0)
    spread = z.std((0, 2, 3, 4))
    assert spread[0] > 1.2 * spread[-1]


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (32, 32)])
def test_muon_updates_are_nearly_orthogonal(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
    assert values.min() > 0.3 and values.max() < 1.3


def test_muon_lowers_a_loss_and_skips_unused_weights():
    torch.manual_seed(0)
    layer, idle = nn.Conv2d(3, 3, 3), nn.Linear(2, 2)
    before = idle.weight.clone()
    optimizer = Muon([layer.weight, idle.weight], lr=0.02)
    x = torch.randn(4, 3, 8, 8)
    values = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(x) - x[:, :, 1:-1, 1:-1]).square().mean()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.3 * values[0]
    assert torch.equal(idle.weight, before)


class Oracle:
    """A transformer that knows the answer; remembers its input."""

    spec = NANO_VIDEO

    def __init__(self, target_BCTHW):
        self.target = target_BCTHW

    def __call__(self, x_BTHWC, *_, **__):
        self.seen = x_BTHWC
        return self.target.movedim(1, -1)


def test_the_objective_is_noise_minus_data_and_ignores_known_frames():
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 2, 16, 3, 4, 4)
    text = TextCondition(torch.zeros(2, 1, 96), torch.zeros(2, 64))
    time_B = torch.tensor([0.25, 0.75])
    model = Oracle(noise - clean)
    assert flow_matching_loss(model, clean, text, time_B, noise).item() == pytest.approx(0, abs=1e-12)
    assert_close(model.seen[0, ..., :16].movedim(-1, 0), 0.75 * clean[0] + 0.25 * noise[0])
    assert model.seen[..., 16:].abs().max() == 0
    model.target = model.target.clone()
    model.target[:, :, 0] += 5
    assert flow_matching_loss(model, clean, text, time_B, noise, known_frames=1).item() == pytest.approx(0, abs=1e-12)
    assert flow_matching_loss(model, clean, text, time_B, noise).item() > 1
    flow_matching_loss(model, clean, text, time_B, noise, known_frames=1)
    assert_close(model.seen[:, 0, ..., :16].movedim(-1, 1), clean[:, :, 0])
    assert (model.seen[:, 0, ..., -1] == 1).all() and (model.seen[:, 1:, ..., -1] == 0).all()


def test_times_follow_the_shift():
    draws = [logit_normal_times(4000, torch.Generator().manual_seed(0), shift=s) for s in (1.0, 3.0)]
    assert draws[0].median().item() == pytest.approx(0.5, abs=0.02)
    assert draws[1].median().item() == pytest.approx(0.75, abs=0.02)
    assert all(t.min() > 0 and t.max() < 1 for t in draws)
