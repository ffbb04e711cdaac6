"""Start images and prompts: what reaches the host, and what is refused before."""

from __future__ import annotations

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import ShapeError, TextError
from comfyui_kandinsky5.kandinsky_core.variants import VARIANTS
from comfyui_kandinsky5.nodes import conditioning
from comfyui_kandinsky5.nodes.conditioning import CROP, STRETCH, fit_image, with_values
from torch.testing import assert_close


def gradient(rows, columns):
    """An image whose red channel says the column and whose green channel says the row, 0…1."""
    y, x = torch.meshgrid(torch.linspace(0, 1, rows), torch.linspace(0, 1, columns), indexing="ij")
    return torch.stack((x, y, torch.zeros_like(x)), -1)[None]


def test_fitting_size_is_left_alone():
    image = torch.rand(2, 48, 64, 3)
    assert_close(fit_image(image, 64, 48, CROP), image)


def test_crop_keeps_proportions_and_the_middle():
    fitted = fit_image(gradient(100, 300), 64, 64, CROP)
    red = fitted[0, 32, :, 0]
    assert fitted.shape == (1, 64, 64, 3)
    assert abs(red[0] - 1 / 3) < 0.02 and abs(red[-1] - 2 / 3) < 0.02  # the middle third
    assert fitted[0, 0, 32, 1] < 0.02 and fitted[0, -1, 32, 1] > 0.98  # the whole height


def test_stretch_keeps_everything():
    fitted = fit_image(gradient(100, 300), 64, 64, STRETCH)
    assert fitted[0, 32, 0, 0] < 0.02 and fitted[0, 32, -1, 0] > 0.98


def test_alpha_is_dropped_and_emptiness_refused():
    assert fit_image(torch.rand(1, 32, 32, 4), 16, 16, CROP).shape == (1, 16, 16, 3)
    for wrong in (torch.rand(32, 32, 3), torch.rand(0, 32, 32, 3), torch.rand(1, 32, 32, 1)):
        with pytest.raises(ShapeError, match="An image is"):
            fit_image(wrong, 16, 16, CROP)


def test_conditioning_is_copied_not_changed():
    given = [[torch.zeros(1, 2, 3), {"pooled_output": torch.zeros(1, 4)}]]
    changed = with_values(given, {"extra": 1})
    assert changed[0][1]["extra"] == 1 and "extra" not in given[0][1]


class Model:
    """Stands for a MODEL of one variant."""

    def __init__(self, name):
        self.variant = VARIANTS[name]


@pytest.fixture
def rows(monkeypatch):
    """A host that knows the variant of `Model`, and nothing else."""
    known = type("Known", (), {"variant_of": staticmethod(lambda model: model.variant)})
    monkeypatch.setattr(conditioning, "host", lambda: known)


@pytest.mark.parametrize(
    ("template", "limit", "model", "expected"),
    [
        ("auto", 0, None, ("video", 256)),
        ("image", 0, None, ("image", 512)),
        ("auto", 0, "lite_t2i", ("image", 512)),
        ("auto", 0, "lite_t2v_5s_sft", ("video", 256)),
        ("image", 0, "lite_t2v_5s_sft", ("image", 256)),
        ("video", 40, "lite_t2i", ("video", 40)),
    ],
)
def test_template_and_limit_follow_the_model_unless_chosen(rows, template, limit, model, expected):
    assert conditioning._text_settings(template, limit, model and Model(model)) == expected


def test_unknown_template_is_named():
    with pytest.raises(TextError, match="Choose one of: auto, video, image"):
        conditioning._text_settings("film", 0, None)
