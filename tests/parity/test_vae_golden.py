"""HunyuanVideo autoencoder against tensors of the released code (tiny weights), and mistakes it must notice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from comfyui_kandinsky5.kandinsky_core.vae import blocks, hunyuan, tiling
from comfyui_kandinsky5.kandinsky_core.variants import VAESpec
from safetensors import safe_open

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-5  # max|a-b| / max|b|
ENCODE = ("enc.img", "enc.vid9", "enc.vid17", "enc.vid25", "enc.vid121", "enc.img_tiled", "enc.vid25_tiled")
DECODE = ("dec.img", "dec.vid3", "dec.vid5", "dec.vid7", "dec.vid31", "dec.img_tiled", "dec.vid7_tiled")


def meta(name: str) -> dict:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["meta"])


CASES = meta("vae_hunyuan")["cases"]


@pytest.fixture
def vae(golden) -> hunyuan.HunyuanVideoVAE:
    config = meta("vae_hunyuan_weights")
    spec = VAESpec(
        kind="hunyuan",
        scaling_factor=config["scaling_factor"],
        block_out_channels=tuple(config["block_out_channels"]),
        layers_per_block=config["layers_per_block"],
        norm_num_groups=config["norm_num_groups"],
    )
    vae = hunyuan.HunyuanVideoVAE(spec)
    vae.load_state_dict({name: tensor.float() for name, tensor in golden("vae_hunyuan_weights").items()})
    return vae.requires_grad_(False)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def plan_of(case: str) -> tiling.Plan | None:
    """The tiles the released code chose; None where it took whole frames, which is the default plan."""
    shape, tile = CASES[case]["shape"], tuple(CASES[case]["tile"][2:])
    scale = 8 if case in ENCODE else 1
    rows, columns = shape[3] // scale, shape[4] // scale
    if tile == (8 * rows, 8 * columns):
        return None
    frames = (shape[2] - 1) // 4 + 1 if case in ENCODE else shape[2]
    return tiling.window_plan(frames, rows, columns, tile_px=tile)


def encode_error(vae: hunyuan.HunyuanVideoVAE, golden, case: str) -> float:
    tensors = golden("vae_hunyuan")
    moments = vae.encode(tensors[f"{case}.in"].float(), plan=plan_of(case))
    mean, logvar = tensors[f"{case}.moments"].chunk(2, dim=1)
    return max(error(moments.mean, mean), error(moments.logvar, logvar.clamp(-30, 20)))


def decode_error(vae: hunyuan.HunyuanVideoVAE, golden, case: str) -> float:
    tensors = golden("vae_hunyuan")
    return error(vae.decode(tensors[f"{case}.in"].float(), plan=plan_of(case)), tensors[f"{case}.out"])


@pytest.mark.parametrize("case", ENCODE)
def test_encode_equals_released_code(vae, golden, case):
    assert encode_error(vae, golden, case) <= TOLERANCE


@pytest.mark.parametrize("case", DECODE)
def test_decode_equals_released_code(vae, golden, case):
    assert decode_error(vae, golden, case) <= TOLERANCE


def test_tile_sizes_equal_released_choice(golden):
    for height, width, free_gib, _, _, *tile in golden("vae_hunyuan")["tile_plan"][:, :7].tolist():
        assert tiling.released_tile_px(height, width, free_gib * 2**30) == tuple(tile)


def test_tiles_cover_what_released_code_loses(golden):
    for height, width, _, _, _, tile_height, tile_width, *_, covered_height, covered_width in golden(
        "vae_hunyuan"
    )["tile_plan"].tolist():
        for side, tile, covered in (
            (height, tile_height, covered_height),
            (width, tile_width, covered_width),
        ):
            spans = tiling.tile_spans(side // 8, tile)
            assert spans[-1].stop * 8 == side
            if covered == side:
                starts = list(range(0, side - tile + 1, tile - 32))
                assert [span.start * 8 for span in spans] == starts


def zero_padding(monkeypatch, vae):
    pad = F.pad
    monkeypatch.setattr(F, "pad", lambda x, sides, mode: pad(x, sides))


def centred_time_padding(monkeypatch, vae):
    pad = F.pad

    def centred(x, sides, mode):
        return pad(x, (*sides[:4], *((1, 1) if sides[4:] else ())), mode=mode)

    monkeypatch.setattr(F, "pad", centred)


def uncausal_attention(monkeypatch, vae):
    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)
        out = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out[0](out).squeeze(1).transpose(1, 2).reshape(x.shape)

    monkeypatch.setattr(blocks.FrameCausalAttention, "forward", forward)


def wrong_eps(monkeypatch, vae):
    for module in vae.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.eps = 1e-3


def per_frame_norm(monkeypatch, vae):
    norm = torch.nn.GroupNorm.forward

    def forward(self, x):
        return torch.stack([norm(self, x[:, :, t].contiguous()) for t in range(x.shape[2])], 2)

    monkeypatch.setattr(torch.nn.GroupNorm, "forward", forward)


def doubled_first_frame(monkeypatch, vae):
    def forward(self, x):
        up = F.interpolate(x, scale_factor=tuple(map(float, self.factors)))
        return self.conv(up[:, :, : up.shape[2] + 1 - self.factors[0]])

    monkeypatch.setattr(hunyuan.Upsampler, "forward", forward)


def time_first(monkeypatch, vae):
    for block in vae.decoder.up_blocks[:3]:
        block.upsamplers[0].factors = (2, 2, 2)
    vae.decoder.up_blocks[2].upsamplers[0].factors = (1, 2, 2)


def last_tap_only(monkeypatch, vae):
    def one_frame(self, x):
        return F.conv2d(x, self.conv.weight[:, :, -1], self.conv.bias, self.conv.stride[1:])

    monkeypatch.setattr(hunyuan.CausalConv3d, "one_frame", one_frame)


def swapped_query_and_value(monkeypatch, vae):
    for half in (vae.encoder, vae.decoder):
        attention = half.mid_block.attentions[0]
        attention.to_q, attention.to_v = attention.to_v, attention.to_q


def no_post_quant(monkeypatch, vae):
    vae.quant_conv = vae.post_quant_conv = torch.nn.Identity()


def shifted_fade(monkeypatch, vae):
    def fade(before, after, extent, dim):
        if extent:
            head = after.narrow(dim, 0, extent)
            tail = before.narrow(dim, before.shape[dim] - extent, extent)
            shape = [1] * after.ndim
            shape[dim] = extent
            head.copy_(torch.lerp(tail, head, (torch.arange(1, extent + 1) / extent).view(shape)))

    monkeypatch.setattr(tiling, "fade", fade)


def no_windows(monkeypatch, vae):
    monkeypatch.setattr(tiling, "WINDOW", 7)


MISTAKES = [
    (zero_padding, "enc.vid9", "dec.vid3"),
    (centred_time_padding, "enc.vid9", "dec.vid3"),
    (uncausal_attention, "enc.vid9", "dec.vid3"),
    (wrong_eps, "enc.vid9", "dec.vid3"),
    (per_frame_norm, "enc.vid9", "dec.vid3"),
    (doubled_first_frame, None, "dec.vid3"),
    (time_first, None, "dec.vid3"),
    (last_tap_only, "enc.img", "dec.img"),
    (swapped_query_and_value, "enc.vid9", "dec.vid3"),
    (no_post_quant, "enc.img", "dec.img"),
    (shifted_fade, "enc.vid25", "dec.vid7"),
    (shifted_fade, "enc.img_tiled", "dec.img_tiled"),
    (no_windows, "enc.vid25", "dec.vid7"),
]


@pytest.mark.parametrize(
    ("mistake", "encode", "decode"), MISTAKES, ids=[f"{m[0].__name__}-{m[2]}" for m in MISTAKES]
)
def test_mistakes_are_noticed(monkeypatch, vae, golden, mistake, encode, decode):
    mistake(monkeypatch, vae)
    assert encode is None or encode_error(vae, golden, encode) > 10 * TOLERANCE
    assert decode_error(vae, golden, decode) > 10 * TOLERANCE
