"""The training objective: noise minus data, known parts excepted, at times that lean towards noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import ShapeError
from comfyui_kandinsky5.kandinsky_core.model.crossdit import CrossDiT
from comfyui_kandinsky5.kandinsky_core.sampling.conditioning import Known, TextCondition
from comfyui_kandinsky5.kandinsky_core.sampling.flow import sample, velocity_of
from comfyui_kandinsky5.kandinsky_core.sampling.schedule import timesteps
from comfyui_kandinsky5.kandinsky_core.train.losses import flow_matching_loss, logit_normal_times
from comfyui_kandinsky5.kandinsky_core.variants import NANO_EDIT, NANO_VIDEO
from torch.testing import assert_close


class Oracle:
    """A transformer that knows the answer; remembers its input."""

    def __init__(self, spec, target_BCTHW):
        self.spec = spec
        self.target = target_BCTHW

    def __call__(self, x_BTHWC, *_, **given):
        self.seen, self.given = x_BTHWC, given
        return self.target.movedim(1, -1)


def case(frames=3):
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 2, 16, frames, 4, 4)
    return clean, TextCondition(torch.zeros(2, 1, 96), torch.zeros(2, 64)), torch.tensor([0.25, 0.75]), noise


def test_the_target_is_noise_minus_data_of_the_mixture_at_time_t():
    clean, text, time_B, noise = case()
    model = Oracle(NANO_VIDEO, noise - clean)
    assert flow_matching_loss(model, clean, text, time_B, noise).item() == pytest.approx(0, abs=1e-12)
    assert_close(model.seen[0, ..., :16].movedim(-1, 0), 0.75 * clean[0] + 0.25 * noise[0])
    assert_close(model.seen[1, ..., :16].movedim(-1, 0), 0.25 * clean[1] + 0.75 * noise[1])
    assert model.seen[..., 16:].abs().max() == 0
    model.target = model.target + 2
    assert flow_matching_loss(model, clean, text, time_B, noise).item() == pytest.approx(4, rel=1e-5)


def test_known_frames_are_given_clean_and_do_not_count():
    clean, text, time_B, noise = case()
    model = Oracle(NANO_VIDEO, noise - clean)
    model.target[:, :, 0] += 5
    known = Known(frames_BCTHW=clean[:, :, :1])
    assert flow_matching_loss(model, clean, text, time_B, noise, known=known).item() == pytest.approx(0, abs=1e-12)
    assert flow_matching_loss(model, clean, text, time_B, noise).item() > 1
    flow_matching_loss(model, clean, text, time_B, noise, known=known)
    assert_close(model.seen[:, 0, ..., :16].movedim(-1, 1), clean[:, :, 0])
    assert (model.seen[:, 0, ..., -1] == 1).all() and (model.seen[:, 1:, ..., -1] == 0).all()


def test_the_picture_to_edit_stands_beside_the_noise():
    clean, text, time_B, noise = case(frames=1)
    before = torch.randn_like(clean)
    model = Oracle(NANO_EDIT, noise - clean)
    flow_matching_loss(model, clean, text, time_B, noise, known=Known(edit_BCTHW=before))
    assert_close(model.seen[..., 16:32].movedim(-1, 1), before)
    assert (model.seen[..., 32] == 1).all()
    with pytest.raises(ShapeError, match="cannot edit"):
        flow_matching_loss(Oracle(NANO_VIDEO, clean), clean, text, time_B, noise, known=Known(edit_BCTHW=before))


def test_training_lowers_the_loss_and_sampling_then_finds_the_data():
    """Two prompts, two clips: the objective, the sampler and the model agree on direction, scale and time."""
    torch.manual_seed(0)
    spec = replace(NANO_VIDEO, model_dim=64, ff_dim=128, num_visual_blocks=1, axes_dims=(8, 12, 12))
    model = CrossDiT(spec)
    clean = torch.randn(2, 16, 1, 1, 1).expand(-1, -1, 1, 2, 2).contiguous()
    text = TextCondition(torch.randn(2, 3, 96), torch.randn(2, 64))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        rows = torch.randint(2, (16,), generator=generator)
        batch = TextCondition(text.features_BLD[rows], text.pooled_BP[rows])
        noise = torch.randn(16, *clean.shape[1:], generator=generator)
        loss = flow_matching_loss(model, clean[rows], batch, logit_normal_times(16, generator), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    velocity = velocity_of(model.eval(), text, dtype=torch.float32, rope_scale=(1.0, 1.0, 1.0))
    with torch.no_grad():
        made = sample(velocity, torch.randn(clean.shape, generator=generator), timesteps(16, 1.0))
    assert (made - clean).square().mean() < 0.15 < 1 < (made - clean.flip(0)).square().mean()


def test_times_follow_the_shift():
    draws = [logit_normal_times(4000, torch.Generator().manual_seed(0), shift=s) for s in (1.0, 3.0)]
    assert draws[0].median().item() == pytest.approx(0.5, abs=0.02)
    assert draws[1].median().item() == pytest.approx(0.75, abs=0.02)
    assert all(t.min() > 0 and t.max() < 1 for t in draws)
