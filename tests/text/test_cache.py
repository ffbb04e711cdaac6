"""The embedding cache: what makes a key, what survives damage, what is pruned."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import TextError
from comfyui_kandinsky5.kandinsky_core.text import (
    EmbeddingCache,
    TextFeatures,
    cache_key,
    encode_cached,
    encoder_hash,
)

FEATURES = TextFeatures(torch.randn(7, 16, dtype=torch.bfloat16), torch.randn(8), 7, 2, 9, 1)


@pytest.fixture
def cache(tmp_path):
    return EmbeddingCache(tmp_path / "new" / "folder")


def equal(one, other):
    pairs = ((getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(one))
    return all(torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_what_is_written_is_read(cache):
    assert cache.read("k") is None
    cache.write("k", FEATURES)
    assert equal(cache.read("k"), FEATURES)
    assert [path.name for path in cache.folder.iterdir()] == ["k.safetensors"]


def test_second_encode_needs_no_encoder(cache, encoder):
    first = encode_cached(cache, "id", lambda: encoder, "a red cube", "video")

    def load():
        raise AssertionError("the encoder was loaded although the prompt is cached")

    assert equal(encode_cached(cache, "id", load, "a red cube", "video"), first)
    with pytest.raises(AssertionError, match="loaded"):
        encode_cached(cache, "id", load, "a red ball", "video")
    with pytest.raises(AssertionError, match="loaded"):
        encode_cached(None, "id", load, "a red cube", "video")


def test_none_caches_nothing(encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert encode_cached(None, "id", lambda: encoder, "x", "video").tokens == 2
    assert not list(tmp_path.iterdir())


def test_a_wrong_prompt_is_the_encoders_error(cache, encoder):
    with pytest.raises(TextError, match="must be text"):
        encode_cached(cache, "id", lambda: encoder, b"bytes", "video")


def test_everything_that_changes_an_embedding_changes_its_key():
    image = torch.zeros(3, 32, 32)
    keys = [
        cache_key("id", "x", "video"),
        cache_key("other", "x", "video"),
        cache_key("id", "y", "video"),
        cache_key("id", "x", "image"),
        cache_key("id", "x", "video", max_tokens=12),
        cache_key("id", "x", "image_edit"),
        cache_key("id", "x", "image_edit", images=[image]),
        cache_key("id", "x", "image_edit", images=[image + 0.01]),
        cache_key("id", "x", "image_edit", images=[image, image]),
        cache_key("id", "x", "image_edit", images=[image.reshape(3, 16, 64)]),
    ]
    assert len(set(keys)) == len(keys)
    assert cache_key("id", "x", "image_edit", images=[image.clone()]) == keys[6]


@pytest.mark.parametrize("damage", [b"", b"rubbish", None])
def test_a_damaged_entry_is_encoded_again(cache, encoder, caplog, damage):
    first = encode_cached(cache, "id", lambda: encoder, "x", "video")
    (path,) = cache.folder.iterdir()
    path.write_bytes(path.read_bytes()[:-8] if damage is None else damage)
    with caplog.at_level(logging.WARNING, "kandinsky5"):
        assert equal(encode_cached(cache, "id", lambda: encoder, "x", "video"), first)
    assert "damaged" in caplog.text
    assert equal(cache.read(path.stem), first)


def test_a_file_of_another_kind_is_damage(cache, caplog):
    from safetensors.torch import save_file

    cache.folder.mkdir(parents=True)
    save_file({"weights": torch.zeros(3)}, cache.folder / "k.safetensors")
    assert cache.read("k") is None and "damaged" in caplog.text


def test_the_least_recently_used_goes_first(cache):
    for age, key in enumerate(["a", "b", "c"]):
        cache.write(key, FEATURES)
        os.utime(cache.folder / f"{key}.safetensors", (1000 + age, 1000 + age))
    assert cache.read("a") is not None  # now the newest
    size = (cache.folder / "a.safetensors").stat().st_size
    cache.limit_bytes = 2 * size
    cache.prune()
    assert sorted(path.stem for path in cache.folder.iterdir()) == ["a", "c"]
    cache.write("d", FEATURES)
    assert sorted(path.stem for path in cache.folder.iterdir()) == ["a", "d"]


def test_an_entry_removed_by_another_process_while_pruning(cache, monkeypatch, caplog):
    cache.write("other", FEATURES)
    listed = Path.glob

    def list_then_lose(folder, pattern):
        found = list(listed(folder, pattern))
        (folder / "other.safetensors").unlink()
        return found

    monkeypatch.setattr(Path, "glob", list_then_lose)
    with caplog.at_level(logging.WARNING, "kandinsky5"):
        cache.write("k", FEATURES)
    assert not caplog.text
    assert [path.name for path in cache.folder.iterdir()] == ["k.safetensors"]


def test_an_entry_outlives_its_file(cache):
    cache.write("k", FEATURES)
    held = cache.read("k")
    (path,) = cache.folder.iterdir()
    path.write_bytes(b"\0" * path.stat().st_size)
    assert equal(held, FEATURES)


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, encoder, caplog):
    (tmp_path / "file").write_text("not a folder")
    result = encode_cached(EmbeddingCache(tmp_path / "file"), "id", lambda: encoder, "x", "video")
    assert result.tokens == 2 and "not cached" in caplog.text


def test_encoder_hash_follows_the_files(folders, tmp_path):
    import shutil

    home = tmp_path / "q"
    shutil.copytree(folders[0], home)
    weights = home / "model.safetensors"
    first = encoder_hash(home, folders[1])
    assert encoder_hash(home, folders[1]) == first
    assert encoder_hash(home, folders[1], dtype=torch.float16) != first
    stat = weights.stat()
    raw = bytearray(weights.read_bytes())
    raw[-(len(raw) // 3)] ^= 1  # one bit outside the samples: the modification time tells
    weights.write_bytes(raw)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    second = encoder_hash(home, folders[1])
    assert second != first
    tokenizer = home / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert encoder_hash(home, folders[1]) != second


def test_encoder_hash_samples_the_data(folders, tmp_path):
    import shutil

    home = tmp_path / "q"
    shutil.copytree(folders[0], home)
    weights = home / "model.safetensors"
    first, stat = encoder_hash(home, folders[1]), weights.stat()
    raw = bytearray(weights.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    raw[header:] = bytes(byte ^ 1 for byte in raw[header:])
    weights.write_bytes(raw)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert encoder_hash(home, folders[1]) != first
