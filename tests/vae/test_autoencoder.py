"""Both autoencoders as modules: shapes, batches, gradients, single frames, 16-bit, injected layers, bad input."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import ShapeError, VariantError
from comfyui_kandinsky5.kandinsky_core.vae.flux import FluxVAE
from comfyui_kandinsky5.kandinsky_core.vae.hunyuan import CausalConv3d, HunyuanVideoVAE
from comfyui_kandinsky5.kandinsky_core.vae.moments import Moments
from comfyui_kandinsky5.kandinsky_core.vae.tiling import single_plan, window_plan
from comfyui_kandinsky5.kandinsky_core.variants import VAESpec
from torch import nn

VIDEO = VAESpec(
    kind="hunyuan",
    scaling_factor=1.0,
    block_out_channels=(8, 8, 16, 16),
    layers_per_block=1,
    norm_num_groups=4,
)
IMAGE = replace(VIDEO, kind="flux")


class OwnConv2d(nn.Conv2d):
    pass


class OwnConv3d(nn.Conv3d):
    pass


class OwnGroupNorm(nn.GroupNorm):
    pass


class OwnLinear(nn.Linear):
    pass


OWN = SimpleNamespace(Conv2d=OwnConv2d, Conv3d=OwnConv3d, GroupNorm=OwnGroupNorm, Linear=OwnLinear)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def clip(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(shape, dtype=dtype) * 2 - 1


@pytest.mark.parametrize("frames", [1, 5, 21])
def test_every_parameter_gets_a_gradient(frames):
    vae = HunyuanVideoVAE(VIDEO)
    x = clip(2, 3, frames, 16, 24)
    moments = vae.encode(x)
    assert moments.mean.shape == moments.logvar.shape == (2, 16, (frames - 1) // 4 + 1, 2, 3)
    out = vae.decode(moments.sample())
    assert out.shape == x.shape
    (out - x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in vae.parameters())


def test_image_autoencoder_gets_gradients_and_reports_one_pass():
    vae, seen = FluxVAE(IMAGE), []
    x = clip(2, 3, 16, 24)
    out = vae.decode(
        vae.encode(x, on_tile=lambda *at: seen.append(at)).sample(), on_tile=lambda *at: seen.append(at)
    )
    (out - x).square().mean().backward()
    assert out.shape == x.shape and seen == [(1, 1), (1, 1)]
    assert all(p.grad.any() for p in vae.parameters())


@pytest.mark.parametrize(("kind", "spec"), [(HunyuanVideoVAE, VIDEO), (FluxVAE, IMAGE)])
def test_batch_equals_one_by_one(kind, spec):
    vae = kind(spec, dtype=torch.float64).requires_grad_(False)
    x = clip(3, 3, *((9,) if kind is HunyuanVideoVAE else ()), 16, 24, dtype=torch.float64)
    z = vae.encode(x).mean
    torch.testing.assert_close(z, torch.cat([vae.encode(one).mean for one in x.split(1)]))
    torch.testing.assert_close(vae.decode(z), torch.cat([vae.decode(one) for one in z.split(1)]))


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 2, 2)])
def test_single_frame_shortcut_is_the_same_convolution(stride):
    quick = CausalConv3d(4, 6, 3, stride=stride, dtype=torch.float64)
    plain = CausalConv3d(4, 6, 3, stride=stride, dtype=torch.float64, ops=OWN)
    plain.load_state_dict(quick.state_dict())
    x = clip(2, 4, 1, 8, 10, dtype=torch.float64)
    torch.testing.assert_close(quick(x), plain(x), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(quick(x).square().sum(), quick.conv.weight)
    (wanted,) = torch.autograd.grad(plain(x).square().sum(), plain.conv.weight)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-12)


def test_convolution_and_attention_see_no_future():
    vae = HunyuanVideoVAE(VIDEO, dtype=torch.float64)
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda x: x  # its statistics span the clip by design
    z = torch.randn(1, 16, 4, 2, 3, dtype=torch.float64)
    later = z.clone()
    later[:, :, 3] += 1
    with torch.no_grad():
        before, after = vae.decode(z), vae.decode(later)
    assert torch.equal(before[:, :, :9], after[:, :, :9])
    assert not torch.allclose(before[:, :, 9], after[:, :, 9])


def test_no_grad_gives_what_training_gives():
    vae = HunyuanVideoVAE(VIDEO)
    x = clip(1, 3, 5, 16, 16)
    trained = vae.decode(vae.encode(x).mean)
    with torch.no_grad():
        assert torch.equal(vae.decode(vae.encode(x).mean), trained)


@pytest.mark.parametrize(("kind", "spec"), [(HunyuanVideoVAE, VIDEO), (FluxVAE, IMAGE)])
def test_layers_are_the_injected_ones(kind, spec):
    vae = kind(spec, ops=OWN)
    leaves = [module for module in vae.modules() if not list(module.children())]
    assert leaves and all(type(leaf) in vars(OWN).values() for leaf in leaves)
    plain = kind(spec)
    plain.load_state_dict(vae.state_dict())
    x = clip(1, 3, *((1,) if kind is HunyuanVideoVAE else ()), 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(vae.encode(x).mean, plain.encode(x).mean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_keeps_its_dtype_and_float32_statistics(dtype):
    vae = HunyuanVideoVAE(VIDEO).requires_grad_(False)
    z = torch.randn(1, 16, 2, 4, 4)
    exact = vae.decode(z)
    out = vae.to(dtype).decode(z.to(dtype))
    assert out.dtype == dtype
    assert (out.float() - exact).abs().max() / exact.abs().max() < (0.02 if dtype is torch.float16 else 0.1)
    norm = vae.decoder.conv_norm_out
    x = (torch.randn(1, 8, 3, 64, 64) + 60).to(dtype)  # a float16 sum of these would overflow
    torch.testing.assert_close(norm(x).float(), norm.float()(x.float()), rtol=0.01, atol=0.03)


def test_default_plan_is_whole_up_to_five_latent_frames_then_windows():
    vae = HunyuanVideoVAE(VIDEO).requires_grad_(False)
    for frames, passes in ((5, 1), (6, 2), (9, 3)):
        z, seen = torch.randn(1, 16, frames, 2, 2), []
        default = vae.decode(z, on_tile=lambda *at, seen=seen: seen.append(at))
        assert len(seen) == passes
        assert torch.equal(default, vae.decode(z, plan=window_plan(frames, 2, 2)))
        whole = vae.decode(z, plan=single_plan(frames, 2, 2))
        assert torch.equal(default, whole) == (passes == 1)
        seen.clear()
        vae.encode(default, on_tile=lambda *at, seen=seen: seen.append(at))
        assert len(seen) == passes


def test_moments():
    parameters = torch.cat((torch.full((1, 2, 3), 5.0), torch.tensor([[[-99.0] * 3, [99.0] * 3]])), 1)
    moments = Moments.split(parameters)
    assert moments.mode().eq(5).all()
    assert moments.logvar.unique().tolist() == [-30, 20]
    draws = [moments.sample(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    torch.testing.assert_close(draws[0][0, 0], torch.full((3,), 5.0), rtol=0, atol=1e-5)
    wide = Moments(torch.full((20000,), 2.0), torch.full((20000,), 9.0).log())
    assert wide.sample(torch.Generator().manual_seed(0)).std().item() == pytest.approx(3, rel=0.03)


@pytest.mark.parametrize(
    ("shape", "complaint"),
    [
        ((1, 3, 6, 16, 16), "Use 5|Use 9"),
        ((1, 3, 0, 16, 16), "4k\\+1"),
        ((1, 3, 5, 20, 16), "height 20"),
        ((1, 3, 5, 16, 4), "width 4 .* Use 8"),
        ((1, 4, 5, 16, 16), "batch, 3"),
        ((3, 5, 16, 16), "batch, 3"),
    ],
)
def test_video_encode_refuses_bad_shapes(shape, complaint):
    with pytest.raises(ShapeError, match=complaint):
        HunyuanVideoVAE(VIDEO).encode(torch.zeros(shape))


@pytest.mark.parametrize(
    "shape",
    [(16, 2, 2), (1, 16, 2, 2), (1, 4, 1, 2, 2), (1, 16, 0, 2, 2), (1, 16, 1, 0, 2), (1, 16, 1, 2, 0), (1,) * 6],
)
def test_video_decode_refuses_bad_shapes(shape):
    with pytest.raises(ShapeError, match="batch, 16, frames"):
        HunyuanVideoVAE(VIDEO).decode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 2), (16, 2, 2), (1, 16, 1, 2, 2), (1, 4, 2, 2), (1, 16, 0, 2), (1, 16, 2, 0)])
def test_image_decode_refuses_bad_shapes(shape):
    with pytest.raises(ShapeError, match="batch, 16, rows"):
        FluxVAE(IMAGE).decode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("shape", "complaint"),
    [
        ((1, 3, 1, 16, 16), "batch, 3, height"),
        ((3, 16, 16), "batch, 3, height"),
        ((1, 3, 12, 16), "height 12"),
        ((1, 3, 16, 0), "width 0"),
    ],
)
def test_image_encode_refuses_bad_shapes(shape, complaint):
    with pytest.raises(ShapeError, match=complaint):
        FluxVAE(IMAGE).encode(torch.zeros(shape))


def test_specifications_that_cannot_be_built_are_refused():
    with pytest.raises(VariantError, match="kind 'flux'"):
        HunyuanVideoVAE(IMAGE)
    with pytest.raises(VariantError, match="3 levels"):
        HunyuanVideoVAE(replace(VIDEO, block_out_channels=(8, 8, 8)))
    with pytest.raises(VariantError, match="norm_num_groups 4"):
        FluxVAE(replace(IMAGE, block_out_channels=(8, 8, 16, 18)))
