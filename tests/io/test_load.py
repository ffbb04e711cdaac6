"""Models from files: the same weights, no second copy, and one readable report when they do not fit."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import CheckpointError, VariantError
from comfyui_kandinsky5.kandinsky_core.io import load as load_module
from comfyui_kandinsky5.kandinsky_core.io import (
    load_crossdit,
    load_vae,
    open_checkpoint,
    save_checkpoint,
    spec_metadata,
)
from comfyui_kandinsky5.kandinsky_core.io.load import SAMPLE, is_finite
from comfyui_kandinsky5.kandinsky_core.vae.flux import FluxVAE
from comfyui_kandinsky5.kandinsky_core.vae.hunyuan import HunyuanVideoVAE
from comfyui_kandinsky5.kandinsky_core.variants import FLUX_VAE, NANO_VAE, NANO_VIDEO, VARIANTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

TINY = replace(
    NANO_VIDEO, model_dim=64, ff_dim=256, time_dim=32, num_visual_blocks=1, in_text_dim=24, in_text_dim2=16
)
LONG = "visual_transformer_blocks.0.feed_forward.in_layer.weight"  # a sample does not see its middle
TINY_ROW = replace(VARIANTS["nano_video"], spec=TINY)
FACTS = spec_metadata(TINY_ROW)
SCALE = {"out_layer.out_layer.scale_weight": torch.tensor(2.0)}


class TorchOps:
    """torch.nn as a host gives it: layers of its own choice, so quantised files are let in."""

    Linear, LayerNorm, RMSNorm = nn.Linear, nn.LayerNorm, nn.RMSNorm


@pytest.fixture
def tiny(weights):
    """Tensors of a tiny transformer, in memory."""
    return weights(TINY)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tiny.safetensors"


def lies_as_in_the_file(model: nn.Module, path: Path) -> bool:
    """Whether parameters are as far apart in memory as in the file: true of one mapping, never of copies."""
    infos = open_checkpoint(path).tensors
    begin = dict(zip(infos, accumulate((info.nbytes for info in infos.values()), initial=0), strict=False))
    return len({tensor.data_ptr() - begin[name] for name, tensor in model.named_parameters()}) == 1


def test_the_model_holds_the_files_tensors(path, tiny):
    save_checkpoint(path, tiny, FACTS)
    model, variant, identity = load_crossdit(path)
    assert variant == TINY_ROW and identity.certain and identity.spec == model.spec == TINY
    state = model.state_dict()
    assert state.keys() == tiny.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in tiny.items())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_the_loaded_model_computes(path, tiny):
    save_checkpoint(path, tiny, FACTS)
    model = load_crossdit(path).model
    out = model(torch.ones(1, 1, 4, 4, 33), torch.ones(1, 3, 24), torch.ones(1, 16), torch.tensor([500.0]))
    assert out.shape == (1, 1, 4, 4, 16) and out.isfinite().all()


def test_weights_are_mapped_not_copied(path, tiny):
    save_checkpoint(path, tiny, FACTS)
    assert lies_as_in_the_file(load_crossdit(path).model, path)
    assert not lies_as_in_the_file(load_crossdit(path, dtype=torch.float16).model, path)


def test_every_dtype_in_the_file_stays(path, tiny):
    mixed = {name: t.bfloat16() if "attention" in name else t for name, t in tiny.items()}
    save_checkpoint(path, mixed, FACTS)
    state = load_crossdit(path).model.state_dict()
    assert {name: t.dtype for name, t in state.items()} == {name: t.dtype for name, t in mixed.items()}


def test_a_dtype_is_taken_when_given(path, tiny):
    save_checkpoint(path, tiny, FACTS)
    model = load_crossdit(path, dtype=torch.float16).model
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float16}


def test_plain_fp8_stays_and_computes_as_its_bf16_values(path, tmp_path, tiny):
    small = {name: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t.bfloat16() for name, t in tiny.items()}
    save_checkpoint(path, small, FACTS)
    wide = tmp_path / "wide.safetensors"
    save_checkpoint(wide, {name: t.bfloat16() for name, t in small.items()}, FACTS)
    model, plain = (load_crossdit(file).model for file in (path, wide))
    assert {name: t.dtype for name, t in model.state_dict().items()} == {name: t.dtype for name, t in small.items()}
    inputs = (torch.ones(1, 1, 4, 4, 33), torch.ones(1, 3, 24), torch.ones(1, 16))
    outputs = [each(*(x.bfloat16() for x in inputs), torch.tensor([500.0])) for each in (model, plain)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("extra", ["scale_weight", "comfy_quant"])
def test_scales_of_weights_that_are_not_fp8_are_refused(path, tiny, extra):
    value = b'{"format": "float8_e4m3fn"}' if extra == "comfy_quant" else b"\0\0\x80?"
    tensor = torch.tensor(list(value), dtype=torch.uint8)
    tensor = tensor if extra == "comfy_quant" else tensor.view(torch.float32)
    save_checkpoint(path, {**tiny, f"out_layer.out_layer.{extra}": tensor}, FACTS)
    with pytest.raises(CheckpointError, match="scales for 1 weights that are not fp8: out_layer.out_layer.weight"):
        load_crossdit(path)


def test_the_hosts_layers_are_used_and_see_its_extra_tensors(path, tiny):
    seen = []

    class ScaledLinear(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *rest):
            if (scale := state_dict.pop(prefix + "scale_weight", None)) is not None:
                seen.append((prefix, scale.item()))
            super()._load_from_state_dict(state_dict, prefix, *rest)

    class Host:
        Linear, LayerNorm, RMSNorm = ScaledLinear, nn.LayerNorm, nn.RMSNorm

    tiny["out_layer.out_layer.weight"] = tiny["out_layer.out_layer.weight"].to(torch.float8_e4m3fn)
    save_checkpoint(path, {**tiny, "out_layer.out_layer.scale_weight": torch.tensor(2.0)}, FACTS)
    model = load_crossdit(path, ops=Host, dtype=torch.bfloat16).model
    assert model.out_layer.out_layer.weight.dtype == torch.float8_e4m3fn
    assert model.out_layer.out_layer.bias.dtype == torch.bfloat16
    assert type(model.out_layer.out_layer) is ScaledLinear
    assert seen == [("out_layer.out_layer.", 2.0)]


def test_a_scale_that_no_layer_takes_is_reported(path, tiny):
    save_checkpoint(path, tiny | SCALE, FACTS)
    with pytest.raises(CheckpointError, match="1 unexpected: out_layer.out_layer.scale_weight"):
        load_crossdit(path, ops=TorchOps)


def test_shapes_without_a_scale_of_their_own_are_compared_in_a_quantised_file(path, tiny):
    wrong = "visual_transformer_blocks.0.cross_attention.to_key.weight"
    tiny |= {wrong: torch.zeros(64, 63), "out_layer.out_layer.weight": torch.zeros(64, 32)}
    save_checkpoint(path, tiny | SCALE, FACTS)
    with pytest.raises(CheckpointError) as caught:
        load_crossdit(path, ops=TorchOps)
    assert f"  1 of another shape: {wrong} [64, 63] instead of [64, 64]\n" in str(caught.value)


def test_a_packed_weight_its_layer_does_not_know_is_reported(path, tiny):
    tiny["out_layer.out_layer.weight"] = torch.zeros(64, 32)
    save_checkpoint(path, tiny | SCALE, FACTS)
    with pytest.raises(
        CheckpointError, match="1 refused by their layers: size mismatch for out_layer.out_layer.weight"
    ):
        load_crossdit(path, ops=TorchOps)


def test_all_differences_stand_in_one_report(path, tiny):
    for name in [name for name in tiny if "text_transformer_blocks.0.feed" in name]:
        del tiny[name]
    tiny["visual_transformer_blocks.0.cross_attention.to_key.weight"] = torch.zeros(64, 63)
    tiny |= {f"visual_transformer_blocks.0.extra_{i}.weight": torch.zeros(1) for i in range(6)}
    save_checkpoint(path, tiny, FACTS)
    with pytest.raises(CheckpointError) as caught:
        load_crossdit(path)
    lines = str(caught.value).splitlines()
    assert str(path) in lines[0]
    assert lines[1].startswith("  2 missing: text_transformer_blocks.0.feed_forward.in_layer.weight, ")
    assert lines[2].startswith("  6 unexpected: ") and lines[2].endswith("2 more")
    assert (
        "1 of another shape: visual_transformer_blocks.0.cross_attention.to_key.weight [64, 63] instead of [64, 64]"
        in lines[3]
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_missing_tensor_is_named(path, tiny, data):
    name = data.draw(st.sampled_from(sorted(tiny)))
    save_checkpoint(path, {key: tensor for key, tensor in tiny.items() if key != name}, FACTS)
    with pytest.raises(CheckpointError) as caught:
        load_crossdit(path)
    assert name in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_broken_numbers_are_found_wherever_they_are(path, tiny, bad, dtype):
    tiny = {key: tensor.to(dtype) for key, tensor in tiny.items()}
    break_middle(tiny[LONG], bad)
    save_checkpoint(path, tiny, FACTS)
    with pytest.raises(CheckpointError, match=f"{LONG} contains NaN or Inf"):
        load_crossdit(path)
    assert not load_crossdit(path, check_finite=False).model.get_parameter(LONG).isfinite().all()


def break_middle(weight: torch.Tensor, bad: float) -> None:
    assert weight.numel() > 3 * SAMPLE
    weight.view(-1)[weight.numel() // 2] = bad


def test_beyond_the_limit_only_a_wish_searches_the_middle(path, tiny, monkeypatch):
    break_middle(tiny[LONG], float("nan"))
    save_checkpoint(path, tiny, FACTS)
    limit = open_checkpoint(path).nbytes
    monkeypatch.setattr(load_module, "FULL_SCAN_BYTES", limit)
    with pytest.raises(CheckpointError, match=f"{LONG} contains NaN or Inf"):
        load_crossdit(path)
    monkeypatch.setattr(load_module, "FULL_SCAN_BYTES", limit - 1)
    assert load_crossdit(path).model.get_parameter(LONG).isnan().any()
    with pytest.raises(CheckpointError, match=f"{LONG} contains NaN or Inf"):
        load_crossdit(path, check_finite=True)


def test_large_files_are_sampled_at_both_ends():
    for position, found in ((0, False), (SAMPLE, True), (-1, False)):
        tensor = torch.zeros(4 * SAMPLE)
        tensor[position] = float("nan")
        assert is_finite(tensor, whole=False) is found
        assert is_finite(tensor, whole=True) is False
    assert not is_finite(torch.tensor([float("nan")]).to(torch.float8_e4m3fn), whole=True)
    assert is_finite(torch.tensor([1, 2]), whole=True) and is_finite(torch.empty(0), whole=True)


def test_a_variant_of_another_family_is_refused_before_weights_are_read(path, tiny):
    tiny["out_layer.out_layer.bias"][:] = float("nan")
    save_checkpoint(path, tiny, FACTS)
    with pytest.raises(VariantError, match="'lite_t2i' is another model"):
        load_crossdit(path, variant="lite_t2i")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "transformer."])
def test_single_files_of_every_habit_load(path, tiny, prefix):
    save_checkpoint(path, {prefix + name: tensor for name, tensor in tiny.items()}, FACTS)
    assert torch.equal(load_crossdit(path).model.out_layer.out_layer.bias, tiny["out_layer.out_layer.bias"])


def test_a_sharded_diffusers_folder_loads(tmp_path, tiny):
    folder = tmp_path / "transformer"
    halves = {
        name: f"diffusion_pytorch_model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(tiny)
    }
    for shard in set(halves.values()):
        save_checkpoint(folder / shard, {name: tiny[name] for name in tiny if halves[name] == shard}, FACTS)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": halves}))
    state = load_crossdit(tmp_path).model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tiny.items())


SMALL_FLUX = replace(FLUX_VAE, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)
SMALL_HUNYUAN = replace(NANO_VAE, block_out_channels=(8, 8, 16, 16))


@pytest.mark.parametrize(("kind", "spec"), [(HunyuanVideoVAE, SMALL_HUNYUAN), (FluxVAE, SMALL_FLUX)])
@pytest.mark.parametrize("layout", ["metadata", "folder", "prefixed"])
def test_an_autoencoder_loads_from_every_place(tmp_path, kind, spec, layout):
    tensors = kind(spec).state_dict()
    facts = {"norm_num_groups": 4, "scaling_factor": 0.5}
    if layout == "folder":
        save_checkpoint(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", tensors)
        (tmp_path / "vae" / "config.json").write_text(json.dumps(facts))
        where = tmp_path
    else:
        where = tmp_path / "vae.safetensors"
        prefix = "first_stage_model." if layout == "prefixed" else ""
        metadata = {"kandinsky5.vae": json.dumps(facts)}
        save_checkpoint(where, {prefix + name: tensor for name, tensor in tensors.items()}, metadata)
    vae, found = load_vae(where)
    assert type(vae) is kind and found == replace(spec, scaling_factor=0.5)
    state = vae.state_dict()
    assert state.keys() == tensors.keys() and all(torch.equal(state[name], tensors[name]) for name in tensors)


def test_attention_kept_as_convolution_is_viewed_without_a_copy(tmp_path):
    path = tmp_path / "vae.safetensors"
    tensors = {
        name: tensor[:, :, None, None] if "attentions" in name and tensor.ndim == 2 else tensor
        for name, tensor in FluxVAE(SMALL_FLUX).state_dict().items()
    }
    save_checkpoint(path, tensors, {"kandinsky5.vae": json.dumps(asdict(SMALL_FLUX))})
    vae, _ = load_vae(path)
    weight = vae.get_parameter("decoder.mid_block.attentions.0.to_q.weight")
    assert weight.shape == (16, 16)
    assert lies_as_in_the_file(vae, path)


def test_an_incomplete_autoencoder_is_reported(tmp_path):
    tensors = FluxVAE(SMALL_FLUX).state_dict()
    del tensors["encoder.conv_out.bias"]
    path = tmp_path / "vae.safetensors"
    save_checkpoint(path, tensors, {"kandinsky5.vae": json.dumps({"norm_num_groups": 4})})
    with pytest.raises(CheckpointError, match="1 missing: encoder.conv_out.bias"):
        load_vae(path)


@pytest.mark.parametrize("metadata", ["{", "[]"])
def test_unreadable_autoencoder_facts_are_named(tmp_path, metadata):
    save_checkpoint(tmp_path / "vae.safetensors", {"decoder.x": torch.ones(1)}, {"kandinsky5.vae": metadata})
    with pytest.raises(CheckpointError, match=r"vae.safetensors: its metadata 'kandinsky5.vae' is not"):
        load_vae(tmp_path / "vae.safetensors")


def test_each_loader_sends_the_others_file_to_its_place(tmp_path, path, tiny):
    save_checkpoint(path, tiny, FACTS)
    with pytest.raises(
        CheckpointError,
        match="It looks like a Kandinsky 5 transformer: it belongs in the Kandinsky 5 Model Loader",
    ):
        load_vae(path)
    save_checkpoint(tmp_path / "vae.safetensors", FluxVAE(SMALL_FLUX).state_dict())
    with pytest.raises(CheckpointError, match="it belongs in the Kandinsky 5 VAE Loader"):
        load_crossdit(tmp_path / "vae.safetensors")
