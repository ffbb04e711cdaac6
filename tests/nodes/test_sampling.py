"""The sampler node around the host's sampler: presets, known frames, messages."""

from __future__ import annotations

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import KandinskyError, ShapeError
from comfyui_kandinsky5.kandinsky_core.sampling import normalise_first_frames
from comfyui_kandinsky5.kandinsky_core.variants import VARIANTS
from comfyui_kandinsky5.nodes import sampling
from comfyui_kandinsky5.nodes.host import KNOWN_EDIT, KNOWN_FRAMES
from comfyui_kandinsky5.nodes.sampling import K5Sample
from torch.testing import assert_close

TEXT = [[torch.zeros(1, 3, 3584), {"pooled_output": torch.zeros(1, 768)}]]


class Recorder:
    """A host whose sampler returns fixed noise and keeps what it was asked."""

    def __init__(self, row, shift=None, damage=False):
        self.row, self.shift, self.damage = row, shift, damage
        self.request = None

    def variant_of(self, _model):
        return self.row

    def variant_note(self, _model):
        return ""

    def shift_of(self, _model):
        return self.shift

    def attention_of(self, _model):
        return None

    def sample(self, _model, request):
        self.request = request
        out = torch.randn(request.latent["samples"].shape, generator=torch.Generator().manual_seed(3))
        return out * float("nan") if self.damage else out


@pytest.fixture
def sample(monkeypatch):
    """Run the node on a variant; returns (host, latent, report)."""

    def run(name, latent, positive=TEXT, *, negative=TEXT, shift_node=None, damage=False, **changes):
        recorder = Recorder(name and VARIANTS[name], shift_node, damage)
        monkeypatch.setattr(sampling, "host", lambda: recorder)
        settings = {
            "seed": 5, "steps": 0, "cfg": -1.0, "shift": 0.0, "sampler_name": "euler", "first_frame": "auto",
            "denoise": 1.0,
        }  # fmt: skip
        out = K5Sample.execute(
            object(), positive, negative, {"samples": latent, "tag": 1}, **(settings | changes)
        )
        return recorder, *out.args

    return run


def clip(frames=7):
    return torch.zeros(1, 16, frames, 4, 6)


def test_presets_are_the_variants(sample):
    host, _, report = sample("lite_t2v_5s_sft", clip())
    assert len(host.request.sigmas) == 51 and host.request.guidance == 5.0
    assert host.request.sigmas[-2].item() == pytest.approx(
        0.092593, abs=1e-6
    )  # N=50, s=5 of the released code
    assert "50 steps, guidance 5, shift 5, euler, seed 5" in report


def test_distilled_weights_run_short_and_without_the_negative_prompt(sample):
    host, _, _ = sample("lite_t2v_5s_distilled16", clip())
    assert len(host.request.sigmas) == 17 and host.request.negative is None


def test_own_settings_win_and_a_shift_node_before_the_preset(sample):
    host, _, report = sample("lite_t2v_5s_sft", clip(), steps=4, cfg=2.5, shift=7.0, shift_node=3.0)
    assert len(host.request.sigmas) == 5 and host.request.guidance == 2.5 and "shift 7" in report
    assert "shift 3" in sample("lite_t2v_5s_sft", clip(), shift_node=3.0)[2]
    host, _, report = sample("lite_t2v_5s_sft", clip(), steps=4, denoise=0.5)
    assert len(host.request.sigmas) == 5 and host.request.sigmas[0] < 1 and "denoise 0.5" in report


def start_image(frames=1):
    known = torch.linspace(-1, 1, 16 * frames * 24).reshape(1, 16, frames, 4, 6)
    return known, [[TEXT[0][0], {**TEXT[0][1], KNOWN_FRAMES: known}]]


def test_start_image_is_put_back_and_normalised_in_model_units(sample):
    known, positive = start_image()
    scale = VARIANTS["lite_i2v_5s"].vae.scaling_factor
    _, plain, _ = sample("lite_i2v_5s", clip(), positive, first_frame="off")
    assert_close(plain["samples"][:, :, :1], known)
    _, latent, report = sample("lite_i2v_5s", clip(), positive)
    assert_close(latent["samples"], normalise_first_frames(plain["samples"] * scale) / scale)
    assert "normalised" in report and "1 given latent frame" in report
    assert latent["tag"] == 1


def test_both_passes_see_the_start_image(sample):
    """Wiring the text node's negative straight into the sampler is common and must not change the task."""
    known, positive = start_image()
    host, _, _ = sample("lite_i2v_5s", clip(), positive)
    assert host.request.negative[0][1][KNOWN_FRAMES] is known


def test_a_start_image_on_the_negative_alone_is_refused(sample):
    with pytest.raises(ShapeError, match="only the negative prompt has a picture"):
        sample("lite_i2v_5s", clip(), negative=start_image()[1])


def picture_to_edit(rows=4):
    known = torch.linspace(-1, 1, 16 * rows * 6).reshape(1, 16, rows, 6)
    return known, [[TEXT[0][0], {**TEXT[0][1], KNOWN_EDIT: known}]]


def test_a_picture_to_edit_on_the_negative_alone_is_refused(sample):
    with pytest.raises(ShapeError, match="only the negative prompt has a picture"):
        sample("lite_i2i", torch.zeros(1, 16, 4, 6), negative=picture_to_edit()[1])


def test_both_passes_see_the_picture_to_edit(sample):
    known, positive = picture_to_edit()
    host, latent, report = sample("lite_i2i", torch.zeros(1, 16, 4, 6), positive)
    assert host.request.positive[0][1][KNOWN_EDIT] is host.request.negative[0][1][KNOWN_EDIT] is known
    assert latent["samples"].shape == (1, 16, 4, 6)
    assert "edits the given picture" in report


def test_an_editing_model_makes_pictures_from_text_alone(sample):
    assert "edits" not in sample("lite_i2i", torch.zeros(1, 16, 4, 6))[2]


def test_the_report_does_not_claim_a_normalisation_that_cannot_happen(sample):
    _, positive = start_image()
    _, latent, report = sample("lite_i2v_5s", clip(4), positive, first_frame="on")
    assert "not normalised" in report
    assert_close(latent["samples"][:, :, :1], start_image()[0])


def test_a_guessed_variant_is_said(sample, monkeypatch):
    monkeypatch.setattr(Recorder, "variant_note", lambda self, model: "guessed")
    assert "guessed" in sample("lite_t2v_5s_sft", clip())[2]


def test_negative_guidance_is_refused(sample):
    with pytest.raises(KandinskyError, match="below 0"):
        sample("lite_t2v_5s_sft", clip(), cfg=-0.5)


def test_normalisation_follows_the_variant_unless_chosen(sample):
    _, positive = start_image()
    assert "normalised" not in sample("lite_t2v_5s_sft", clip(), positive)[2]
    assert "normalised" in sample("lite_t2v_5s_sft", clip(), positive, first_frame="on")[2]
    assert "normalised" not in sample("lite_i2v_5s", clip())[2]


@pytest.mark.parametrize("width, extras", [
    (96, {"pooled_output": torch.zeros(1, 64)}), (3584, {"pooled_output": torch.zeros(1, 64)}), (3584, {}),
])  # fmt: skip
def test_features_of_another_text_encoder_are_refused_before_sampling(sample, width, extras):
    with pytest.raises(ShapeError, match="takes text features 3584 wide and a pooled vector of 768"):
        sample("lite_t2v_5s_sft", clip(), [[torch.zeros(1, 3, width), extras]])


def test_pictures_and_clips_get_the_axes_the_model_wants(sample):
    assert sample("lite_t2i", torch.zeros(1, 16, 1, 4, 6))[0].request.latent["samples"].ndim == 4
    assert sample("lite_t2v_5s_sft", torch.zeros(1, 16, 4, 6))[0].request.latent["samples"].ndim == 5


@pytest.mark.parametrize(
    ("name", "latent", "positive", "error", "words"),
    [
        (None, clip(), TEXT, KandinskyError, "not a Kandinsky 5 one"),
        ("lite_t2i", clip(), TEXT, ShapeError, "Set length to 1"),
        ("lite_t2i", torch.zeros(1, 16, 4, 6), start_image()[1], ShapeError, "takes no start image"),
        (
            "lite_i2v_5s",
            torch.zeros(1, 16, 7, 8, 8),
            start_image()[1],
            ShapeError,
            "same Image to Video node",
        ),
        ("lite_i2v_5s", clip(1), start_image(2)[1], ShapeError, "same Image to Video node"),
        ("lite_t2i", torch.zeros(1, 16, 4, 6), picture_to_edit()[1], ShapeError, "cannot edit pictures"),
        ("lite_i2v_5s", clip(), picture_to_edit()[1], ShapeError, "cannot edit pictures"),
        ("lite_i2i", torch.zeros(1, 16, 4, 6), picture_to_edit(8)[1], ShapeError, "same Image Edit node"),
    ],
)
def test_what_cannot_work_is_refused_before_sampling(sample, name, latent, positive, error, words):
    with pytest.raises(error, match=words):
        sample(name, latent, positive)


def test_damage_is_not_passed_on(sample):
    with pytest.raises(KandinskyError, match="NaN"):
        sample("lite_t2v_5s_sft", clip(), damage=True)
