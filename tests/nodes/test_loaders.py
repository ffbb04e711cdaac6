"""What the loaders refuse before anything runs."""

from __future__ import annotations

import pytest
import tiny
from comfyui_kandinsky5.kandinsky_core import nano
from comfyui_kandinsky5.nodes import files, host
from comfyui_kandinsky5.nodes.files import is_model_folder
from comfyui_kandinsky5.nodes.host_standalone import StandaloneHost
from comfyui_kandinsky5.nodes.loaders import K5LoadModel, K5LoadTextEncoder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The tiny models' folders."""
    folder = tmp_path_factory.mktemp("models")
    tiny.write(folder)
    return folder


@pytest.fixture(autouse=True)
def folders(models, monkeypatch):
    """A host that sees the tiny models only."""
    monkeypatch.setattr(host, "_current", [StandaloneHost(models=models)])


@pytest.mark.parametrize("variant", ["auto", "lite_i2v_5s", None])
def test_fitting_variant_is_valid(variant):
    assert K5LoadModel.validate_inputs(tiny.VIDEO, variant) is True


@pytest.mark.parametrize(("variant", "words"), [("pro_t2v_5s_sd", "another model"), ("no such", "Unknown variant")])
def test_contradicting_variant_is_named(variant, words):
    assert words in K5LoadModel.validate_inputs(tiny.VIDEO, variant)


def test_every_built_in_file_is_offered_and_the_video_one_first(tmp_path, monkeypatch):
    paths = nano.files(tmp_path)
    monkeypatch.setattr(nano, "files", lambda: paths)
    assert not any(name.endswith(files.BUILT_IN) for kind in files.FOLDERS for name in files.names(kind))
    for path in paths.values():
        path.touch()
    offered = {kind: [n for n in files.names(kind) if n.endswith(files.BUILT_IN)] for kind in files.FOLDERS}
    assert offered[files.MODEL] == [files.built_in(key) for key in ("model", "image_model", "edit_model")]
    assert offered[files.VAE] == [files.built_in(key) for key in ("vae", "image_vae")]
    assert [len(names) for names in offered.values()] == [3, 1, 1, 2]
    for kind, names in offered.items():
        assert files.names(kind)[0] == names[0]
        assert {files.locate(kind, name) for name in names} <= set(paths.values())


def test_text_encoders_are_told_apart():
    check = K5LoadTextEncoder.validate_inputs
    assert check(tiny.QWEN, tiny.CLIP) is True and check(None, None) is True
    assert "is not Qwen2.5-VL" in check(tiny.CLIP, tiny.CLIP)
    assert "is not CLIP's text encoder" in check(tiny.QWEN, tiny.QWEN)
    assert "is not CLIP's text encoder" in check(None, tiny.QWEN)
    assert "not there" in check(tiny.QWEN, "gone")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"model_type": "clip"}', True),
        ('{"_class_name": "A"}', True),
        ('{"note": 1}', False),
        ("[", False),
        ("[]", False),
    ],
)
def test_model_folder_is_known_by_its_class(tmp_path, text, expected):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert is_model_folder(tmp_path) is expected
    assert not is_model_folder(tmp_path / "other")
