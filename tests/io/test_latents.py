"""Latents on disk: they come back, only their own kind is pruned, and nothing half-written is left."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import CheckpointError, MediaError
from comfyui_kandinsky5.kandinsky_core.io import latents, save_checkpoint
from comfyui_kandinsky5.kandinsky_core.io.latents import (
    keep_latent,
    prune_latents,
    read_latent,
    saved_latents,
)
from safetensors.torch import load_file

FACTS = {"variant": "lite_i2v_5s", "fps": 24, "seed": 7}


def latent(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape or (1, 16, 2, 3, 4), generator=torch.Generator().manual_seed(seed))


def keep(folder, seed):
    """Write latent `seed`, made that many seconds after the first one."""
    path = keep_latent(folder, latent(seed), facts=FACTS)
    os.utime(path, (1000 + seed, 1000 + seed))
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 16, 2, 3, 4), (2, 16, 6, 8)])
def test_a_latent_comes_back_with_its_facts(tmp_path, dtype, shape):
    given = latent(0, *shape).to(dtype).transpose(-1, -2)
    path = keep_latent(tmp_path, given, facts=FACTS, metadata={"prompt": {"1": {}}, "note": "ü"})
    found = read_latent(path)
    assert torch.equal(found.samples, given) and found.samples.dtype is dtype
    assert found.facts == FACTS
    assert found.metadata["prompt"] == '{"1": {}}' and found.metadata["note"] == "ü"


def test_the_file_is_comfyuis_own_kind(tmp_path):
    stored = load_file(keep_latent(tmp_path, latent(0), facts={}))
    assert torch.equal(stored["latent_tensor"], latent(0))
    assert stored["latent_format_version_0"].numel() == 0


def test_the_newest_stay_and_are_listed_first(tmp_path):
    paths = [keep(tmp_path, seed) for seed in range(5)]
    assert saved_latents(tmp_path) == paths[::-1]
    prune_latents(tmp_path, 3)
    assert saved_latents(tmp_path) == paths[:1:-1]


def test_the_same_latent_is_one_file_and_becomes_the_newest(tmp_path):
    first, second = keep(tmp_path, 0), keep(tmp_path, 1)
    assert keep_latent(tmp_path, latent(0), facts={"mode": "stream", "vae": "other"}) == first
    assert keep_latent(tmp_path, latent(0), facts={"vae": "third"}, metadata={"prompt": "later"}) == first
    assert saved_latents(tmp_path) == [first, second]
    assert read_latent(first).facts == FACTS | {"mode": "stream", "vae": "third"}
    assert torch.equal(read_latent(first).samples, latent(0))


def test_a_latent_kept_again_still_tells_how_it_was_made(tmp_path):
    path = keep_latent(tmp_path, latent(0), facts=FACTS, metadata={"prompt": "first"})
    keep_latent(tmp_path, latent(0), facts={}, metadata={"prompt": "later", "note": "new"})
    found = read_latent(path)
    assert found.facts == FACTS and found.metadata["prompt"] == "first" and found.metadata["note"] == "new"


def test_only_files_of_this_feature_are_pruned(tmp_path):
    mine = keep(tmp_path, 0)
    renamed = tmp_path / "favourite.latent"
    renamed.write_bytes(mine.read_bytes())
    unmarked = tmp_path / f"kandinsky5_20260101-000000_{'0' * 12}.latent"
    save_checkpoint(unmarked, {"latent_tensor": latent(0), "latent_format_version_0": torch.empty(0)})
    broken = tmp_path / f"kandinsky5_20260101-000000_{'1' * 12}.latent"
    broken.write_bytes(b"half")
    (tmp_path / "clip.mp4").touch()
    keep(tmp_path, 1)
    prune_latents(tmp_path, 1)
    left = {path.name for path in tmp_path.iterdir()}
    assert left >= {"favourite.latent", unmarked.name, broken.name, "clip.mp4"} and len(left) == 5
    assert mine.name not in left


def test_a_full_disk_says_so_and_leaves_no_half_file(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    old = keep(tmp_path, 0)
    monkeypatch.setattr(latents.os, "fsync", full)
    with pytest.raises(MediaError, match="1,536 bytes cannot be written: No space left"):
        keep(tmp_path, 1)
    assert list(tmp_path.iterdir()) == [old]


def test_a_folder_that_cannot_be_made_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MediaError, match="cannot be written"):
        keep_latent(tmp_path / "file" / "latents", latent(0), facts={})


def test_a_file_that_cannot_be_deleted_is_told_and_kept(tmp_path, monkeypatch, caplog):
    old = keep(tmp_path, 0)

    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(type(old), "unlink", denied)
    new = keep(tmp_path, 1)
    prune_latents(tmp_path, 1)
    assert saved_latents(tmp_path) == [new, old] and "cannot be deleted: Permission denied" in caplog.text


def test_what_is_no_latent_is_refused(tmp_path):
    path = tmp_path / "old.latent"
    save_checkpoint(path, {"latent_tensor": latent(0)})
    with pytest.raises(CheckpointError, match="not a latent of today's format"):
        read_latent(path)
    path.write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError):
        read_latent(path)


def test_damaged_facts_are_no_facts(tmp_path):
    path = tmp_path / "x.latent"
    tensors = {"latent_tensor": latent(0), "latent_format_version_0": torch.empty(0)}
    for facts in ("{", "[1]"):
        save_checkpoint(path, tensors, {"kandinsky5": facts})
        assert read_latent(path).facts == {}
