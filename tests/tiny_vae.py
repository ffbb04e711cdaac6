"""A tiny video autoencoder that hides no mistake: random norms, weights that keep activations near one."""

from __future__ import annotations

from types import ModuleType

import torch
from comfyui_kandinsky5.kandinsky_core.vae.hunyuan import HunyuanVideoVAE
from comfyui_kandinsky5.kandinsky_core.vae.plan import STREAM, DecodePlan, EncodePlan
from comfyui_kandinsky5.kandinsky_core.variants import VAESpec
from torch import Tensor, nn

SPEC = VAESpec(
    kind="hunyuan",
    scaling_factor=1.0,
    block_out_channels=(8, 8, 16, 16),
    layers_per_block=2,
    norm_num_groups=4,
)
EXACT = 1e-10  # in float64


class OwnConv3d(nn.Conv3d):
    """A layer that is not torch's own, as a host's is: nothing may look into it."""


class Own:
    """Layers of a host."""

    Conv3d, GroupNorm, Linear = OwnConv3d, nn.GroupNorm, nn.Linear


def tiny_vae(ops: ModuleType | type = nn, dtype: torch.dtype = torch.float64) -> HunyuanVideoVAE:
    """Make the same random autoencoder every time."""
    generator = torch.Generator().manual_seed(7)
    vae = HunyuanVideoVAE(SPEC, ops=ops, dtype=torch.float64).requires_grad_(False)
    for child in vae.modules():
        if isinstance(child, nn.GroupNorm):
            child.weight.uniform_(0.5, 1.5, generator=generator)
            child.bias.uniform_(-0.5, 0.5, generator=generator)
        elif isinstance(child, nn.Conv3d | nn.Linear):
            child.weight.normal_(0, child.weight[0].numel() ** -0.5, generator=generator)
            child.bias.normal_(0, 0.1, generator=generator)
    return vae.to(dtype)


def latent(batch: int, *thw: int, seed: int = 0) -> Tensor:
    """Draw a latent."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 16, *thw, generator=generator, dtype=torch.float64)


def clip(batch: int, *thw: int, seed: int = 0) -> Tensor:
    """Draw pixels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, *thw, generator=generator, dtype=torch.float64) * 2 - 1


def plan_for(z: Tensor, mode: str = STREAM, **settings) -> DecodePlan:
    """Make a plan for a latent."""
    return DecodePlan(mode=mode, latent_thw=tuple(z.shape[2:]), **settings)


def encode_plan(x: Tensor, **settings) -> EncodePlan:
    """Make a streaming plan for a clip."""
    frames, height, width = x.shape[2:]
    return EncodePlan(mode=STREAM, latent_thw=((frames + 3) // 4, height // 8, width // 8), **settings)


def error(a: Tensor, b: Tensor) -> float:
    """Return the largest difference."""
    assert a.shape == b.shape
    return (a - b).abs().max().item()
