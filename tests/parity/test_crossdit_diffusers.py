"""CrossDiT against diffusers' Kandinsky 5 transformer: every task's shape, same weights, live."""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.model import CrossDiT, attention, layers
from comfyui_kandinsky5.kandinsky_core.variants import CrossDiTSpec
from diffusers.models.transformers import transformer_kandinsky as peer_module
from torch import Tensor, nn

VIDEO = CrossDiTSpec(
    model_dim=64, ff_dim=128, time_dim=32, num_text_blocks=2, num_visual_blocks=2,
    axes_dims=(8, 12, 12), in_text_dim=24, in_text_dim2=16, visual_cond=True,
)  # fmt: skip
IMAGE = replace(VIDEO, model_dim=256, ff_dim=256, axes_dims=(32, 48, 48), visual_cond=False)
SHAPES = {
    "video, 1 latent frame": (VIDEO, (1, 4, 6), (1.0, 2.0, 2.0)),
    "video": (VIDEO, (5, 6, 4), (1.0, 2.0, 2.0)),
    "text to image": (IMAGE, (1, 6, 8), (1.0, 1.0, 1.0)),
    "editing": (replace(IMAGE, instruct_type="channel"), (1, 8, 6), (1.0, 1.0, 1.0)),
    "pro": (replace(IMAGE, visual_cond=True, num_text_blocks=4), (3, 4, 6), (1.0, 3.16, 3.16)),
}
EXACT, AS_SHIPPED = 1e-5, 1e-3


def error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


def without_bfloat16_rounding(module: ModuleType) -> type:
    """diffusers' attention processor, with its rounding of rotated q and k to bfloat16 taken out."""
    source = inspect.getsource(module.Kandinsky5AttnProcessor)
    exact = source.replace(".to(torch.bfloat16)", "")
    assert exact.count("apply_rotary") == source.count("apply_rotary") and exact != source
    namespace = dict(vars(module))
    exec(exact, namespace)
    return namespace["Kandinsky5AttnProcessor"]


def pair(spec: CrossDiTSpec, exact: bool = True) -> tuple[CrossDiT, nn.Module]:
    """Our model and diffusers' on the same random weights."""
    torch.manual_seed(0)
    ours = CrossDiT(spec).eval()
    for parameter in ours.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.7 * parameter.shape[1] ** -0.5)
        else:
            nn.init.normal_(parameter, mean=1.0 if parameter.numel() == spec.head_dim else 0.0, std=0.2)
    config = asdict(spec)
    config["visual_cond"] = config["visual_cond"] or config.pop("instruct_type") == "channel"
    config.pop("instruct_type", None)
    theirs = peer_module.Kandinsky5Transformer3DModel(**config).eval()
    theirs.load_state_dict(ours.state_dict())
    if exact:
        processor = without_bfloat16_rounding(peer_module)
        for module in theirs.modules():
            if isinstance(module, peer_module.Kandinsky5Attention):
                module.set_processor(processor())
    return ours, theirs


def inputs(spec: CrossDiTSpec, thw: tuple[int, int, int], batch: int, text: int = 9) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    t, h, w = thw
    shapes = (
        (batch, t, 2 * h, 2 * w, spec.visual_embed_dim), (batch, text, spec.in_text_dim), (batch, spec.in_text_dim2)
    )  # fmt: skip
    x, text_BLD, pooled = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, text_BLD, pooled, torch.tensor([987.6, 12.3])[:batch]


def run_peer(theirs: nn.Module, given: tuple[Tensor, ...], scale: tuple[float, float, float]) -> Tensor:
    x, text, pooled, time = given
    places = [torch.arange(n // p) for n, p in zip(x.shape[1:4], (1, 2, 2), strict=True)]
    return theirs(x, text, time, pooled, places, torch.arange(text.shape[1]), scale_factor=scale).sample


@pytest.mark.parametrize("shape", SHAPES)
def test_keys_and_shapes(shape):
    ours, theirs = pair(SHAPES[shape][0])
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }


@torch.no_grad()
@pytest.mark.parametrize("exact", [True, False], ids=["exact rotation", "as shipped"])
@pytest.mark.parametrize("shape", SHAPES)
def test_velocity(shape, exact):
    spec, thw, scale = SHAPES[shape]
    ours, theirs = pair(spec, exact)
    given = inputs(spec, thw, 1)
    difference = error(ours(*given, rope_scale=scale), run_peer(theirs, given, scale))
    assert difference <= (EXACT if exact else AS_SHIPPED)


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_padded_text_in_a_batch(shape):
    """diffusers knows no text mask, so each sample is compared with diffusers on its own trimmed text.

    Its modulation broadcasts wrongly over a batch, so it also sees one sample at a time.
    """
    spec, thw, scale = SHAPES[shape]
    ours, theirs = pair(spec)
    given = inputs(spec, thw, 2)
    lengths = (9, 4)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    out = ours(*given, text_mask_BL=mask, rope_scale=scale)
    for i, length in enumerate(lengths):
        x, text, pooled, time = (tensor[i : i + 1] for tensor in given)
        assert error(out[i : i + 1], run_peer(theirs, (x, text[:, :length], pooled, time), scale)) <= EXACT


@torch.no_grad()
def test_comparison_sees_a_wrong_scale():
    spec, thw, scale = SHAPES["pro"]
    ours, theirs = pair(spec)
    given = inputs(spec, thw, 1)
    assert error(ours(*given, rope_scale=(1.0, 2.0, 2.0)), run_peer(theirs, given, scale)) > 100 * EXACT


def test_gradients():
    spec, thw, scale = SHAPES["video"]
    ours, theirs = pair(spec)
    given = inputs(spec, thw, 1)
    ours(*given, rope_scale=scale).square().mean().backward()
    run_peer(theirs, given, scale).square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert error(parameter.grad, expected[name].grad) <= 1e-4, name


@pytest.fixture(scope="module")
def measure() -> ModuleType:
    """The benchmarks' own way of counting."""
    path = Path(__file__).parents[2] / "benchmarks" / "measure.py"
    loading = importlib.util.spec_from_file_location("measure", path)
    module = importlib.util.module_from_spec(loading)
    loading.loader.exec_module(module)
    return module


@torch.no_grad()
def test_peak_live_bytes(measure, monkeypatch):
    """Near half of diffusers' even on a small model; the benchmark has the figure at full width (0.42).

    Bytes are exact, so this is no timing. The byte limits shrink like the model.
    """
    monkeypatch.setattr(attention, "PACKED_KEY_BYTES", attention.PACKED_KEY_BYTES // 16)
    monkeypatch.setattr(layers, "HIDDEN_PIECE_BYTES", layers.HIDDEN_PIECE_BYTES // 16)
    spec = replace(
        VIDEO, model_dim=256, ff_dim=1024, axes_dims=(16, 24, 24), num_text_blocks=1, num_visual_blocks=1
    )
    thw, scale = (2, 32, 32), (1.0, 2.0, 2.0)
    ours, theirs = pair(spec, exact=False)
    given = inputs(spec, thw, 1)
    monkeypatch.setattr(layers, "PIECE_BYTES", layers.PIECE_BYTES // 16)
    live = measure.peak_live_bytes(lambda: ours(*given, rope_scale=scale))
    assert live <= 0.55 * measure.peak_live_bytes(lambda: run_peer(theirs, given, scale))
