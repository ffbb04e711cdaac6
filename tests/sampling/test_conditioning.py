"""Channel assembly, known frames and first-frame normalisation."""

from __future__ import annotations

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core import sampling
from comfyui_kandinsky5.kandinsky_core.errors import ShapeError
from comfyui_kandinsky5.kandinsky_core.sampling import Known, transformer_input
from comfyui_kandinsky5.kandinsky_core.variants import IMAGE_EDIT, IMAGE_T2I, VIDEO_LITE


def _to_BCTHW(x_THWC):
    return x_THWC.permute(3, 0, 1, 2)[None]


@pytest.mark.parametrize("frames", [5, 7, 10, 31])
def test_normalisation_equals_golden(golden, frames):
    given, wanted = (golden("misc")[f"nff.T{frames}.{end}"] for end in ("in", "out"))
    got = sampling.normalise_first_frames(_to_BCTHW(given))
    torch.testing.assert_close(got, _to_BCTHW(wanted), atol=2e-6, rtol=0)


def test_normalisation_reference_length(golden):
    given, wanted = (golden("misc")[f"nff.T10.{end}"] for end in ("in", "out_ref2"))
    got = sampling.normalise_first_frames(_to_BCTHW(given), reference=2)
    torch.testing.assert_close(got, _to_BCTHW(wanted), atol=2e-6, rtol=0)


@pytest.mark.parametrize("frames", [1, 3, 4])
def test_short_clips_are_left_alone_where_the_released_code_gives_nan(golden, frames):
    given = _to_BCTHW(golden("misc")[f"nff.T{frames}.in"])
    assert torch.equal(sampling.normalise_first_frames(given), given)


def test_normalisation_is_per_sample():
    torch.manual_seed(0)
    x = torch.randn(2, 16, 7, 4, 4) * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1, 1)
    both = sampling.normalise_first_frames(x)
    torch.testing.assert_close(both[1:], sampling.normalise_first_frames(x[1:]))


def test_image_to_video_channels():
    x, frame = torch.randn(2, 16, 3, 4, 6), torch.randn(2, 16, 1, 4, 6)
    full = transformer_input(VIDEO_LITE, x, Known(frames_BCTHW=frame))
    assert full.shape == (2, 3, 4, 6, 33)
    assert torch.equal(full[:, :1, ..., :16].movedim(-1, 1), frame)
    assert torch.equal(full[:, 1:, ..., :16].movedim(-1, 1), x[:, :, 1:])
    assert (full[..., 16:32] == 0).all()
    assert (full[:, 0, ..., 32] == 1).all() and (full[:, 1:, ..., 32] == 0).all()


def test_text_to_video_has_no_mask():
    full = transformer_input(VIDEO_LITE, torch.randn(1, 16, 3, 4, 6))
    assert full.shape[-1] == 33 and (full[..., 16:] == 0).all()


def test_editing_channels():
    x, edit = torch.randn(1, 16, 1, 4, 4), torch.randn(1, 16, 1, 4, 4)
    full = transformer_input(IMAGE_EDIT, x, Known(edit_BCTHW=edit))
    assert torch.equal(full[..., 16:32].movedim(-1, 1), edit) and (full[..., 32] == 1).all()
    assert (transformer_input(IMAGE_EDIT, x)[..., 16:] == 0).all()


def test_text_to_image_has_sixteen_channels():
    assert transformer_input(IMAGE_T2I, torch.randn(1, 16, 1, 4, 4)).shape[-1] == 16


def test_wrong_conditions_are_refused():
    x = torch.randn(1, 16, 3, 4, 4)
    with pytest.raises(ShapeError, match="start image"):
        transformer_input(IMAGE_T2I, x, Known(frames_BCTHW=x[:, :, :1]))
    with pytest.raises(ShapeError, match="cannot edit"):
        transformer_input(VIDEO_LITE, x, Known(edit_BCTHW=x))
    with pytest.raises(ShapeError, match="latent size"):
        transformer_input(VIDEO_LITE, x, Known(frames_BCTHW=torch.randn(1, 16, 1, 8, 8)))
    with pytest.raises(ShapeError, match="channels"):
        transformer_input(VIDEO_LITE, torch.randn(1, 4, 3, 4, 4))
    with pytest.raises(ShapeError, match="latent size"):
        transformer_input(VIDEO_LITE, x, Known(frames_BCTHW=torch.randn(1, 1, 1, 4, 4)))
    with pytest.raises(ShapeError, match="3 start images for a batch of 2"):
        transformer_input(VIDEO_LITE, torch.randn(2, 16, 3, 4, 4), Known(frames_BCTHW=torch.randn(3, 16, 1, 4, 4)))
    with pytest.raises(ShapeError, match="latent size"):
        sampling.keep_known(x[:, :, :1], Known(frames_BCTHW=x))


def test_a_flat_frame_is_moved_not_divided_by_zero():
    x = torch.randn(1, 16, 7, 4, 4)
    x[:, :, 0] = 0.3
    out = sampling.normalise_first_frames(x)
    assert out.isfinite().all() and out[:, :, 0].std() == 0


def test_one_prompt_serves_a_batch_and_a_wrong_count_is_named():
    text = sampling.TextCondition(torch.randn(1, 5, 8), torch.randn(1, 4))
    assert text.expand(3).features_BLD.shape == (3, 5, 8)
    with pytest.raises(ShapeError, match="2 prompts for a batch of 3"):
        sampling.TextCondition(torch.randn(2, 5, 8), torch.randn(2, 4)).expand(3)
