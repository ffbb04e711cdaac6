"""The closed-form latent space: scale, causality, its inverse, and samples of several sizes."""

from __future__ import annotations

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.nano import latent_basis
from torch import nn
from torch.testing import assert_close


def smooth(count=12, frames=9):
    """Random clips `[N,3,T,32,32]` with most of their energy in low frequencies."""
    noise = torch.randn(count, 3, frames, 36, 36, generator=torch.Generator().manual_seed(0))
    return nn.functional.avg_pool3d(noise, (1, 5, 5), 1)


@pytest.fixture(scope="module")
def basis():
    return latent_basis.fit([smooth()], 16)


def test_latents_have_unit_scale_and_are_causal(basis):
    x = smooth()
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


@pytest.mark.parametrize("frames", [1, 4])
def test_blocks_come_apart_and_together(frames):
    x = smooth(2, 1 + 2 * frames)
    assert_close(latent_basis.unblocks(latent_basis.blocks(x, frames), frames), x)


def test_the_inverse_is_the_best_linear_one(basis):
    x = smooth()
    again = basis.decode(basis.encode(x))
    assert again.shape == x.shape
    error = (again - x).square().mean()
    assert error < 0.7 * (x - x.mean()).square().mean()
    for other in (1.1 * basis.encode(x), basis.encode(x) + 0.1, basis.encode(0.9 * x)):
        assert (basis.decode(other) - x).square().mean() > error
    # Encoding what was decoded changes nothing: the inverse loses no latent.
    assert_close(basis.encode(again)[:, :, 1:], basis.encode(x)[:, :, 1:], atol=1e-3, rtol=0)
    assert_close(basis.scaled(2.0).decode(2 * basis.encode(x)), again, atol=1e-4, rtol=0)


def test_samples_may_differ_in_size_and_their_order_does_not_matter():
    parts = [smooth(6), smooth(6)[..., :16, :16], smooth(3, 5)]
    one, other = latent_basis.fit(parts, 4), latent_basis.fit(parts[::-1], 4)
    assert_close(one.project_SC, other.project_SC, atol=1e-4, rtol=1e-4)
    assert_close(one.mean_S, other.mean_S, atol=1e-6, rtol=0)


def test_pictures_have_a_basis_without_time():
    x = smooth(12, 1)
    basis = latent_basis.fit([x], 16, frames=1)
    assert basis.mean_S.shape == (192,)
    assert basis.encode(x).shape == (12, 16, 1, 4, 4) and basis.decode(basis.encode(x)).shape == x.shape
