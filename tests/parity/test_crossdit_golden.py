"""CrossDiT against the reference tensors; and every planted mistake is caught by the same comparison."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from comfyui_kandinsky5.kandinsky_core.model import CrossDiT, attention, crossdit, layers, rope
from comfyui_kandinsky5.kandinsky_core.variants import CrossDiTSpec
from torch import Tensor, nn

SPEC = CrossDiTSpec(
    model_dim=64, ff_dim=128, time_dim=32, num_text_blocks=2, num_visual_blocks=3,
    axes_dims=(8, 12, 12), in_text_dim=32, in_text_dim2=16, visual_cond=True,
)  # fmt: skip
CASES = ("T1_s111_mask", "T1_s122_nomask", "T5_s111_nomask", "T5_s122_mask", "T5_s1316_mask")
TOLERANCE = 1e-5
# Exponentials of processors differ in the last bit of a frequency, and a position multiplies it.
LAST_BIT = 2**-23
BFLOAT16_YARDSTICK = 1e-2
CAUGHT = 100 * TOLERANCE  # a planted mistake must be at least this wrong


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value."""
    return ((got.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


@pytest.fixture
def model(golden) -> CrossDiT:
    made = CrossDiT(SPEC)
    made.load_state_dict({key: value.float() for key, value in golden("dit_video_lite_weights").items()})
    return made.eval()


@pytest.fixture
def case(golden) -> Callable[..., Tensor]:
    """Run a model on the inputs of one golden case; keywords replace inputs."""

    def run(model: CrossDiT, name: str, dtype: torch.dtype = torch.float32, **replaced) -> Tensor:
        tensors = golden("dit_video_lite")
        given = {key: tensors[f"{name}.in.{key}"] for key in ("x", "text", "pooled", "time", "scale_factor")}
        given = given | {"mask": tensors.get(f"{name}.in.mask")} | replaced
        return model(
            given["x"][None].to(dtype),
            given["text"].to(dtype),
            given["pooled"].to(dtype),
            given["time"],
            text_mask_BL=given["mask"],
            rope_scale=tuple(given["scale_factor"].tolist()),
        )[0]

    return run


@pytest.mark.parametrize("recording", [False, True], ids=["inference", "autograd"])
@pytest.mark.parametrize("name", CASES)
def test_velocity(model, case, golden, name, recording):
    with torch.set_grad_enabled(recording):
        out = case(model, name)
    assert error(out, golden("dit_video_lite")[f"{name}.out"]) <= TOLERANCE


@pytest.mark.parametrize("tokens", [1, 7])
def test_velocity_in_pieces(model, case, golden, monkeypatch, tokens):
    """The memory-lean path, which small inputs do not take by themselves, changes nothing."""
    monkeypatch.setattr(layers, "PIECE_BYTES", tokens * 4 * SPEC.model_dim)
    monkeypatch.setattr(layers, "HIDDEN_PIECE_BYTES", 4096)
    monkeypatch.setattr(attention, "PACKED_KEY_BYTES", 4096)
    with torch.no_grad():
        out = case(model, "T5_s1316_mask")
    assert error(out, golden("dit_video_lite")["T5_s1316_mask.out"]) <= TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_bfloat16(golden, case, name):
    model = CrossDiT(SPEC, dtype=torch.bfloat16).eval()
    model.load_state_dict(golden("dit_video_lite_weights"))
    with torch.no_grad():
        out = case(model, name, torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert error(out, golden("dit_video_lite")[f"{name}.out"]) <= BFLOAT16_YARDSTICK
    assert error(out, golden("dit_video_lite")[f"{name}.out_bf16emu"]) <= BFLOAT16_YARDSTICK


def eps_weights(model: CrossDiT) -> None:
    """Shrink what feeds the norms by 256, so that their epsilons count, as the golden `eps` case does."""
    fed = r"visual_embeddings\.in_layer|text_embeddings\.norm|to_(query|key)\.|(attention|feed_forward)\.out_layer"
    for name, parameter in model.named_parameters():
        if re.search(fed, name) and not name.startswith("pooled"):
            parameter.data *= 2**-8


@pytest.mark.parametrize("layer_eps", [layers.NORM_EPS, 1e-6])
@pytest.mark.parametrize("rms_eps", [layers.RMS_EPS, 1e-6, 1e-5])
def test_norm_epsilons(model, case, golden, monkeypatch, layer_eps, rms_eps):
    """The right pair of epsilons gives the reference, every other pair is caught."""
    eps_weights(model)
    monkeypatch.setattr(layers, "NORM_EPS", layer_eps)
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.eps = rms_eps
    difference = error(case(model, "T5_s122_mask"), golden("dit_video_lite")["eps.out"])
    if (layer_eps, rms_eps) == (1e-5, 1.1920929e-07):
        assert difference <= TOLERANCE
    else:
        assert difference > 5 * TOLERANCE


def test_activations(model, case, golden):
    """Every recorded intermediate, block by block."""
    prefix = "T5_s122_mask.act."
    expected = {key.removeprefix(prefix): t for key, t in golden("dit_video_lite").items() if prefix in key}
    got = {}
    for name in expected:
        # Attention is called in two steps; its result is what its last linear gives.
        path = f"{name}.out_layer" if name.endswith("attention") else name
        module = model.get_submodule(path)
        module.register_forward_hook(lambda _, __, out, name=name: got.update({name: out}))
    case(model, "T5_s122_mask")
    assert len(expected) > 15
    for name, tensor in expected.items():
        assert error(got[name].view_as(tensor), tensor) <= TOLERANCE, name


@pytest.mark.parametrize("axes", [(8, 12, 12), (16, 24, 24), (32, 48, 48)], ids=str)
@pytest.mark.parametrize("scale", [(1.0, 1.0, 1.0), (1.0, 2.0, 2.0), (1.0, 3.16, 3.16)], ids=str)
def test_visual_rope_table(golden, axes, scale):
    t, h, w = torch.tensor([0, 60]), torch.tensor([0, 31, 63]), torch.tensor([1, 47, 87])
    table = rope.rope_3d((61, 64, 88), axes, scale).view(61, 64, 88, -1, 2)[t][:, h][:, :, w]
    name = f"rope3d.{'_'.join(map(str, axes))}.s{''.join(f'{s:g}'.replace('.', '') for s in scale)}"
    name = name.replace("s1316316", "s1316")
    for part, got in zip(("cos", "sin"), table.unbind(-1), strict=True):
        expected = golden("misc")[f"{name}.{part}"]
        assert (got.flatten() - expected.flatten()).abs().max() <= 87 * LAST_BIT


def test_text_rope_table_and_frequencies(golden):
    table = rope.rope_1d(1024, 64)[[0, 1, 255, 511, 1023]]
    for part, got in zip(("cos", "sin"), table.unbind(-1), strict=True):
        assert (got.flatten() - golden("misc")[f"rope1d.64.{part}"].flatten()).abs().max() <= 1023 * LAST_BIT
    assert torch.allclose(rope.frequencies(32), golden("misc")["time_freqs.64"], rtol=1e-6, atol=0)


def test_patches():
    """Token order is frame, row, column, channel going in; channel, row, column coming out."""
    embed = layers.VisualEmbeddings(3, 12, (1, 2, 2), nn)
    embed.in_layer = nn.Identity()
    rows, columns, channels = torch.meshgrid(*(torch.arange(n) for n in (2, 2, 3)), indexing="ij")
    patch = ((2 * rows + columns) * 3 + channels).float()
    assert embed(patch[None, None]).flatten().tolist() == list(range(12))
    unpatch = layers.OutLayer(12, 8, 3, (1, 2, 2), nn)
    nn.init.zeros_(unpatch.out_layer.weight)
    unpatch.out_layer.bias.data = torch.arange(12.0)
    out = unpatch(torch.randn(1, 1, 12), torch.randn(1, 8), (1, 1, 1))
    assert torch.equal(out[0, 0], (4 * channels + 2 * rows + columns).float())


# --- planted mistakes -------------------------------------------------------------------------------------------

NORMAL_ROPE = rope.rope_3d


def _turned_back(x: Tensor, table: Tensor) -> Tensor:
    return rope.rotate(x, table * torch.tensor([1.0, -1.0]))


def _split_halves(x: Tensor, table: Tensor) -> Tensor:
    pairs = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return rope.rotate(pairs, table).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def _swapped(first: int, second: int) -> Callable[[layers.Modulation, Tensor], Tensor]:
    """Modulation with two of its vectors exchanged."""

    def forward(self: layers.Modulation, time: Tensor) -> Tensor:
        parts = list(self.out_layer(F.silu(time)).split(SPEC.model_dim, dim=-1))
        if max(first, second) < len(parts):
            parts[first], parts[second] = parts[second], parts[first]
        return torch.cat(parts, dim=-1)

    return forward


def _sine_first(self: layers.TimeEmbeddings, time: Tensor) -> Tensor:
    angles = torch.outer(time, rope.frequencies(self.half))
    wave = torch.cat((angles.sin(), angles.cos()), dim=-1)
    return self.out_layer(F.silu(self.in_layer(wave)))


def _columns_first(self: layers.VisualEmbeddings, x: Tensor) -> Tensor:
    x = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return self.in_layer(x.permute(0, 1, 2, 4, 5, 3, 6).flatten(4))


MISTAKES = {
    "rotation reversed": [(attention, "rotate", _turned_back)],
    "rotation of halves": [(attention, "rotate", _split_halves)],
    "rotation scale ignored": [(crossdit, "rope_3d", lambda thw, axes, *_: NORMAL_ROPE(thw, axes))],
    "rotation scale multiplied": [
        (crossdit, "rope_3d", lambda thw, axes, s, _: NORMAL_ROPE(thw, axes, tuple(1 / i for i in s)))
    ],
    "no rotation": [(attention, "rotate", lambda x, _: x)],
    "shift and scale swapped": [(layers.Modulation, "forward", _swapped(0, 1))],
    "scale and gate swapped": [(layers.Modulation, "forward", _swapped(1, 2))],
    "cross and feed-forward gates swapped": [(layers.Modulation, "forward", _swapped(5, 8))],
    "sine before cosine": [(layers.TimeEmbeddings, "forward", _sine_first)],
    "patch columns first": [(layers.VisualEmbeddings, "forward", _columns_first)],
    "mask ignored": [(crossdit, "masked", lambda _: attention.dense)],
    "keys not normalised": [(attention, "rms_norm_float32", lambda _, x: x)],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistake_is_caught(model, case, golden, monkeypatch, mistake):
    for owner, name, wrong in MISTAKES[mistake]:
        monkeypatch.setattr(owner, name, wrong)
    assert error(case(model, "T5_s122_mask"), golden("dit_video_lite")["T5_s122_mask.out"]) > CAUGHT


def test_tanh_gelu_is_caught(model, case, golden, monkeypatch):
    """The smallest of all mistakes: 9e-5."""
    monkeypatch.setattr(F, "gelu", partial(F.gelu, approximate="tanh"))
    assert error(case(model, "T5_s122_mask"), golden("dit_video_lite")["T5_s122_mask.out"]) > 5 * TOLERANCE


def test_ignored_mask_gives_the_recorded_wrong_answer(model, case, golden):
    """The wrong answer is known too: padding seen by attention."""
    out = case(model, "T5_s122_mask", mask=None)
    assert error(out, golden("dit_video_lite")["T5_s122_mask.out_padding_unmasked"]) <= TOLERANCE


def test_rounded_time_is_caught(model, case, golden):
    """A time rounded to bfloat16, as a host's blanket cast would do."""
    time = golden("dit_video_lite")["T5_s122_mask.in.time"]
    rounded = case(model, "T5_s122_mask", time=(time + 0.7).bfloat16().float())
    assert error(rounded, golden("dit_video_lite")["T5_s122_mask.out"]) > 10 * TOLERANCE
