"""The standalone host: folders, one heavy model at a time, device and precision."""

from __future__ import annotations

import gc
import re
import weakref

import pytest
import tiny
import torch
from comfyui_kandinsky5.kandinsky_core.errors import BackendUnavailable
from comfyui_kandinsky5.nodes import standalone_model
from comfyui_kandinsky5.nodes.decode import Wanted, decode_images
from comfyui_kandinsky5.nodes.host import SampleRequest
from comfyui_kandinsky5.nodes.host_standalone import StandaloneHost


@pytest.fixture
def folders(tmp_path):
    models = tmp_path / "models"
    for name in ("unet/a.safetensors", "diffusion_models/sub/b.safetensors", "text_encoders/q/model.safetensors"):
        (models / name).parent.mkdir(parents=True, exist_ok=True)
        (models / name).touch()
    (models / "text_encoders/q/config.json").write_text('{"model_type": "qwen2_5_vl"}')
    (tmp_path / "secret.safetensors").touch()
    return StandaloneHost(models=models, device="cpu")


def test_files_and_model_folders_are_listed_apart(folders):
    assert folders.filenames("diffusion_models") == ["a.safetensors", "sub/b.safetensors"]
    assert folders.filenames("text_encoders") == []
    assert folders.folders("text_encoders") == ["q"]
    assert folders.filenames("vae") == []


def test_names_are_found_where_they_are_listed(folders):
    assert folders.locate("diffusion_models", "a.safetensors").is_file()
    assert folders.locate("diffusion_models", "sub/b.safetensors").is_file()
    assert folders.locate("text_encoders", "q").is_dir()


@pytest.mark.parametrize("name", ["../../secret.safetensors", "sub/../../../secret.safetensors", "", ".", "none"])
def test_nothing_outside_the_folders_is_found(folders, name):
    assert folders.locate("diffusion_models", name) is None


def test_an_absolute_name_is_not_a_way_out(folders, tmp_path):
    assert folders.locate("diffusion_models", str(tmp_path / "secret.safetensors")) is None


def test_linked_weights_are_found(folders, tmp_path):
    (folders.models / "vae").mkdir()
    (folders.models / "vae/v.safetensors").symlink_to(tmp_path / "secret.safetensors")
    assert folders.filenames("vae") == ["v.safetensors"]
    assert folders.locate("vae", "v.safetensors").is_file()


@pytest.fixture
def clip(host, models):
    folder = models / "text_encoders"
    return host.load_clip(folder / tiny.QWEN, folder / tiny.CLIP, tokenizer=None, dtype="auto")


def test_the_text_encoder_is_gone_before_the_sampler_loads(host, models, clip, monkeypatch):
    text = host.encode_text(clip, "a", template="video", max_tokens=16).conditioning
    encoder = weakref.ref(host._resident[1])
    alive_at_load = []
    real = standalone_model.load_crossdit

    def watched(*arguments, **options):
        gc.collect()
        alive_at_load.append(encoder() is not None)
        return real(*arguments, **options)

    monkeypatch.setattr(standalone_model, "load_crossdit", watched)
    model = host.load_model(models / "diffusion_models" / tiny.VIDEO, variant=None, dtype="auto").model
    assert alive_at_load == []
    for seed in (0, 1):
        host.sample(model, SampleRequest(
            positive=text, negative=None, latent={"samples": torch.zeros(1, 16, 2, 4, 4)}, seed=seed,
            sigmas=torch.tensor([1.0, 0.0]), guidance=1.0,
        ))  # fmt: skip
    assert alive_at_load == [False]


def test_a_prompt_seen_before_needs_no_encoder(host, clip):
    first = host.encode_text(clip, "a", template="video", max_tokens=16)
    host._resident = None
    again = host.encode_text(clip, "a", template="video", max_tokens=16)
    assert host._resident is None
    assert torch.equal(first.conditioning[0][0], again.conditioning[0][0])


def test_what_clip_cuts_off_is_told_each_time(host, clip):
    def note(prompt, limit=256):
        return host.encode_text(clip, prompt, template="video", max_tokens=limit).note

    words = "word " * 80
    assert note("a") == ""
    told = note("z" * 90)
    assert re.fullmatch(r"CLIP keeps 77 tokens of the prompt and drops \d+; Qwen reads the whole prompt", told)
    host._resident = None
    assert note("z" * 90) == told and host._resident is None  # from the cache
    assert "Qwen" not in note(words, limit=16)  # it was cut there, too


@pytest.fixture
def video_model(host, models):
    return host.load_model(models / "diffusion_models" / tiny.VIDEO, variant=None, dtype="auto").model


def request(text, **latent):
    return SampleRequest(
        positive=text, negative=None, latent={"samples": torch.zeros(1, 16, 2, 4, 4), **latent}, seed=0,
        sigmas=torch.tensor([1.0, 0.0]), guidance=1.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    "latent", [{"noise_mask": torch.ones(1, 1, 32, 32)}, {"batch_index": [3]}], ids=["noise_mask", "batch_index"]
)
def test_what_only_comfyui_samples_is_refused_before_loading(host, video_model, latent):
    with pytest.raises(BackendUnavailable, match=f"'{next(iter(latent))}'.*Run this in ComfyUI, or"):
        host.sample(video_model, request([], **latent))
    assert host._resident is None


def test_a_picture_is_a_clip_of_one_frame_to_a_video_autoencoder(host, models):
    vae = host.load_vae(models / "vae" / tiny.VIDEO_VAE, dtype="auto")
    latents_BCHW = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    pictures, _ = decode_images(vae, latents_BCHW, Wanted())
    assert pictures.shape == (2, 32, 32, 3)
    assert torch.equal(pictures, decode_images(vae, latents_BCHW.unsqueeze(2), Wanted())[0])


def test_a_script_gets_results_without_gradients(host, models, clip, video_model):
    with torch.enable_grad():
        text = host.encode_text(clip, "a", template="video", max_tokens=16).conditioning
        sampled = host.sample(video_model, request(text))
        vae = host.load_vae(models / "vae" / tiny.VIDEO_VAE, dtype="auto")
        results = [text[0][0], sampled, host.vae_encode(vae, torch.zeros(1, 32, 32, 3))]
        results.append(decode_images(vae, sampled, Wanted())[0])
    assert [tensor.requires_grad for tensor in results] == [False] * 4


def test_precision_follows_the_device_unless_chosen(host, models):
    path = models / "diffusion_models" / tiny.VIDEO
    assert host.load_model(path, variant=None, dtype="auto").model.dtype is torch.float32
    assert host.load_model(path, variant=None, dtype="bf16").model.dtype is torch.bfloat16
    with pytest.raises(BackendUnavailable, match="inside ComfyUI only"):
        host.load_model(path, variant=None, dtype="fp8_e4m3fn")


def test_an_unknown_device_is_named():
    with pytest.raises(BackendUnavailable, match="'toaster'"):
        StandaloneHost(device="toaster")
