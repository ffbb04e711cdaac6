"""Both autoencoders against diffusers with the same tiny random weights, and the published counts."""

from __future__ import annotations

import diffusers
import pytest
import torch
import torch.nn.functional as F
from comfyui_kandinsky5.kandinsky_core.vae import flux, tiling
from comfyui_kandinsky5.kandinsky_core.vae.flux import FluxVAE
from comfyui_kandinsky5.kandinsky_core.vae.hunyuan import HunyuanVideoVAE
from comfyui_kandinsky5.kandinsky_core.variants import FLUX_VAE, HUNYUAN_VAE, VAESpec
from torch import nn

TOLERANCE = 1e-5  # max|a-b| / max|b|
TINY = {"block_out_channels": (8, 16, 24, 32), "layers_per_block": 2, "norm_num_groups": 4}


def hunyuan_peer(**config) -> nn.Module:
    return diffusers.AutoencoderKLHunyuanVideo(**config)


def flux_peer(**config) -> nn.Module:
    return diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **config,
    )


FULL = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32}
KINDS = {
    "hunyuan": (HunyuanVideoVAE, HUNYUAN_VAE, hunyuan_peer, 248, 246_478_803),
    "flux": (FluxVAE, FLUX_VAE, flux_peer, 244, 83_819_683),
}


def randomise(module: nn.Module, seed: int) -> None:
    """Random affine norms and biases: initial ones and zeros would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, nn.GroupNorm):
                child.weight.uniform_(0.5, 1.5, generator=generator)
                child.bias.uniform_(-0.5, 0.5, generator=generator)
            elif isinstance(child, nn.Conv2d | nn.Conv3d | nn.Linear):
                child.weight.normal_(0, child.weight[0].numel() ** -0.5, generator=generator)
                child.bias.normal_(0, 0.1, generator=generator)


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[nn.Module, nn.Module]]:
    made = {}
    for kind, (ours, _, peer, *_) in KINDS.items():
        theirs = peer(**TINY).eval().requires_grad_(False)
        randomise(theirs, seed=7)
        vae = ours(VAESpec(kind=kind, scaling_factor=1.0, **TINY)).requires_grad_(False)
        vae.load_state_dict(theirs.state_dict())
        made[kind] = vae, theirs
    return made


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


def encode_error(vae: nn.Module, theirs: nn.Module, x: torch.Tensor, **plan) -> float:
    moments, peer = vae.encode(x, **plan), theirs.encode(x).latent_dist
    return max(error(moments.mode(), peer.mode()), error(moments.logvar, peer.logvar))


def decode_error(vae: nn.Module, theirs: nn.Module, z: torch.Tensor, **plan) -> float:
    return error(vae.decode(z, **plan), theirs.decode(z).sample)


@pytest.mark.parametrize("kind", KINDS)
def test_names_shapes_and_counts_are_published(kind):
    ours, spec, peer, tensors, parameters = KINDS[kind]
    vae = ours(spec, device="meta")
    with torch.device("meta"):
        theirs = peer(**FULL)
    shapes = {name: tensor.shape for name, tensor in vae.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert len(shapes) == tensors
    assert sum(parameter.numel() for parameter in vae.parameters()) == parameters


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("frames", [1, 5, 9])
def test_hunyuan_equals_diffusers(pairs, frames, batch):
    generator = torch.Generator().manual_seed(frames)
    x = torch.rand(batch, 3, frames, 40, 24, generator=generator) * 2 - 1
    z = torch.randn(batch, 16, (frames - 1) // 4 + 1, 5, 3, generator=generator)
    assert encode_error(*pairs["hunyuan"], x) <= TOLERANCE
    assert decode_error(*pairs["hunyuan"], z) <= TOLERANCE


def test_hunyuan_single_plan_equals_diffusers_whole_clip(pairs):
    vae, theirs = pairs["hunyuan"]
    theirs.use_framewise_encoding = theirs.use_framewise_decoding = False
    z = torch.randn(1, 16, 7, 3, 4, generator=torch.Generator().manual_seed(0))
    assert decode_error(vae, theirs, z, plan=tiling.single_plan(7, 3, 4)) <= TOLERANCE
    x = torch.rand(1, 3, 25, 24, 32, generator=torch.Generator().manual_seed(0))
    assert encode_error(vae, theirs, x, plan=tiling.single_plan(7, 3, 4)) <= TOLERANCE


@pytest.mark.parametrize("batch", [1, 2])
def test_flux_equals_diffusers(pairs, batch):
    generator = torch.Generator().manual_seed(batch)
    x = torch.rand(batch, 3, 40, 56, generator=generator) * 2 - 1
    z = torch.randn(batch, 16, 5, 7, generator=generator)
    assert encode_error(*pairs["flux"], x) <= TOLERANCE
    assert decode_error(*pairs["flux"], z) <= TOLERANCE


def symmetric_padding(monkeypatch, vae):
    pad = F.pad
    monkeypatch.setattr(F, "pad", lambda x, sides: pad(x, (1, 0, 1, 0)))


def bilinear_upsampling(monkeypatch, vae):
    interpolate = F.interpolate
    monkeypatch.setattr(
        F, "interpolate", lambda x, scale_factor, mode: interpolate(x, scale_factor=2.0, mode="bilinear")
    )


def replicate_padding(monkeypatch, vae):
    for module in vae.modules():
        if isinstance(module, nn.Conv2d) and module.padding == (1, 1):
            monkeypatch.setattr(module, "padding_mode", "replicate")
            monkeypatch.setattr(module, "_reversed_padding_repeated_twice", [1, 1, 1, 1])


def wrong_eps(monkeypatch, vae):
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            monkeypatch.setattr(module, "eps", 1e-3)


def swapped_moments(monkeypatch, vae):
    split = flux.Moments.split
    monkeypatch.setattr(flux.Moments, "split", lambda parameters: split(parameters.roll(16, dims=1)))


@pytest.mark.parametrize(
    ("mistake", "where"),
    [
        (symmetric_padding, "encode"),
        (bilinear_upsampling, "decode"),
        (replicate_padding, "encode"),
        (replicate_padding, "decode"),
        (wrong_eps, "encode"),
        (wrong_eps, "decode"),
        (swapped_moments, "encode"),
    ],
)
def test_flux_mistakes_are_noticed(monkeypatch, pairs, mistake, where):
    vae, theirs = pairs["flux"]
    x = torch.rand(1, 3, 32, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = torch.randn(1, 16, 4, 5, generator=torch.Generator().manual_seed(0))
    wanted = theirs.encode(x).latent_dist.mode() if where == "encode" else theirs.decode(z).sample
    mistake(monkeypatch, vae)
    got = vae.encode(x).mode() if where == "encode" else vae.decode(z)
    assert error(got, wanted) > 10 * TOLERANCE
