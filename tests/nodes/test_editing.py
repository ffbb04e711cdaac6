"""The Image Edit node: what both passes get, which size is chosen, and what is refused before anything is encoded."""

from __future__ import annotations

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import KandinskyError, ShapeError, TextError
from comfyui_kandinsky5.kandinsky_core.variants import VARIANTS
from comfyui_kandinsky5.nodes import editing
from comfyui_kandinsky5.nodes.editing import AS_IMAGE, K5ImageEdit, size_as
from comfyui_kandinsky5.nodes.host import KNOWN_EDIT, EncodedText, VAEFacts, shown
from comfyui_kandinsky5.nodes.size import CUSTOM
from torch.testing import assert_close


class Recorder:
    """A host that keeps what it was asked to encode; MODEL and VAE are names."""

    def __init__(self):
        self.prompts, self.pictures = [], []

    def variant_of(self, model):
        return VARIANTS.get(model)

    def vae_facts(self, vae):
        return vae and VAEFacts(vae)

    def encode_text(self, _clip, prompt, *, template, max_tokens, images=()):
        self.prompts.append((prompt, template, max_tokens, images))
        return EncodedText([[torch.zeros(1, 3, 8), {"pooled_output": torch.zeros(1, 4)}]], 3, 0, "a note")

    def vae_encode(self, _vae, image_THWC):
        self.pictures.append(image_THWC)
        return image_THWC[:, ::8, ::8, :1].movedim(-1, 1).expand(-1, 16, -1, -1)

    def zeros(self, shape):
        return torch.zeros(shape)


@pytest.fixture
def edit(monkeypatch):
    """Run the node; returns (host, positive, negative, latent, report)."""

    def run(image=None, **changes):
        host = Recorder()
        monkeypatch.setattr(editing, "host", lambda: host)
        inputs = {
            "clip": "clip", "vae": "flux", "image": torch.rand(1, 60, 100, 3) if image is None else image,
            "prompt": "make it red", "negative_prompt": "", "size": CUSTOM, "width": 96, "height": 64, "fit": "crop",
        }  # fmt: skip
        return host, *K5ImageEdit.execute(**(inputs | changes)).args

    return run


def test_both_passes_see_the_fitted_picture_as_the_released_pipeline_does(edit):
    host, positive, negative, latent, report = edit()
    assert [call[:3] for call in host.prompts] == [
        ("make it red", "image_edit", 1024),
        ("", "image_edit", 1024),
    ]
    (encoded_1HWC,) = host.pictures
    assert encoded_1HWC.shape == (1, 64, 96, 3)
    for *_, images in host.prompts:
        assert len(images) == 1 and torch.equal(images[0], encoded_1HWC[0])
    for prompt in (positive, negative):
        assert prompt[0][1][KNOWN_EDIT].shape == (1, 16, 8, 12)
        assert torch.equal(prompt[0][1][KNOWN_EDIT][0, 0], encoded_1HWC[0, ::8, ::8, 0])
    assert latent["samples"].shape == (1, 16, 8, 12) and not latent["samples"].any()
    assert "96 × 64, crop from 100 × 60" in report and "3 tokens" in report
    assert report.count("a note") == 1


def test_the_text_encoder_gets_its_own_range_and_layout():
    (picture,) = shown([torch.tensor([0.0, 0.5, 1.0, 0.3]).expand(4, 6, 4)])
    assert picture.shape == (3, 4, 6)
    assert_close(picture[:, 0, 0], torch.tensor([-1.0, 0.0, 1.0]))


@pytest.mark.parametrize(
    ("rows", "columns", "model", "expected"),
    [
        (1080, 1920, None, (1280, 768)),
        (500, 500, None, (1024, 1024)),
        (1920, 1080, "lite_i2i", (768, 1280)),
        (60, 100, "nano_edit", (128, 128)),
        (240, 250, "nano_edit", (256, 256)),
    ],
)
def test_size_as_the_image_is_the_models_nearest(edit, rows, columns, model, expected):
    host, *_, latent, _ = edit(torch.rand(1, rows, columns, 3), size=AS_IMAGE, model=model)
    assert host.pictures[0].shape == (1, expected[1], expected[0], 3)
    assert latent["samples"].shape[2:] == (expected[1] // 8, expected[0] // 8)


def test_area_decides_between_sizes_of_one_shape_only():
    sizes = ((128, 128), (64, 128), (256, 256))
    assert size_as(torch.zeros(1, 1000, 900, 3), sizes) == (256, 256)
    assert size_as(torch.zeros(1, 1000, 2100, 3), sizes) == (128, 64)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"prompt": " \n"}, TextError, "prompt is empty"),
        ({"clip": None}, TextError, "Text Encoder Loader"),
        ({"vae": "hunyuan"}, KandinskyError, "needs the FLUX autoencoder"),
        ({"vae": None}, KandinskyError, "needs the FLUX autoencoder"),
        ({"model": "lite_t2i"}, KandinskyError, "which cannot edit pictures"),
        ({"model": "nano_video"}, KandinskyError, "which cannot edit pictures"),
        ({"model": "another"}, KandinskyError, "not a Kandinsky 5 one"),
        ({"image": torch.rand(3, 60, 100, 3)}, ShapeError, "3 pictures"),
        ({"image": torch.rand(60, 100, 3)}, ShapeError, r"\[frames, height, width, 3\]"),
        ({"width": 100}, ShapeError, "100"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_encoded(edit, monkeypatch, changes, error, words):
    monkeypatch.setattr(Recorder, "encode_text", None)
    monkeypatch.setattr(Recorder, "vae_encode", None)
    with pytest.raises(error, match=words):
        edit(**changes)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (("", AS_IMAGE, 1024, 1024), "prompt is empty"),
        (("make it red", CUSTOM, 1000, 1024), "1000"),
        (("make it red", AS_IMAGE, 1000, 1024), None),
        ((None, None, None, None), None),
    ],
)
def test_validation_names_what_is_known_before_a_run(values, words):
    found = K5ImageEdit.validate_inputs(*values)
    assert found is True if words is None else words in found
