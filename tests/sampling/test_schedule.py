"""The flow times against the golden schedules, and their laws."""

from __future__ import annotations

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import KandinskyError
from comfyui_kandinsky5.kandinsky_core.sampling import timesteps
from hypothesis import given
from hypothesis import strategies as st

CASES = ["50.10", "50.5", "50.3", "16.10", "16.5", "20.5", "30.10", "4.10", "4.5", "4.3", "50.1", "1.5", "7.2.5"]


@pytest.mark.parametrize("case", CASES)
def test_equals_golden(golden, case):
    steps, shift = case.split(".", 1)
    torch.testing.assert_close(
        timesteps(int(steps), float(shift)), golden("misc")[f"schedule.{case}"], atol=2e-7, rtol=0
    )


@given(st.integers(1, 200), st.floats(0.5, 20))
def test_falls_from_one_to_zero(steps, shift):
    times = timesteps(steps, shift)
    assert abs(times[0] - 1) < 1e-6 and times[-1] == 0 and len(times) == steps + 1
    assert (times.diff() < 0).all()


@given(st.integers(1, 60), st.floats(0.05, 1))
def test_denoise_keeps_the_end_of_a_longer_schedule(steps, denoise):
    times = timesteps(steps, 5.0, denoise)
    assert len(times) == steps + 1 and times[-1] == 0
    assert times[0] <= 1 + 1e-6


def test_partial_denoise_starts_below_one():
    assert timesteps(10, 5.0, 0.5)[0] == timesteps(20, 5.0)[10] < 1


def test_a_tiny_denoise_costs_no_memory():
    assert timesteps(4, 5.0, 1e-9)[0] < 1e-6


@pytest.mark.parametrize(
    "bad",
    [(0, 5.0, 1.0), (4, 0.0, 1.0), (4, float("nan"), 1.0), (4, float("inf"), 1.0), (4, 5.0, 0.0), (4, 5.0, 1.5)],
)
def test_bad_numbers_are_named(bad):
    with pytest.raises(KandinskyError):
        timesteps(*bad)
