"""Latents kept around a decode: what is written, what an error says, and how one is loaded again."""

from __future__ import annotations

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import BackendUnavailable, KandinskyError
from comfyui_kandinsky5.kandinsky_core.io.latents import read_latent
from comfyui_kandinsky5.nodes import host as door
from comfyui_kandinsky5.nodes.host_standalone import Running, StandaloneHost, VAEHandle
from comfyui_kandinsky5.nodes.latents import K5LoadLatent, kept

FACTS = {"variant": "lite_i2v_5s", "fps": 24, "seed": 7}


@pytest.fixture
def host(tmp_path, monkeypatch):
    monkeypatch.setattr(door, "_current", [])
    made = StandaloneHost(models=tmp_path / "models", output=tmp_path / "out", device="cpu")
    made.running = Running(metadata={"prompt": {"1": {}}, "kandinsky5": {"version": "1"}})
    door.install(made)
    return made


@pytest.fixture
def vae(tmp_path):
    return VAEHandle(tmp_path / "v.safetensors", "hunyuan", torch.float32)


def latent(seed=0):
    return {"samples": torch.randn(1, 16, 2, 6, 8, generator=torch.Generator().manual_seed(seed)), "kandinsky5": FACTS}


def test_the_latent_is_on_disk_before_the_block_runs(host, vae):
    with kept(vae, latent(), 8, None, "auto") as line:
        (name,) = host.latents()
        saved = read_latent(host.latents()[name])
    assert line == f"latent kept as latents/{name}"
    assert torch.equal(saved.samples, latent()["samples"])
    assert saved.facts == {**FACTS, "mode": "auto", "vae": "v.safetensors", "version": "1"}
    assert saved.metadata["prompt"] == '{"1": {}}'


@pytest.mark.parametrize(
    ("raised", "seen", "words"),
    [
        (BackendUnavailable("no."), BackendUnavailable, "no. The latent is safe: "),
        (ZeroDivisionError("deep down"), KandinskyError, "ZeroDivisionError: deep down. The latent is safe: "),
        (torch.OutOfMemoryError("full"), torch.OutOfMemoryError, "OutOfMemoryError: full. The latent is safe: "),
        (MemoryError(), MemoryError, "MemoryError: . The latent is safe: "),
    ],
)
def test_every_error_names_the_latent_and_what_resumes(host, vae, raised, seen, words):
    with pytest.raises(seen) as caught, kept(vae, latent(), 8, None, "auto"):
        raise raised
    assert type(caught.value) is seen
    (path,) = host.latents().values()
    assert str(caught.value) == (
        f"{words}{path}. Resume from it with the node Kandinsky 5 Load Latent, or with: kandinsky5 decode {path}"
    )


def test_cancelling_keeps_the_latent_and_passes_through(host, vae):
    with pytest.raises(KeyboardInterrupt), kept(vae, latent(), 8, None, "auto"):
        raise KeyboardInterrupt
    assert len(host.latents()) == 1


def test_old_latents_go_only_after_a_decode_that_worked(host, vae):
    for seed in range(3):
        with pytest.raises(KandinskyError), kept(vae, latent(seed), 1, None, "auto"):
            raise KandinskyError("failed.")
    assert len(host.latents()) == 3
    with kept(vae, latent(1), 1, None, "auto"):
        assert len(host.latents()) == 3
    (path,) = host.latents().values()
    assert torch.equal(read_latent(path).samples, latent(1)["samples"])


def test_nothing_is_kept_on_request(host, vae):
    with pytest.raises(KandinskyError, match=r"failed\.$"), kept(vae, latent(), 0, None, "auto") as line:
        assert line == "latent not kept"
        raise KandinskyError("failed.")
    assert not host.output.exists()


def test_a_full_or_closed_folder_is_told_and_the_block_runs(host, vae, caplog):
    host.output.write_text("a file where the folder should be")
    with pytest.raises(KandinskyError, match="The latent could not be kept"), kept(vae, latent(), 8, None, "auto"):
        raise KandinskyError("failed.")
    assert "The latent is NOT safe: if decoding fails it has to be sampled again." in caplog.text


def test_a_kept_latent_is_loaded_with_its_facts(host, vae):
    with kept(vae, latent(), 8, None, "auto"):
        pass
    (name,) = K5LoadLatent.define_schema().inputs[0].options
    assert K5LoadLatent.validate_inputs(name) is True
    loaded, report = K5LoadLatent.execute(name).result
    assert torch.equal(loaded["samples"], latent()["samples"])
    assert loaded["kandinsky5"]["seed"] == 7
    assert report.startswith(f"{name}: 64 × 48 pixels, 5 frames, ") and report.endswith("seed 7, VAE v.safetensors")


@pytest.mark.parametrize("name", ["gone.latent", "../secret.latent", "../../etc/passwd"])
def test_only_listed_names_are_loaded(host, tmp_path, name):
    (tmp_path / "out/latents").mkdir(parents=True)
    (tmp_path / "out/secret.latent").write_bytes(b"")
    assert "is not there any more. Choose one of: nothing." in K5LoadLatent.validate_inputs(name)
    with pytest.raises(KandinskyError):
        K5LoadLatent.execute(name)


def test_the_newest_is_listed_first_and_a_broken_one_is_refused(host, vae):
    for seed in range(2):
        with kept(vae, latent(seed), 8, None, "auto"):
            pass
    newest, _ = host.latents().values()
    assert torch.equal(read_latent(newest).samples, latent(1)["samples"])
    newest.write_bytes(b"half")
    assert "cannot be read as a latent" in K5LoadLatent.validate_inputs(newest.name)
