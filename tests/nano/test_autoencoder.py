"""Both autoencoders of the recipe: fast layers equal the real ones, batches, bases, and a training in miniature."""

from __future__ import annotations

import json

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.io.load import load_vae
from comfyui_kandinsky5.kandinsky_core.nano import autoencoder
from comfyui_kandinsky5.kandinsky_core.nano.autoencoder import Schedule, new_vae
from comfyui_kandinsky5.kandinsky_core.nano.batch import Batch, Phase, drawn_batch, whole_clips
from comfyui_kandinsky5.kandinsky_core.nano.codec import clips, decoded, encoded
from comfyui_kandinsky5.kandinsky_core.nano.draw import held_out, scenes
from comfyui_kandinsky5.kandinsky_core.nano.layers import FastGroupNorm
from comfyui_kandinsky5.kandinsky_core.nano.run import Run
from comfyui_kandinsky5.kandinsky_core.nano.score import decibels
from comfyui_kandinsky5.kandinsky_core.vae.flux import FluxVAE
from comfyui_kandinsky5.kandinsky_core.vae.hunyuan import HunyuanVideoVAE
from comfyui_kandinsky5.kandinsky_core.variants import NANO_IMAGE_VAE, NANO_VAE
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

KINDS = {
    "video": (NANO_VAE, HunyuanVideoVAE, autoencoder.train_video_vae, autoencoder.video_basis),
    "image": (NANO_IMAGE_VAE, FluxVAE, autoencoder.train_image_vae, autoencoder.image_basis),
}
STEPS = 30


pytestmark = pytest.mark.usefixtures("one_thread")


def schedule(frames, steps=STEPS, size_px=32):
    """Every phase once, at tiny size."""
    batches = (Batch(clips=4, size_px=size_px), Batch(clips=2, frames=frames, size_px=size_px))
    later = Batch(clips=2, frames=9, size_px=size_px, later=True) if frames > 1 else batches[0]
    return Schedule(
        encoder=(Phase(name="encoder", batches=batches, steps=steps, lr=3e-3),),
        decoder=(Phase(name="decoder", batches=batches, steps=steps, lr=3e-3),),
        finish=(Phase(name="finish", batches=(*batches, later), steps=3, lr=1e-3),),
    )


@pytest.mark.parametrize(("kind", "frames"), [("video", 1), ("video", 5), ("video", 9), ("image", 1)])
def test_the_training_autoencoder_is_the_shipped_one(tmp_path, kind, frames):
    spec, ordinary, *_ = KINDS[kind]
    fast, real = new_vae(Run(tmp_path), spec), ordinary(spec)
    with torch.no_grad():
        for weight in fast.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    real.load_state_dict(fast.state_dict())
    x = torch.rand(2, 3, frames, 16, 16) * 2 - 1
    gradients = []
    for vae in (fast, real):
        z = encoded(vae, x)
        out = decoded(vae, z)
        (out - x).square().mean().backward()
        ends = [
            weight.grad for name, weight in vae.named_parameters() if "conv_in" in name or "conv_out" in name
        ]
        if frames == 1 and kind == "video":
            if vae is fast:  # pictures teach the newest tap only
                assert all(grad[:, :, :-1].abs().max() == 0 for grad in ends if grad.ndim == 5)
            ends = [grad[:, :, -1] if grad.ndim == 5 else grad for grad in ends]
        gradients.append((z, out, *ends))
    assert gradients[0][0].shape == (2, 16, (frames + 3) // 4, 2, 2)
    for mine, theirs in zip(*gradients, strict=True):
        assert_close(mine, theirs, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_training_layers_follow_the_dtype_of_activations(tmp_path, kind):
    vae = new_vae(Run(tmp_path), KINDS[kind][0])
    x = torch.rand(1, 3, 1, 16, 16).bfloat16()
    out = decoded(vae, encoded(vae, x))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(weight.grad is None or weight.grad.dtype == torch.float32 for weight in vae.parameters())


def test_group_norm_has_torchs_gradients():
    torch.manual_seed(0)
    fast, real = FastGroupNorm(4, 8), nn.GroupNorm(4, 8)
    weights = {"weight": torch.randn(8), "bias": torch.randn(8)}
    x = torch.randn(3, 8, 2, 5, 4, dtype=torch.float64)
    found = []
    for norm in (fast, real):
        norm.load_state_dict(weights)
        norm.double()
        leaf = x.clone().requires_grad_()
        norm(leaf).pow(3).sum().backward()
        found.append((leaf.grad, norm.weight.grad, norm.bias.grad))
    for mine, theirs in zip(*found, strict=True):
        assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_batches_have_their_sizes_in_turn_and_repeat(tmp_path):
    phase = Phase(name="x", batches=(Batch(clips=3), Batch(clips=2, frames=5, size_px=32)), steps=9, lr=1.0)
    run = Run(tmp_path)
    drawn = [drawn_batch(run, phase, step) for step in range(4)]
    assert [tuple(x.shape) for x in drawn] == [(3, 3, 1, 64, 64), (2, 3, 5, 32, 32)] * 2
    assert all(-1 <= x.min() < x.max() <= 1 for x in drawn)
    assert torch.equal(drawn[1], drawn_batch(run, phase, 1)) and not torch.equal(drawn[1], drawn[3])
    assert not torch.equal(drawn[0], drawn_batch(Run(tmp_path, seed=2), phase, 0))


def test_batches_show_every_part_of_a_motion_at_several_paces(tmp_path, monkeypatch):
    parts = []

    def draw(scene, *, start, stop, frames, size_px):
        assert not held_out(scene)
        parts.append((start, stop))
        return torch.zeros(frames, size_px, size_px, 3)

    monkeypatch.setattr("comfyui_kandinsky5.kandinsky_core.nano.batch.draw", draw)
    phase = Phase(name="x", batches=(Batch(clips=60, frames=17, size_px=8),), steps=1, lr=1.0)
    drawn_batch(Run(tmp_path), phase, 0)
    assert {round(stop - start, 6) for start, stop in parts} == {1.0, 0.5, round(1 / 3, 6)}
    assert all(0 <= start < stop <= 1 + 1e-9 for start, stop in parts)
    stretches = [(start, stop) for start, stop in parts if stop - start < 0.99]  # a whole motion shows every part
    assert min(start for start, _ in stretches) < 0.1 and max(stop for _, stop in stretches) > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_the_basis_is_in_model_units_and_the_same_every_time(tmp_path, small, kind):
    spec, _, _, basis_of = KINDS[kind]
    basis = basis_of(Run(tmp_path), spec)
    x = next(whole_clips(scenes(50, 10), size_px=32, frames=5 if kind == "video" else 1))
    z = basis.encode(x)
    assert z.shape[1:] == (16, 2 if kind == "video" else 1, 4, 4)
    assert z.square().mean().sqrt().item() == pytest.approx(1, abs=0.3)
    assert decibels(clips(basis.decode(z)), clips(x))["psnr_mean_db"] > 20
    assert torch.equal(basis.project_SC, basis_of(Run(tmp_path), spec).project_SC)


def test_clips_are_drawn_in_parts():
    parts = list(whole_clips(scenes(1, 7), size_px=16, frames=5, at_once=3))
    assert [len(part) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat(parts), next(whole_clips(scenes(1, 7), size_px=16, frames=5)))


def test_a_later_window_is_judged_without_the_frame_of_its_context():
    x = torch.rand(1, 3, 13, 8, 8)
    z = torch.arange(4.0).view(1, 1, 4, 1, 1)

    def decode(z_BCTHW):
        first = int(z_BCTHW[0, 0, 0].item())
        assert z_BCTHW.shape[2] == 4 - first
        out = x[:, :, 4 * first :].clone()
        if first:
            out[:, :, 0] = 9  # what stands for the four frames of the first latent does not matter
        return out

    for later in (False, True):
        assert autoencoder.decoding_loss(decode, z, x, later=later).item() == pytest.approx(0, abs=2e-3)
        assert autoencoder.decoding_loss(decode, z, x.flip(2), later=later).item() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns_resumes_and_saves_halves(tmp_path, small, losses, kind):
    spec, ordinary, train, _ = KINDS[kind]
    run, plan = Run(tmp_path), schedule(5 if kind == "video" else 1)
    vae = train(run, spec, plan)
    found = losses(tmp_path)
    assert set(found) == {"encoder", "decoder", "finish"}
    assert all(found[stage][-1] < 0.9 * found[stage][0] for stage in ("encoder", "decoder"))

    path = tmp_path / "vae.safetensors"
    autoencoder.save_vae(path, vae, {"note": "x"})
    state = load_file(path)
    assert all(value.dtype == torch.float16 for value in state.values())
    loaded = load_vae(path, dtype=torch.float32, device=torch.device("cpu"))
    assert loaded.spec == spec and type(loaded.vae) is ordinary
    # Only the mean is trained.
    x = torch.rand(1, 3, 1, 16, 16)
    assert (loaded.vae.encode(x.squeeze(2) if kind == "image" else x).logvar == autoencoder.LOG_VARIANCE).all()

    lines = len((tmp_path / "log.jsonl").read_text().splitlines())
    again = train(run, spec, plan)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == lines
    assert all(torch.equal(value.half(), state[name]) for name, value in again.state_dict().items())


def test_the_recipe_says_what_every_phase_was():
    facts = json.loads(json.dumps(autoencoder.recipe_facts(schedule(5))))
    assert facts["finish"] == [3, 1e-3, [[4, 1, 32, False], [2, 5, 32, False], [2, 9, 32, True]]]
    names = [*autoencoder.recipe_facts(autoencoder.VIDEO), *autoencoder.recipe_facts(autoencoder.IMAGE)]
    assert len(names) == len(set(names))  # each is a checkpoint in one folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_autoencoder(tmp_path, small, kind):
    """In the mode whose weights ship, which is slow where processors have no instructions for it: at 16 px."""
    spec, _, train, _ = KINDS[kind]
    plan = schedule(5 if kind == "video" else 1, steps=2, size_px=16)
    one, other, third = (
        train(Run(tmp_path / str(at), torch.device("cpu"), torch.bfloat16, seed), spec, plan).state_dict()
        for at, seed in enumerate((1, 1, 2))
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert not any(torch.equal(value, third[name]) for name, value in one.items() if value.ndim > 1)
