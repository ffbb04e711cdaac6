"""The block-sparse attention nodes without ComfyUI, on the nano model."""

from __future__ import annotations

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import KandinskyError
from comfyui_kandinsky5.kandinsky_core.sparse.kernels import choice
from comfyui_kandinsky5.nodes import files
from comfyui_kandinsky5.nodes import host as door
from comfyui_kandinsky5.nodes.attention import K5AttentionError, K5Nabla, K5NablaReport
from comfyui_kandinsky5.nodes.host_standalone import StandaloneHost
from comfyui_kandinsky5.nodes.loaders import K5LoadModel
from comfyui_kandinsky5.nodes.sampling import K5Sample
from torch import Tensor

SETTINGS = {
    "attention": "on", "P": 0.6, "wT": 3, "wH": 1, "wW": 1, "kernel": "auto", "dense_first_steps": 0,
    "dense_last_steps": 0, "dense_first_blocks": 0, "dense_last_blocks": 0, "min_tokens": 0,
}  # fmt: skip
SAMPLING = {"seed": 3, "steps": 2, "cfg": 3.0, "shift": 5.0}


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(door, "_current", [])
    door.install(StandaloneHost(device="cpu"))
    return K5LoadModel.execute(files.built_in("model"), "auto", "auto")[0]


@pytest.fixture
def prompts():
    """Random features in place of encoded prompts."""
    generator = torch.Generator().manual_seed(0)

    def prompt(tokens: int) -> list:
        features = torch.randn(1, tokens, 96, generator=generator)
        return [[features, {"pooled_output": torch.randn(1, 64, generator=generator)}]]

    return {"positive": prompt(9), "negative": prompt(2)}


def latent(rows: int = 32, columns: int = 48) -> dict[str, Tensor]:
    return {"samples": torch.zeros(1, 16, 3, rows, columns)}


def sampled(model, prompts, start=None, **changes):
    settings = SAMPLING | {"sampler_name": "euler", "first_frame": "auto", "denoise": 1.0} | changes
    return K5Sample.execute(model, **prompts, latent=start or latent(), **settings)


def nabla(model, **changes):
    return K5Nabla.execute(model, **(SETTINGS | changes))[0]


def difference(one, other) -> float:
    return ((one[0]["samples"] - other[0]["samples"]).norm() / other[0]["samples"].norm()).item()


@pytest.mark.parametrize("size", [(32, 48), (26, 38)], ids=["whole", "ragged"])
def test_all_mass_is_dense_and_less_is_not(model, prompts, size):
    start = latent(*size)
    dense = sampled(model, prompts, start)
    assert difference(sampled(nabla(model, P=1.0), prompts, start), dense) <= 1e-5
    assert difference(sampled(nabla(model), prompts, start), dense) > 1e-3
    assert torch.equal(sampled(model, prompts, start)[0]["samples"], dense[0]["samples"])  # the model is unchanged


@pytest.mark.parametrize("kernel", ["torch", "triton", "spargeattn"])
def test_every_kernel_gives_the_same_clip(model, prompts, kernel):
    """Those that this machine has not make room for one it has."""
    expected = sampled(nabla(model), prompts)
    assert difference(sampled(nabla(model, kernel=kernel), prompts), expected) <= 1e-5


def test_a_kernel_that_breaks_down_half_way_changes_nothing(model, prompts, monkeypatch, caplog):
    expected = sampled(nabla(model), prompts)
    calls = []

    def tired(*given):
        calls.append(1)
        if len(calls) > 5:
            raise torch.OutOfMemoryError("out of memory")
        return choice.blockwise.attend(*given)

    monkeypatch.setitem(choice._KERNELS, "flex", tired)
    patched = nabla(model, kernel="flex")
    assert difference(sampled(patched, prompts), expected) <= 1e-6
    assert len([record for record in caplog.records if "out of memory" in record.getMessage()]) == 1
    assert "flex kernel was left" in K5NablaReport.execute(patched, latent())[0]


def test_report(model, prompts):
    patched = nabla(model, dense_first_steps=1, dense_last_blocks=1)
    before = K5NablaReport.execute(patched, latent())
    assert "not run yet" in before[0] and before[1].shape[0] == 1
    result = sampled(patched, prompts)
    shown = K5NablaReport.execute(patched, result[0])
    text, picture, data = shown[0], shown[1], shown.ui["kandinsky5_nabla"][0]
    assert "1,152 tokens (3 x 16 x 24), 18 blocks" in text and "P 0.6, window 3/1/1" in text
    assert "5 of 8 layers" in text and "torch (6 calls)" in text
    assert text.splitlines()[0] in result[1]  # the sampler says it, too
    assert data["kept"][0] == [None] * 4 and data["kept"][1][3] is None
    assert all(0 < share < 1 for share in data["kept"][1][:3])
    assert data["flops_saved"] > 0 and data["tokens"] == 1152
    assert picture.ndim == 4 and 0 <= picture.min() < picture.max() <= 1
    again = sampled(patched, prompts, seed=4)
    assert K5NablaReport.execute(patched, again[0]).ui["kandinsky5_nabla"][0]["kernels"] == {"torch": 6}


def test_saved_arithmetic_is_the_part_left_out(model, prompts):
    patched = nabla(model)
    sampled(patched, prompts)
    record = door.host().attention_of(patched).record
    whole = 2 * 2 * 4 * (4 * 1152**2 * 128)  # steps, passes, layers; two products of tokens x tokens x width
    assert record.flops_saved == pytest.approx(whole * (1 - record.mean_kept))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention": "off"}, "switched off"),
        ({"attention": "auto"}, "trained with full attention"),
        ({"min_tokens": 5000}, "below min_tokens"),
        ({"dense_first_steps": 9}, "set to be dense"),
    ],
    ids=str,
)
def test_dense_runs_say_why(model, prompts, changes, reason):
    patched = nabla(model, **changes)
    assert difference(sampled(patched, prompts), sampled(model, prompts)) == 0
    assert reason in K5NablaReport.execute(patched, latent())[0]


def test_the_weights_are_loaded_once(model, prompts):
    sampled(model, prompts)
    resident = door.host()._resident
    sampled(nabla(model), prompts)
    assert door.host()._resident is resident


def test_wrong_models(model):
    with pytest.raises(KandinskyError, match="not a Kandinsky 5"):
        nabla("something else")
    with pytest.raises(KandinskyError, match="NABLA Attention"):
        K5NablaReport.execute(model, latent())


def test_attention_error(model, prompts):
    given = {**prompts, **SAMPLING, "wT": 1, "wH": 1, "wW": 1}
    output = K5AttentionError.execute(model, latent=latent(), P_values="1, 0.8, 0.3", **given)
    _, header, *rows = output[0].splitlines()
    assert header.split()[:3] == ["P", "kept", "latent"]
    figures = [[float(word.rstrip("%")) for word in row.split()] for row in rows]
    assert [row[0] for row in figures] == [1.0, 0.8, 0.3]
    assert figures[0][1] == 100 and max(figures[0][2:]) < 1e-4
    for column in range(2, len(figures[0])):  # less kept, larger errors, in the latent and in every layer
        assert figures[0][column] < figures[1][column] < figures[2][column] < 2
    assert len(figures[0]) == 3 + 4
    assert difference((output[1],), sampled(model, prompts)) <= 1e-5


def test_errors_are_those_of_the_attention_itself():
    """One layer's figure is the error of that layer's output on the same queries, keys and values."""
    from comfyui_kandinsky5.kandinsky_core.sparse.error import Measurement
    from comfyui_kandinsky5.kandinsky_core.sparse.nabla import Nabla, NablaSettings

    run = Nabla(NablaSettings(mode="on", mass=0.5, window_thw=(1, 1, 1), min_tok=0), None)
    measurement = Measurement([run])
    measurement.begin((1.0, 0.0))
    forward = measurement.forward((3, 16, 24), 1, 1.0, torch.device("cpu"))
    q, k, v = torch.randn(3, 1, 2, 1152, 32, generator=torch.Generator().manual_seed(0))
    dense = torch.nn.functional.scaled_dot_product_attention
    assert torch.equal(forward.attend(q, k, v, block=0, dense=dense), dense(q, k, v))
    alone = run.forward((3, 16, 24), 1, 1.0, torch.device("cpu")).attend(q, k, v, block=0, dense=dense)
    expected = ((alone - dense(q, k, v)).norm() / dense(q, k, v).norm()).item()
    assert measurement.errors(0)[0, 0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("text", ["", "much", "0.9, 1.2", "-1"])
def test_wrong_shares_are_refused_before_anything_runs(text):
    assert "P_values" in str(K5AttentionError.validate_inputs(text))
