"""Opening weights: layouts, prefixes, and every way a file can be broken."""

from __future__ import annotations

import json
import pickle
import struct

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import CheckpointError
from comfyui_kandinsky5.kandinsky_core.io import checkpoint as checkpoint_module
from comfyui_kandinsky5.kandinsky_core.io.checkpoint import open_checkpoint, save_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, TENSORS, {"origin": "test"})
    return path


def test_what_was_saved_is_what_is_opened(file):
    checkpoint = open_checkpoint(file)
    assert checkpoint.metadata == {"origin": "test"}
    assert checkpoint.shape("a.weight") == (2, 3) and checkpoint.dtype("b.bias") == torch.bfloat16
    assert checkpoint.nbytes == 6 * 4 + 4 * 2
    for name, tensor in TENSORS.items():
        assert torch.equal(checkpoint.tensor(name), tensor)


def test_two_writers_of_one_file_do_not_meet(file, monkeypatch):
    """The second starts and ends while the first has written, but not yet named its file."""
    write = checkpoint_module.save_file

    def interrupted(tensors, path, metadata):
        write(tensors, path, metadata=metadata)
        if "first" in tensors:
            save_checkpoint(file, {"second": torch.ones(1)})

    monkeypatch.setattr(checkpoint_module, "save_file", interrupted)
    save_checkpoint(file, {"first": torch.ones(1)})
    assert list(open_checkpoint(file).tensors) == ["first"]
    assert list(file.parent.iterdir()) == [file]


def test_mapped_tensors_never_write_to_the_file(file):
    before = file.read_bytes()
    open_checkpoint(file).tensor("a.weight").fill_(7)
    assert file.read_bytes() == before


def test_an_absent_tensor_is_named(file):
    with pytest.raises(CheckpointError, match="no tensor 'c'"):
        open_checkpoint(file).tensor("c")


@pytest.mark.parametrize(
    "prefix",
    [
        "model.diffusion_model.",
        "diffusion_model.",
        "transformer.",
        "model.",
        "module.",
        "module.model.",
        "vae.",
    ],
)
def test_a_prefix_on_all_names_is_dropped(tmp_path, prefix):
    save_checkpoint(tmp_path / "m.safetensors", {prefix + name: t for name, t in TENSORS.items()})
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    assert set(checkpoint.tensors) == set(TENSORS) and checkpoint.prefix == prefix
    assert torch.equal(checkpoint.tensor("a.weight"), TENSORS["a.weight"])


def test_a_prefix_on_some_names_stays(tmp_path):
    save_checkpoint(tmp_path / "m.safetensors", {"model.a": torch.ones(1), "b": torch.ones(1)})
    assert set(open_checkpoint(tmp_path / "m.safetensors").tensors) == {"model.a", "b"}


def test_an_all_in_one_file_gives_the_part_asked_for(tmp_path):
    path = tmp_path / "all.safetensors"
    save_checkpoint(
        path,
        {"model.diffusion_model.a": torch.ones(1), "vae.b": torch.ones(1), "text_encoders.c": torch.ones(1)},
    )
    assert set(open_checkpoint(path).tensors) == {"a"}
    assert set(open_checkpoint(path, part="vae").tensors) == {"b"}


@pytest.fixture
def sharded(tmp_path):
    """A pipeline folder with a transformer in two shards."""
    folder = tmp_path / "pipeline" / "transformer"
    stem = "diffusion_pytorch_model"
    files = {name: f"{stem}-0000{i + 1}-of-00002.safetensors" for i, name in enumerate(TENSORS)}
    for name, shard in files.items():
        save_checkpoint(folder / shard, {name: TENSORS[name]})
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text('{"attention_type": "nabla"}')
    return folder


@pytest.mark.parametrize("inside", ["..", ".", "diffusion_pytorch_model.safetensors.index.json"])
def test_a_sharded_folder_opens_from_its_parent_itself_or_its_index(sharded, inside):
    checkpoint = open_checkpoint(sharded / inside)
    assert set(checkpoint.tensors) == set(TENSORS) and len(checkpoint.files) == 2
    assert checkpoint.config == {"attention_type": "nabla"}
    for name, tensor in TENSORS.items():
        assert torch.equal(checkpoint.tensor(name), tensor)


def test_a_missing_shard_is_named(sharded):
    (sharded / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 missing.*00002-of-00002"):
        open_checkpoint(sharded)


def test_an_index_that_leaves_its_folder_is_refused(sharded):
    index = sharded / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        open_checkpoint(index)


def test_an_index_whose_shard_lacks_a_tensor_is_refused(sharded):
    index = sharded / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = "diffusion_pytorch_model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="ghost"):
        open_checkpoint(index)


def test_a_folder_without_weights_and_one_with_a_choice_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no .safetensors or .gguf file"):
        open_checkpoint(tmp_path)
    for name in ("one", "two"):
        save_checkpoint(tmp_path / f"{name}.safetensors", TENSORS)
    with pytest.raises(CheckpointError, match="Choose one"):
        open_checkpoint(tmp_path)


def test_a_folder_of_pickles_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="only pickled"):
        open_checkpoint(tmp_path)


def test_a_truncated_file_names_both_sizes(file):
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    with pytest.raises(CheckpointError, match=f"{len(whole) - 3:,} bytes on disk.*{len(whole):,}") as caught:
        open_checkpoint(file)
    assert str(file) in str(caught.value)


def test_a_header_longer_than_the_file_is_named(file):
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="40 bytes on disk, its header alone needs"):
        open_checkpoint(file)


def test_bytes_after_the_last_tensor_are_named(file):
    whole = file.read_bytes()
    file.write_bytes(whole + b"xx")
    with pytest.raises(
        CheckpointError, match=f"is damaged: {len(whole) + 2:,} bytes on disk, {len(whole):,} expected"
    ):
        open_checkpoint(file)


def raw_file(header: dict[str, object], data_bytes: int) -> bytes:
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(data_bytes)


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"a": ONE, "b": ONE}, "'b' does not follow"),
        ({"a": ONE | {"shape": [2]}}, r"'a' is F32 \[2\] but stores 4 bytes"),
        ({"a": ONE | {"shape": [-1]}}, "'a' is not a tensor"),
        ({"a": {"dtype": "F32"}}, "'a' is not a tensor"),
        ({"__metadata__": {"n": 1}, "a": ONE}, "metadata is not a table of strings"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(file, header, said):
    file.write_bytes(raw_file(header, 4 * (len(header) - ("__metadata__" in header))))
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(file)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"abc", "only 3 bytes"),
        (b"PK\x03\x04" + bytes(60), "Pickle files can run code"),
        (pickle.dumps({"weight": [1.0] * 9}), "Pickle files can run code"),
        (b"GGUF" + bytes(60), "damaged or incomplete GGUF file"),
        (b"<!DOCTYPE html><html><body>Sign in to download</body></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "git lfs pull"),
        (b"\xff" * 64, "not a safetensors file"),
        (struct.pack("<Q", 5) + b"hello", "not JSON"),
        (struct.pack("<Q", 2) + b"[]", "not a table"),
        (struct.pack("<Q", 2) + b"{}", "no tensors"),
    ],
)
def test_a_file_that_is_something_else_says_what(tmp_path, content, said):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_a_pickle_suffix_is_refused_unread(tmp_path, suffix):
    path = (tmp_path / "model").with_suffix(suffix)
    path.write_bytes(b"whatever")
    with pytest.raises(CheckpointError, match="only .safetensors is read"):
        open_checkpoint(path)


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere.safetensors does not exist"):
        open_checkpoint(tmp_path / "nowhere.safetensors")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(position=st.integers(0, 300), value=st.binary(min_size=1, max_size=4))
def test_a_header_with_any_damage_opens_or_says_so(tmp_path, position, value):
    path = tmp_path / "damaged.safetensors"
    save_checkpoint(path, TENSORS, {"origin": "test"})
    content = bytearray(path.read_bytes())
    content[position : position + len(value)] = value
    path.write_bytes(content)
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError as error:
        assert str(path) in str(error)
    else:
        assert checkpoint.tensors


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(keep=st.integers(0, 230))
def test_no_truncation_goes_unnoticed(tmp_path, keep):
    path = tmp_path / "short.safetensors"
    save_checkpoint(path, TENSORS, {"origin": "test"})
    content = path.read_bytes()
    path.write_bytes(content[: min(keep, len(content) - 1)])
    with pytest.raises(CheckpointError):
        open_checkpoint(path)


def test_a_failed_save_leaves_the_old_file_and_no_litter(file, file_size_limit):
    before = file.read_bytes()
    with file_size_limit(4096), pytest.raises(CheckpointError, match="8,000 bytes.* cannot be written"):
        save_checkpoint(file, {"big": torch.zeros(2000)})
    assert file.read_bytes() == before
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]
