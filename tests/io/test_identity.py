"""What a weights file is: from shapes and metadata, from its name as a hint, or not ours at all."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import CheckpointError, VariantError
from comfyui_kandinsky5.kandinsky_core.io import identify, open_checkpoint, spec_metadata
from comfyui_kandinsky5.kandinsky_core.io.signature import SIGNATURES, recognise
from comfyui_kandinsky5.kandinsky_core.variants import (
    IMAGE_EDIT,
    IMAGE_T2I,
    NANO_VIDEO,
    VARIANTS,
    VIDEO_LITE,
    VIDEO_PRO,
)

FAMILIES = {row.family: row.spec for row in VARIANTS.values()}
PUBLISHED = sorted({(file, row.family) for row in VARIANTS.values() for file in row.files})


@pytest.fixture(scope="session")
def family_file(tmp_path_factory, shapes, write_header):
    """A file with one family's real header and no data: `family_file(family, name)`."""
    folder = tmp_path_factory.mktemp("families")

    def make(family: str, name: str):
        path = folder / name
        return path if path.exists() else write_header(path, shapes(FAMILIES[family]))

    return make


@pytest.mark.parametrize(("family", "spec"), FAMILIES.items())
def test_the_specification_comes_from_the_shapes(family_file, family, spec):
    checkpoint = open_checkpoint(family_file(family, f"{family}_x.safetensors"))
    identity = identify(checkpoint)
    assert identity.spec == spec and identity.variant.family == family
    assert set(identity.candidates) == {row.name for row in VARIANTS.values() if row.family == family}


@pytest.mark.parametrize(("file", "family"), PUBLISHED)
def test_every_published_name_is_understood(family_file, file, family):
    identity = identify(open_checkpoint(family_file(family, file)))
    sharing = [row.name for row in VARIANTS.values() if file in row.files]
    assert identity.variant.name == sharing[0]
    assert identity.certain == (len(identity.candidates) == 1)
    assert file in identity.hint or identity.certain
    assert all(name in identity.hint for name in identity.candidates)


@pytest.mark.parametrize(
    ("family", "name", "variant"),
    [
        ("lite_video", "my_K5_lite_T2V_no-cfg_10sec_bf16", "lite_t2v_10s_nocfg"),
        ("lite_video", "k5-lite-distilled-10s-fp8", "lite_t2v_10s_distilled16"),
        ("lite_video", "kandinsky5lite_16steps", "lite_t2v_5s_distilled16"),
        ("lite_video", "Kandinsky-5.0-I2V-Lite-5s", "lite_i2v_5s"),
        ("lite_video", "kandinsky5_i2v_10s_custom", "lite_i2v_5s"),
        ("lite_video", "kandinsky5lite_pretrain", "lite_t2v_5s_pretrain"),
        ("pro_video", "k5pro_image-to-video_HD", "pro_i2v_5s_hd"),
        ("pro_video", "kandinsky5pro_t2v_10s_hd", "pro_t2v_10s_hd"),
        ("lite_t2i", "k5_t2i_pretrain", "lite_t2i_pretrain"),
        ("lite_i2i", "k5_edit_pretrained", "lite_i2i_pretrain"),
    ],
)
def test_other_names_hint_too(family_file, family, name, variant):
    identity = identify(open_checkpoint(family_file(family, f"{name}.safetensors")))
    assert identity.variant.name == variant and not identity.certain and name in identity.hint


def test_a_name_that_says_nothing_is_admitted(family_file):
    identity = identify(open_checkpoint(family_file("lite_video", "weights.safetensors")))
    assert identity.variant.name == "lite_t2v_5s_sft" and not identity.certain
    assert "says nothing" in identity.hint


def test_a_name_that_contradicts_the_weights_loses(family_file):
    """Editing weights under a video name stay editing weights."""
    identity = identify(
        open_checkpoint(family_file("lite_i2i", "kandinsky5lite_t2v_sft_5s_copy.safetensors"))
    )
    assert identity.variant.family == "lite_i2i" and identity.spec.instruct_type == "channel"
    assert not identity.spec.visual_cond


def test_a_choice_is_taken_within_the_family_and_refused_across(family_file):
    checkpoint = open_checkpoint(family_file("lite_video", "kandinsky5lite_t2v_sft_5s.safetensors"))
    identity = identify(checkpoint, "lite_i2v_5s")
    assert identity.variant.name == "lite_i2v_5s" and identity.certain
    with pytest.raises(VariantError, match="'pro_t2v_5s_hd' is another model. Possible: lite_t2v_5s_sft"):
        identify(checkpoint, "pro_t2v_5s_hd")
    with pytest.raises(VariantError, match="Unknown variant 'sora'"):
        identify(checkpoint, "sora")


def test_metadata_decides_over_the_name(tmp_path, shapes, write_header):
    row = VARIANTS["lite_t2v_10s_nocfg"]
    path = write_header(tmp_path / row.files[0].replace("10s", "5s"), shapes(VIDEO_LITE), spec_metadata(row))
    identity = identify(open_checkpoint(path))
    assert identity.variant == row and identity.certain


def test_metadata_carries_sizes_no_row_has(tmp_path, shapes, write_header):
    tiny = replace(NANO_VIDEO, model_dim=96, num_visual_blocks=1, axes_dims=(16, 4, 12))
    row = replace(VARIANTS["nano_video"], spec=tiny)
    path = write_header(tmp_path / "tiny.safetensors", shapes(tiny), spec_metadata(row))
    assert identify(open_checkpoint(path)).variant == row


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"kandinsky5.spec": "[1]"}, "not a specification"),
        ({"kandinsky5.spec": "{"}, "not a specification"),
        ({"kandinsky5.spec": json.dumps({**asdict(NANO_VIDEO), "colour": 3})}, "not a specification"),
        (
            {"kandinsky5.spec": json.dumps({**asdict(NANO_VIDEO), "num_visual_blocks": 5})},
            "num_visual_blocks 5 .tensors: 4",
        ),
        ({"kandinsky5.spec": json.dumps({**asdict(NANO_VIDEO), "visual_cond": False})}, "contradicts"),
        ({"kandinsky5.spec": json.dumps({**asdict(NANO_VIDEO), "axes_dims": [8, 12, 12]})}, "contradicts"),
        *(
            ({"kandinsky5.spec": json.dumps({**asdict(NANO_VIDEO), **broken})}, "not a specification")
            for broken in (
                {"axes_dims": [0, 0, 0]},
                {"axes_dims": []},
                {"axes_dims": [8, 24]},
                {"axes_dims": [8.0, 12.0, 12.0]},
                {"axes_dims": 32},
                {"axes_dims": [40, -4, -4]},
                {"patch_size": [1, 2]},
                {"model_dim": "128"},
                {"model_dim": 128.0},
                {"model_dim": 0},
                {"visual_cond": "yes"},
                {"instruct_type": ["channel"]},
            )
        ),
        ({"kandinsky5.spec": "[" * 100_000}, "not a specification"),
        ({"kandinsky5.spec": json.dumps({"model_dim": 128})}, "not a specification"),
        ({"kandinsky5.variant": "nano_9000"}, "calls itself 'nano_9000'"),
        ({"kandinsky5.variant": "lite_t2i"}, "calls itself 'lite_t2i', but"),
    ],
)
def test_metadata_that_contradicts_the_tensors_is_refused(tmp_path, shapes, write_header, metadata, said):
    path = write_header(tmp_path / "nano.safetensors", shapes(NANO_VIDEO), metadata)
    with pytest.raises(CheckpointError, match=said):
        identify(open_checkpoint(path))


@pytest.mark.parametrize(
    ("row", "spec", "said"),
    [
        ("lite_t2v_5s_sft", replace(VIDEO_LITE, visual_cond=False, instruct_type="channel"), "instruct_type 'channel'"),
        ("lite_i2i", replace(IMAGE_EDIT, visual_cond=True, instruct_type=None), "visual_cond True"),
        ("lite_t2i", replace(IMAGE_T2I, patch_size=(2, 2, 1)), r"patch_size \(2, 2, 1\)"),
        ("lite_t2v_5s_sft", replace(VIDEO_LITE, visual_cond=False, in_visual_dim=33), "in_visual_dim 33"),
        ("lite_t2i", replace(IMAGE_T2I, out_visual_dim=4), "out_visual_dim 4"),
    ],
)  # fmt: skip
def test_a_variant_and_a_specification_that_contradict_each_other_are_refused(
    tmp_path, shapes, write_header, row, spec, said
):
    """The tensors fit both, so only the two together tell that one is wrong."""
    metadata = spec_metadata(replace(VARIANTS[row], spec=spec))
    path = write_header(tmp_path / "both.safetensors", shapes(VARIANTS[row].spec), metadata)
    with pytest.raises(CheckpointError, match=rf"names the variant '{row}' and a .* another model: .*{said}"):
        identify(open_checkpoint(path))


def test_head_widths_no_row_has_come_from_the_metadata(tmp_path, shapes, write_header):
    spec = replace(NANO_VIDEO, model_dim=144, axes_dims=(12, 18, 18))
    row = replace(VARIANTS["nano_video"], spec=spec)
    path = write_header(tmp_path / "tiny.safetensors", shapes(spec), spec_metadata(row))
    assert identify(open_checkpoint(path)).variant == row


@pytest.mark.parametrize(
    ("folder", "config", "variant", "reason"),
    [
        ("Kandinsky-5.0-T2V-Lite-nocfg-10s-Diffusers", {}, "lite_t2v_10s_nocfg", "nocfg-10s"),
        ("models--kandinskylab--Kandinsky-5.0-I2V-Lite-5s-Diffusers/snapshots/0af", {}, "lite_i2v_5s", "I2V"),
        (
            "a",
            {"_name_or_path": "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-10s"},
            "lite_t2v_10s_sft",
            "sft-10s",
        ),
        ("a", {"attention_type": "nabla"}, "lite_t2v_10s_sft", "configuration"),
        ("a", {"attention_type": "regular"}, "lite_t2v_5s_sft", "configuration"),
    ],
)
def test_diffusers_folders_hint_by_name_and_configuration(
    tmp_path, shapes, write_header, folder, config, variant, reason
):
    inside = tmp_path / "b" / "c" / "d" / "e" / folder / "transformer"
    inside.mkdir(parents=True)
    write_header(inside / "diffusion_pytorch_model.safetensors", shapes(VIDEO_LITE))
    (inside / "config.json").write_text(json.dumps({"_class_name": "Kandinsky5Transformer3DModel", **config}))
    for opened in (inside, inside.parent):
        identity = identify(open_checkpoint(opened))
        assert identity.variant.name == variant and reason in identity.hint and not identity.certain


@pytest.mark.parametrize(
    "changes",
    [
        {"num_visual_blocks": 33},
        {"model_dim": 2048, "ff_dim": 8192},
        {"in_text_dim": 4096},
        {"time_dim": 1024},
        {"axes_dims": (8, 12, 12)},
        {"model_dim": 2560, "ff_dim": 10240, "axes_dims": (32, 48, 48)},
    ],
)
def test_unknown_dimensions_are_named(tmp_path, shapes, write_header, changes):
    path = write_header(tmp_path / "next.safetensors", shapes(replace(VIDEO_LITE, **changes)))
    with pytest.raises(
        CheckpointError, match=r"Kandinsky-style CrossDiT of unknown dimensions: width \d+.*Known: lite_video"
    ):
        identify(open_checkpoint(path))


@pytest.mark.parametrize("channels", [64, 20, 0])
def test_unknown_channels_are_named(tmp_path, shapes, write_header, channels):
    tensors = {
        **shapes(VIDEO_PRO),
        "visual_embeddings.in_layer.weight": torch.empty(4096, 4 * channels + 2, device="meta"),
    }
    path = write_header(tmp_path / "odd.safetensors", tensors)
    with pytest.raises(CheckpointError, match="unknown dimensions: .* channels per token does not fit"):
        identify(open_checkpoint(path))


def test_a_transformer_without_its_entry_is_named(tmp_path, shapes, write_header):
    tensors = {
        name: tensor
        for name, tensor in shapes(NANO_VIDEO).items()
        if not name.startswith("visual_embeddings")
    }
    path = write_header(tmp_path / "half.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"unknown dimensions: 'visual_embeddings.in_layer.bias'"):
        identify(open_checkpoint(path))


# Names as they stand in each model's published files, enough to tell it from its neighbours.
FOREIGN = {
    "a LoRA": ["diffusion_model.visual_transformer_blocks.0.self_attention.to_query.lora_A.weight"],
    "Kandinsky 6": [
        "visual_transformer_blocks.0.video_dec_block.cross_attention.to_key.weight",
        "visual_transformer_blocks.0.va_cross_attention.to_key.weight",
    ],
    "a Kandinsky 5 transformer": ["visual_transformer_blocks.0.cross_attention.key_norm.weight"],
    "Wan": ["head.modulation", "blocks.0.self_attn.q.weight", "patch_embedding.weight"],
    "Wan (diffusers)": ["condition_embedder.time_embedder.linear_1.weight", "blocks.0.attn1.to_q.weight"],
    "HunyuanVideo": ["txt_in.individual_token_refiner.blocks.0.norm1.weight", "double_blocks.0.img_attn.qkv.weight"],
    "HunyuanVideo (diffusers)": ["context_embedder.token_refiner.refiner_blocks.0.norm1.weight"],
    "FLUX": ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight", "img_in.weight"],
    "FLUX (diffusers)": ["single_transformer_blocks.0.proj_mlp.weight", "x_embedder.weight", "context_embedder.weight"],
    "Stable Diffusion 3": ["joint_blocks.0.context_block.attn.qkv.weight", "x_embedder.proj.weight"],
    "Stable Diffusion 3 (diffusers)": ["pos_embed.proj.weight", "transformer_blocks.0.norm1_context.linear.weight"],
    "PixArt": ["pos_embed.proj.weight", "adaln_single.linear.weight", "transformer_blocks.0.attn1.to_q.weight"],
    "LTX-Video": ["patchify_proj.weight", "adaln_single.emb.timestep_embedder.linear_1.bias"],
    "LTX-Video (diffusers)": ["proj_in.weight", "time_embed.emb.timestep_embedder.linear_1.weight"],
    "Qwen-Image": ["txt_norm.weight", "transformer_blocks.0.img_mlp.net.0.proj.weight"],
    "Mochi": ["patch_embed.proj.weight", "time_embed.pooler.to_kv.weight", "transformer_blocks.0.norm1.linear.weight"],
    "CogVideoX": ["patch_embed.text_proj.weight", "transformer_blocks.0.norm1.linear.weight"],
    "Lumina 2 or Z-Image": ["cap_embedder.1.weight", "noise_refiner.0.attention.k_norm.weight"],
    "Stable Diffusion XL": ["input_blocks.0.0.weight", "label_emb.0.0.weight"],
    "Stable Diffusion": ["input_blocks.0.0.weight", "middle_block.1.proj_in.weight"],
    "Stable Diffusion (diffusers)": ["down_blocks.0.attentions.0.norm.weight", "time_embedding.linear_1.weight"],
    "Stable Cascade": ["clf.1.weight"],
    "an all-in-one checkpoint": ["cond_stage_model.transformer.text_model.x", "unknown.x"],
    "the CogVideoX autoencoder": ["decoder.conv_in.conv.weight", "decoder.mid_block.resnets.0.norm1.norm_layer.weight"],
    "the HunyuanVideo autoencoder": ["decoder.conv_in.conv.weight", "post_quant_conv.weight"],
    "the Wan or Qwen-Image autoencoder": ["decoder.middle.0.residual.0.gamma", "encoder.conv1.weight"],
    "the LTX-Video autoencoder": ["per_channel_statistics.mean-of-means", "decoder.conv_in.conv.weight"],
    "a Stable Diffusion autoencoder": ["decoder.conv_in.weight", "post_quant_conv.weight"],
    "an image autoencoder of the FLUX kind": ["decoder.conv_in.weight", "decoder.mid.block_1.norm1.weight"],
    "a tiny preview autoencoder": ["decoder.layers.3.conv.0.weight", "encoder.layers.0.weight"],
    "Qwen2.5-VL": ["visual.blocks.0.norm1.weight", "model.layers.0.self_attn.q_proj.bias", "lm_head.weight"],
    "a Qwen2.5 language model": ["model.layers.0.self_attn.q_proj.bias", "lm_head.weight"],
    "a Qwen2.5 language model in llama.cpp's form": ["token_embd.weight", "blk.0.attn_q.bias"],
    "CLIP": ["text_model.embeddings.token_embedding.weight", "text_model.encoder.layers.0.mlp.fc1.weight"],
    "T5": ["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"],
    "a language model": ["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"],
}  # fmt: skip


@pytest.mark.parametrize(("title", "names"), FOREIGN.items())
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_foreign_weights_are_called_by_their_name(tmp_path, write_header, title, names, prefix):
    tensors = {prefix + name: torch.empty(8, device="meta") for name in names}
    path = write_header(tmp_path / "kandinsky5lite_t2v_sft_5s.safetensors", tensors)
    checkpoint = open_checkpoint(path)
    found = recognise(checkpoint.tensors)
    assert found is not None and found.title == title
    with pytest.raises(CheckpointError) as caught:
        identify(checkpoint)
    if title != "a Kandinsky 5 transformer":
        assert f"is not a Kandinsky 5 transformer. It looks like {title}: {found.advice}" in str(caught.value)


def test_every_signature_has_an_example():
    assert {signature.title for signature in SIGNATURES} == set(FOREIGN)


def test_our_own_models_are_never_taken_for_foreign_ones(shapes):
    for spec in (VIDEO_LITE, VIDEO_PRO, IMAGE_T2I, IMAGE_EDIT, NANO_VIDEO):
        assert recognise(shapes(spec)).title == "a Kandinsky 5 transformer"


def test_something_unheard_of_is_admitted(tmp_path, write_header):
    path = write_header(tmp_path / "x.safetensors", {"some.thing": torch.empty(3, device="meta")})
    with pytest.raises(
        CheckpointError, match="not a model this pack knows: 1 tensors, the first is 'some.thing'"
    ):
        identify(open_checkpoint(path))


@pytest.mark.parametrize("name", ["nano_video", "nano_image", "nano_edit"])
def test_nano_weights_are_known_without_metadata(tmp_path, shapes, write_header, name):
    path = write_header(tmp_path / "stripped.safetensors", shapes(VARIANTS[name].spec))
    assert identify(open_checkpoint(path)).variant.name == name
