"""Operations and parameters against the published table and against what PyTorch counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core import cost
from comfyui_kandinsky5.kandinsky_core.model import CrossDiT
from comfyui_kandinsky5.kandinsky_core.shapes import VideoShape
from comfyui_kandinsky5.kandinsky_core.vae.flux import FluxVAE
from comfyui_kandinsky5.kandinsky_core.vae.hunyuan import HunyuanVideoVAE
from comfyui_kandinsky5.kandinsky_core.variants import (
    FLUX_VAE,
    HUNYUAN_VAE,
    IMAGE_T2I,
    NANO_EDIT,
    NANO_IMAGE_VAE,
    NANO_TEXT,
    NANO_VAE,
    NANO_VIDEO,
    QWEN_VL_7B,
    VIDEO_LITE,
    VIDEO_PRO,
)
from torch.utils.flop_counter import FlopCounterMode

# performance reference §1.1: tokens and 10^12 operations of self-attention, cross-attention, linears, feed-forward,
# text blocks and in all, with the digits given there.
TABLE = {
    "lite 5 s": (VIDEO_LITE, (768, 512, 121), 47_616, (520.1, 2.80, 58.8, 78.3, 0.04, 660)),
    "lite 10 s": (VIDEO_LITE, (768, 512, 241), 93_696, (2_013.7, 5.50, 115.6, 154.1, 0.04, 2_289)),
    "pro 5 s": (VIDEO_PRO, (768, 512, 121), 47_616, (2_228.8, 11.98, 576.2, 766.9, 0.42, 3_584)),
    "pro 10 s": (VIDEO_PRO, (768, 512, 241), 93_696, (8_630.0, 23.58, 1_132.8, 1_509.1, 0.42, 11_296)),
    "pro 5 s HD": (VIDEO_PRO, (1280, 768, 121), 119_040, (13_930, 29.96, 1_439, 1_917, 0.42, 17_317)),
    "pro 10 s HD": (VIDEO_PRO, (1280, 768, 241), 234_240, (53_938, 58.95, 2_831, 3_773, 0.42, 60_601)),
    "image": (IMAGE_T2I, (1024, 1024, 1), 4_096, (8.6, 1.07, 16.8, 21.5, 0.17, 48.1)),
}


def digits(value: float) -> int:
    return len(str(value).partition(".")[2]) if isinstance(value, float) else 0


@pytest.mark.parametrize("name", TABLE)
def test_forward_has_the_operations_of_the_table(name):
    spec, (width, height, frames), tokens, row = TABLE[name]
    assert VideoShape(width_px=width, height_px=height, frames=frames).tokens == tokens
    found = cost.forward_flops(spec, tokens, 512 if spec is IMAGE_T2I else 256)
    parts = (
        found.self_attention, found.cross_attention, found.projections, found.feed_forward, found.text, found.total,
    )  # fmt: skip
    # One unit of the last digit: the table's sums are of rounded parts.
    for part, wanted in zip(parts, row, strict=True):
        assert part / 1e12 == pytest.approx(wanted, abs=10.0 ** -digits(wanted))


@pytest.mark.parametrize("spec", [VIDEO_LITE, IMAGE_T2I, VIDEO_PRO, NANO_VIDEO, NANO_EDIT])
def test_parameters_are_those_of_the_model(spec):
    model = CrossDiT(spec, device="meta")
    block = model.visual_transformer_blocks[0]
    found = cost.parameters(spec)
    assert found.total == count(model)
    assert found.modulation == count(block.visual_modulation)
    assert found.block == count(block) - found.modulation
    text = model.text_transformer_blocks[0]
    assert found.text_modulation == count(text.text_modulation)
    assert found.text_block == count(text) - found.text_modulation


@pytest.mark.parametrize("spec", [HUNYUAN_VAE, FLUX_VAE, NANO_VAE, NANO_IMAGE_VAE])
def test_autoencoder_parameters_are_those_of_the_model(spec):
    vae = (HunyuanVideoVAE if spec.kind == "hunyuan" else FluxVAE)(spec, device="meta")
    found = [cost.autoencoder_parameters(spec, is_decoder=is_decoder) for is_decoder in (True, False)]
    assert sum(found) == count(vae)
    assert found[0] == sum(
        value.numel() for name, value in vae.named_parameters() if name.startswith(("decoder", "post"))
    )


def test_text_towers_have_the_known_numbers_of_parameters():
    """7.6 billion in all, as published, 0.68 of them for pictures; CLIP ViT-L/14's text tower has 123 million."""
    qwen = QWEN_VL_7B.qwen
    text = qwen.layers * cost.tower_layer_parameters(qwen) + qwen.vocabulary * qwen.width + qwen.width
    assert text == 7_070_619_136 and cost.vision_parameters(QWEN_VL_7B) == 676_550_144
    assert cost.clip_parameters(QWEN_VL_7B.clip) == 123_060_480


def test_nano_text_towers_have_the_parameters_of_the_shipped_files():
    qwen = NANO_TEXT.qwen
    assert qwen.layers * cost.tower_layer_parameters(qwen) + (qwen.vocabulary + 1) * qwen.width == 329_376 - 87_744
    assert cost.vision_parameters(NANO_TEXT) == 87_744
    assert cost.clip_parameters(NANO_TEXT.clip) == 104_128


def test_two_prompts_cost_ten_teraflops():
    assert 2 * cost.text_flops(QWEN_VL_7B, 385).total / 1e12 == pytest.approx(10, abs=0.5)


@pytest.mark.parametrize("spec", [replace(VIDEO_LITE, num_visual_blocks=1), NANO_VIDEO])
def test_forward_has_the_operations_that_pytorch_counts(spec):
    model = CrossDiT(spec, device="meta", dtype=torch.bfloat16)
    x = torch.zeros(1, 5, 64, 64, spec.visual_embed_dim, device="meta", dtype=torch.bfloat16)
    text = torch.zeros(1, 256, spec.in_text_dim, device="meta", dtype=torch.bfloat16)
    pooled = torch.zeros(1, spec.in_text_dim2, device="meta", dtype=torch.bfloat16)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x, text, pooled, torch.zeros(1, device="meta"))
    wanted = counter.get_total_flops()
    assert cost.forward_flops(spec, 5 * 32 * 32, 256).total == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize(
    ("spec", "frames"),
    [(NANO_VAE, 1), (NANO_VAE, 5), (HUNYUAN_VAE, 1), (HUNYUAN_VAE, 5), (NANO_IMAGE_VAE, 1), (FLUX_VAE, 1)],
)
def test_autoencoders_have_the_operations_that_pytorch_counts(spec, frames):
    is_video = spec.kind == "hunyuan"
    vae = (HunyuanVideoVAE if is_video else FluxVAE)(spec, device="meta")
    z = torch.zeros(1, 16, frames, 16, 24, device="meta")
    pixels = torch.zeros(1, 3, 4 * (frames - 1) + 1, 128, 192, device="meta")
    for run, found in (
        (lambda: vae.decode(z if is_video else z[:, :, 0]), cost.decode_flops(spec, (frames, 16, 24))),
        (lambda: vae.encode(pixels if is_video else pixels[:, :, 0]), cost.encode_flops(spec, (frames, 16, 24))),
    ):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        assert found.total == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((768, 512, 121), 805), ((768, 512, 241), 1598), ((1280, 768, 121), 2012), ((1280, 768, 241), 3996)],
)
def test_decode_has_the_convolutions_of_the_table(size, wanted):
    """Performance reference §1.4, column "ideal"."""
    shape = VideoShape(width_px=size[0], height_px=size[1], frames=size[2])
    found = cost.decode_flops(HUNYUAN_VAE, shape.latent_thw).convolution
    assert found / 1e12 == pytest.approx(wanted, rel=1e-3)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
