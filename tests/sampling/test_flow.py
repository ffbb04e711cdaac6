"""The sampling loop on velocities whose answer is known."""

from __future__ import annotations

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core import sampling
from comfyui_kandinsky5.kandinsky_core.sampling import Known


def _straight_to(data):
    """Velocity of the straight path from the noise to `data`: x = (1 - t) data + t noise."""
    return lambda x, t: (x - data) / t.clamp_min(1e-9)


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_straight_paths_are_integrated_exactly(steps):
    data, noise = torch.randn(1, 16, 2, 4, 4), sampling.noise((1, 16, 2, 4, 4), seed=1)
    got = sampling.sample(_straight_to(data), noise, sampling.timesteps(steps, 5.0))
    torch.testing.assert_close(got, data, atol=2e-5, rtol=0)


def test_velocity_is_asked_once_per_step_at_the_scheduled_times():
    asked = []

    def velocity(x, t):
        asked.append(float(t))
        return torch.zeros_like(x)

    times = sampling.timesteps(6, 3.0)
    sampling.sample(velocity, torch.zeros(1, 16, 1, 2, 2), times)
    assert asked == times[:-1].tolist()


def test_guidance_formula_and_the_skipped_null_pass():
    text, null = (lambda x, t: x + 1), (lambda x, t: x - 1)
    x, t = torch.randn(3), torch.tensor(0.5)
    torch.testing.assert_close(sampling.guide(text, null, 5.0)(x, t), (x - 1) + 5.0 * 2)

    def never(x, t):
        raise AssertionError("the null pass must not run at weight 1")

    torch.testing.assert_close(sampling.guide(text, never, 1.0)(x, t), x + 1)


def test_the_prompt_is_asked_before_the_null_prompt():
    order = []
    text = lambda x, t: order.append("text") or x  # noqa: E731
    null = lambda x, t: order.append("null") or x  # noqa: E731
    sampling.guide(text, null, 2.0)(torch.zeros(1), torch.tensor(0.5))
    assert order == ["text", "null"]


def test_callback_sees_the_known_frames_in_the_clean_estimate():
    frame, seen = torch.randn(1, 16, 1, 4, 4), []
    sampling.sample(
        lambda x, t: x * 3, torch.randn(1, 16, 3, 4, 4), sampling.timesteps(3, 5.0), known=Known(frames_BCTHW=frame),
        on_step=lambda done, total, x, clean: seen.append(clean),
    )  # fmt: skip
    assert len(seen) == 3 and all(torch.equal(clean[:, :, :1], frame) for clean in seen)


def test_known_frames_come_back_untouched():
    frame = torch.randn(1, 16, 1, 4, 4)
    got = sampling.sample(
        lambda x, t: x, torch.randn(2, 16, 3, 4, 4), sampling.timesteps(3, 5.0), known=Known(frames_BCTHW=frame)
    )
    assert torch.equal(got[:, :, :1], frame.expand(2, -1, -1, -1, -1))


def test_partial_denoise_starts_from_the_given_latent():
    start, noise = torch.randn(1, 16, 1, 2, 2), torch.randn(1, 16, 1, 2, 2)
    times = sampling.timesteps(4, 3.0, denoise=0.5)
    seen = []

    def velocity(x, t):
        seen.append(x)
        return torch.zeros_like(x)

    sampling.sample(velocity, noise, times, start_BCTHW=start)
    torch.testing.assert_close(seen[0], times[0] * noise + (1 - times[0]) * start)


def test_noise_depends_on_the_seed_only():
    assert torch.equal(sampling.noise((1, 4), 7), sampling.noise((1, 4), 7))
    assert not torch.equal(sampling.noise((1, 4), 7), sampling.noise((1, 4), 8))


def test_callback_sees_every_step_and_can_cancel():
    class Cancelled(Exception):
        pass

    seen = []

    def on_step(done, total, x, clean):
        seen.append((done, total))
        if done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        sampling.sample(lambda x, t: x, torch.randn(1, 1), sampling.timesteps(5, 5.0), on_step=on_step)
    assert seen == [(1, 5), (2, 5)]
