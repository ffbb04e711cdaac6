"""Autoencoder files in every layout load as the same weights; other autoencoders are named and refused."""

from __future__ import annotations

import re

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import CheckpointError
from comfyui_kandinsky5.kandinsky_core.vae.flux import FluxVAE
from comfyui_kandinsky5.kandinsky_core.vae.hunyuan import HunyuanVideoVAE
from comfyui_kandinsky5.kandinsky_core.vae.layout import fit, identify_vae
from comfyui_kandinsky5.kandinsky_core.variants import FLUX_VAE, HUNYUAN_VAE, NANO_VAE, VAESpec

TINY_FLUX = VAESpec(
    kind="flux",
    scaling_factor=0.3611,
    block_out_channels=(8, 8, 16, 16),
    layers_per_block=1,
    norm_num_groups=4,
)
CLASSES = {"hunyuan": HunyuanVideoVAE, "flux": FluxVAE}
PUBLISHED = {"hunyuan": HUNYUAN_VAE, "flux": FLUX_VAE}
TO_LDM = (
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.down_blocks\.(\d)\.resnets\.(\d)\.", r".down.\1.block.\2."),
    (r"\.down_blocks\.(\d)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d)\.resnets\.(\d)\.", lambda m: f".up.{3 - int(m[1])}.block.{m[2]}."),
    (r"\.up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f".up.{3 - int(m[1])}.upsample."),
    (r"\.mid_block\.resnets\.(\d)\.", lambda m: f".mid.block_{int(m[1]) + 1}."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_(q|k|v)\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)
UNREVERSED = (
    (r"\.up_blocks\.(\d)\.resnets\.", r".up.\1.block."),
    (r"\.up_blocks\.(\d)\.upsamplers\.0", r".up.\1.upsample"),
)
TO_OLD = (
    (r"\.to_q\.", ".query."),
    (r"\.to_k\.", ".key."),
    (r"\.to_v\.", ".value."),
    (r"\.to_out\.0\.", ".proj_attn."),
)


def renamed(name: str, rules) -> str:
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def ldm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The layout of ComfyUI's and the original FLUX files: other names, attention as 1x1 convolutions."""
    ones = (1,) * (3 if "quant_conv.weight" in state else 2)
    return {
        renamed(name, TO_LDM): tensor.reshape(*tensor.shape, *ones)
        if ".to_" in name and name.endswith("weight")
        else tensor
        for name, tensor in state.items()
    }


def old_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    nested = {"quant_conv": "encoder.quant_conv", "post_quant_conv": "decoder.post_quant_conv"}
    return {
        re.sub(r"^(post_)?quant_conv", lambda m: nested[m[0]], renamed(name, TO_OLD)): tensor
        for name, tensor in state.items()
    }


def prefixed(prefix: str):
    return lambda state: (
        {prefix + name: tensor for name, tensor in state.items()} | {"model.x.weight": torch.ones(1)}
    )


def shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


LAYOUTS = {
    "diffusers": dict,
    "ldm": ldm,
    "old names": old_names,
    "vae.": prefixed("vae."),
    "first_stage_model.": lambda state: prefixed("first_stage_model.")(ldm(state)),
    "module.vae.": prefixed("module.vae."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", [NANO_VAE, TINY_FLUX], ids=["hunyuan", "flux"])
def test_every_layout_loads_as_the_same_weights(spec, layout):
    torch.manual_seed(0)
    vae = CLASSES[spec.kind](spec)
    state = vae.state_dict()
    stored = LAYOUTS[layout](state)
    settings = {"norm_num_groups": "4", "scaling_factor": str(spec.scaling_factor), "shift_factor": 0.1159}
    found, names = identify_vae(shapes(stored), settings=settings)
    assert found == spec
    assert names.keys() <= stored.keys()
    loaded = {ours: fit(stored[name], tuple(state[ours].shape)) for name, ours in names.items()}
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", [HUNYUAN_VAE, FLUX_VAE], ids=["hunyuan", "flux"])
def test_published_files_need_no_settings(spec, layout):
    state = CLASSES[spec.kind](spec, device="meta").state_dict()
    found, names = identify_vae(shapes(LAYOUTS[layout](state)))
    assert found == spec
    assert set(names.values()) == set(state)


def test_fit_changes_only_trailing_ones():
    weight = torch.arange(6.0).view(2, 3, 1, 1)
    assert torch.equal(fit(weight, (2, 3)), weight.view(2, 3))
    assert fit(weight, (2, 3)).data_ptr() == weight.data_ptr()
    assert fit(weight, (3, 2)).shape == weight.shape
    assert fit(torch.ones(2, 3, 2, 1), (2, 3)).shape == (2, 3, 2, 1)


def video() -> dict[str, tuple[int, ...]]:
    return shapes(HunyuanVideoVAE(HUNYUAN_VAE, device="meta").state_dict())


def image() -> dict[str, tuple[int, ...]]:
    return shapes(FluxVAE(FLUX_VAE, device="meta").state_dict())


FOREIGN = {
    "HunyuanVideo 1.5": lambda: video() | {"decoder.conv_in.conv.weight": (1024, 32, 3, 3, 3)},
    "CogVideoX": lambda: video() | {"decoder.mid_block.resnets.0.norm1.norm_layer.weight": (512,)},
    "Wan or Qwen-Image": lambda: {
        "decoder.conv1.weight": (384, 16, 3, 3, 3), "decoder.middle.0.residual.0.gamma": (384,)
    },
    r"\(gamma\)": lambda: {
        "decoder.conv_in.weight": (384, 16, 3, 3, 3), "decoder.mid_block.resnets.0.norm1.gamma": (384, 1, 1, 1)
    },
    r"Stable Diffusion or FLUX\.2 autoencoder \(4 latent": lambda: image()
    | {"decoder.conv_in.weight": (512, 4, 3, 3), "post_quant_conv.weight": (4, 4, 1, 1)},
    "has 8 latent channels": lambda: image() | {"decoder.conv_in.weight": (512, 8, 3, 3)},
    "3-dimensional convolutions under": lambda: image() | {"decoder.conv_in.weight": (512, 16, 3, 3, 3)},
    "no 16-channel post_quant_conv": lambda: {name: s for name, s in video().items() if "post_quant" not in name},
    "no attention": lambda: {name: s for name, s in video().items() if "attentions" not in name},
    "other way round": lambda: {renamed(name, UNREVERSED): s for name, s in video().items()},
    "encoder without its decoder": lambda: {name: s for name, s in video().items() if name.startswith("encoder.")},
    "tiny preview decoder": lambda: {"decoder.1.weight": (64, 16, 3, 3), "decoder.1.bias": (64,)},
    "a transformer": lambda: {"visual_transformer_blocks.0.cross_attention.to_key.weight": (1792, 1792)},
    "no decoder.conv_in": lambda: {"blocks.0.weight": (4, 4)},
    "first tensor: none": dict,
    "needs norm_num_groups": lambda: shapes(HunyuanVideoVAE(NANO_VAE, device="meta").state_dict()),
    "incomplete": lambda: {name: s for name, s in video().items() if not name.startswith("decoder.up_blocks.2.")},
    "under two names": lambda: image() | {"decoder.norm_out.weight": (128,)},
}  # fmt: skip


@pytest.mark.parametrize("complaint", FOREIGN)
def test_other_files_are_named_and_refused(complaint):
    with pytest.raises(CheckpointError, match=complaint):
        identify_vae(FOREIGN[complaint]())


@pytest.mark.parametrize(
    "settings",
    [{"norm_num_groups": groups} for groups in (3, 0, -4, "many", 32.5)]
    + [{"scaling_factor": factor} for factor in ("x", 0, -1.0, "nan", "inf")],
)
def test_settings_that_contradict_the_tensors_are_refused(settings):
    with pytest.raises(CheckpointError, match="contradicts"):
        identify_vae(video(), settings=settings)


@pytest.mark.parametrize(
    ("make", "factor", "said"),
    [
        (image, 1.5305, "looks like the Stable Diffusion 3 autoencoder .* scaling_factor 1.5305, ours has 0.3611"),
        (image, 1.0, "looks like another autoencoder .* scaling_factor 1, ours has 0.3611"),
        (video, "1.03682", "looks like another autoencoder .* scaling_factor 1.03682, ours has 0.476986"),
    ],
)  # fmt: skip
def test_published_shapes_with_another_scale_are_another_model(make, factor, said):
    with pytest.raises(CheckpointError, match=said):
        identify_vae(make(), settings={"scaling_factor": factor})
