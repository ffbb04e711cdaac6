"""Core's own autoencoders in our graph: the network is ours, every layer in it core's, so core goes on moving them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kandinsky_core.vae.flux import FluxVAE
from ..kandinsky_core.vae.hunyuan import HunyuanVideoVAE
from ..kandinsky_core.vae.layout import identify_vae


class Pointwise(torch.nn.Module):
    """A 1 x 1 convolution as the linear layer it is: channels last."""

    def __init__(self, conv: torch.nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Apply it to [B,N,C]."""
        spread = (1,) * (self.conv.weight.ndim - 3)
        x = x_BNC.transpose(1, 2)
        return self.conv(x.reshape(*x.shape, *spread)).flatten(2).transpose(1, 2)


def network_of(core: torch.nn.Module) -> HunyuanVideoVAE | FluxVAE:
    """Build our autoencoder around the layers of core's; nothing is copied."""
    shapes = {name: tuple(weight.shape) for name, weight in core.named_parameters()}
    groups = next(layer.num_groups for layer in core.modules() if isinstance(layer, torch.nn.GroupNorm))
    spec, names = identify_vae(shapes, settings={"norm_num_groups": groups})
    ours = (HunyuanVideoVAE if spec.kind == "hunyuan" else FluxVAE)(spec, device="meta")
    layers = {name.rpartition(".")[0]: stored.rpartition(".")[0] for stored, name in names.items()}
    for place, path in layers.items():
        layer = core.get_submodule(path)
        if isinstance(ours.get_submodule(place), torch.nn.Linear):
            layer = Pointwise(layer)
        parent, _, child = place.rpartition(".")
        setattr(ours.get_submodule(parent), child, layer)
    return ours.eval()
