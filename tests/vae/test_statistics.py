"""Statistics as values, and the short form of the upsamplers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import ShapeError
from comfyui_kandinsky5.kandinsky_core.vae.causal import StreamedUp
from comfyui_kandinsky5.kandinsky_core.vae.hunyuan import CausalConv3d, Upsampler
from comfyui_kandinsky5.kandinsky_core.vae.region import Region
from comfyui_kandinsky5.kandinsky_core.vae.statistics import (
    Given,
    Norm,
    Recorded,
    Running,
    Sampled,
    Seen,
    Statistics,
    measure,
)
from comfyui_kandinsky5.kandinsky_core.vae.tiling import sample_windows, sampled_latents, samples
from tiny_vae import Own
from torch import nn
from torch.testing import assert_close

WHOLE = Region(0, 4, 0, 6)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def seen(x, rate=1, core=WHOLE):
    return Seen("norm", 4, x, core, rate)


def normalised(norm, x, moments, silu=True):
    out = torch.full_like(x, torch.nan)
    Norm("norm", norm, x).write(x, moments, out, silu=silu)
    return out


@pytest.mark.parametrize("channels", [4, 12, 96])
def test_measured_moments_make_the_group_norm(channels):
    norm = nn.GroupNorm(4, channels, eps=1e-6, dtype=torch.float64).requires_grad_(False)
    norm.weight.uniform_(0.5, 1.5)
    norm.bias.uniform_(-0.5, 0.5)
    x = torch.randn(2, channels, 3, 4, 6, dtype=torch.float64) * 3 + 5
    assert_close(normalised(norm, x, measure(x, 4)), nn.functional.silu(norm(x)))
    assert_close(normalised(norm, x, measure(x, 4), silu=False), norm(x))


def test_parts_merge_to_the_whole_by_their_counts():
    x = torch.randn(2, 12, 7, 4, 6, dtype=torch.float64) + torch.arange(7).view(7, 1, 1)
    whole, source = measure(x, 4), Recorded()
    for part in (x[:, :, :1], x[:, :, 1:3], x[:, :, 3:]):
        source.begin()
        source.moments(seen(part))
        source.begin()  # the step failed and runs again
        source.moments(seen(part))
        source.commit()
    merged = source.statistics.moments["norm"]
    assert merged.count == whole.count
    assert_close((merged.mean_BG, merged.spread_BG), (whole.mean_BG, whole.spread_BG))


def test_context_around_a_piece_is_not_counted():
    x = torch.randn(1, 8, 2, 4, 6, dtype=torch.float64)
    source, core = Recorded(), Region(1, 3, 2, 6)
    got, wanted = source.moments(seen(x, core=core)), measure(x[..., 1:3, 2:6], 4)
    assert got.count == wanted.count == 2 * 2 * 2 * 4 and torch.equal(got.mean_BG, wanted.mean_BG)


@pytest.mark.parametrize("rate", [1, 4])
def test_a_running_window_is_17_latent_frames_long_or_a_little_more(rate):
    frames, step = torch.randn(1, 8, 40 * rate, 4, 6, dtype=torch.float64), 2 * rate
    source = Running()
    for start in range(0, 40 * rate, step):
        source.begin()
        moments = source.moments(seen(frames[:, :, start : start + step], rate))
        source.commit()
    assert_close(moments.mean_BG, measure(frames[:, :, -18 * rate :], 4).mean_BG)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_input_keeps_float32_moments(dtype):
    x = (torch.randn(1, 64, 3, 8, 12) + 30).to(dtype)
    norm = nn.GroupNorm(4, 64, eps=1e-6).requires_grad_(False).to(dtype)
    moments = measure(x, 4)
    assert moments.mean_BG.dtype == torch.float32
    wanted = nn.functional.group_norm(x.float(), 4, norm.weight.float(), norm.bias.float(), 1e-6)
    assert_close(normalised(norm, x, moments, silu=False).float(), wanted, atol=0.02, rtol=0.01)


def test_statistics_of_another_shape_are_refused():
    norm, x = nn.GroupNorm(4, 8), torch.randn(2, 8, 1, 4, 6)
    for moments in (measure(x, 2), measure(x.repeat(2, 1, 1, 1, 1), 4)):
        with pytest.raises(ShapeError, match="Statistics of norm"):
            normalised(norm, x, moments)
    assert Given(Statistics({"norm": measure(x, 4)})).moments(seen(x)).count == 2 * 24


def test_sampled_windows_lie_evenly_in_the_clip():
    for latents in range(1, 200):
        windows = sample_windows(latents)
        assert windows[0].start == 0 and windows[-1].stop == latents
        assert all(1 <= window.stop - window.start <= 3 for window in windows)
        gaps = [after.start - before.stop for before, after in pairwise(windows)]
        assert all(gap == 0 if latents <= 9 else 0 <= gap <= 20 for gap in gaps)
        assert max(gaps, default=0) - min(gaps, default=0) <= 1
    assert sample_windows(5) == (slice(0, 2), slice(2, 5))
    assert sample_windows(31) == (slice(0, 3), slice(14, 17), slice(28, 31))
    assert sampled_latents(31) == 3 * (1 + 3) and sampled_latents(61) == 5 * (1 + 3)


def test_a_look_at_every_window_comes_first():
    runs = samples(13)
    assert [run.is_look for run in runs] == [True] * 3 + [False] * 3
    assert [run.frames for run in runs] == [
        slice(0, 1), slice(5, 6), slice(10, 11), slice(0, 3), slice(5, 8), slice(10, 13),
    ]  # fmt: skip
    assert [run.window for run in runs] == [0, 1, 2] * 2


def look_and_run(looks, parts):
    """Feed two windows of two latent frames; return what they were normalised with, and the source."""
    source, used = Sampled([2, 2]), []
    for window, look in enumerate(looks):
        source.enter(window, is_look=True)
        for name in ("norm", "failing"):
            source.begin()
            source.moments(replace(seen(look, 4), name=name))
            source.commit()
    for window, pieces in enumerate(parts):
        source.enter(window, is_look=False)
        for piece in pieces:
            source.begin()
            source.moments(replace(seen(piece, 4), name="failing"))
            source.begin()
            used.append(source.moments(seen(piece, 4)))
            source.commit()
    return used, source


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_sampled_statistics_are_those_of_the_windows_alone(cut):
    x = torch.randn(2, 1, 8, 5, 4, 6, dtype=torch.float64) * 3 + 1
    looks = [window[:, :, :1] * 7 for window in x]
    _, source = look_and_run(looks, [window.split(cut, 2) for window in x])
    assert set(source.statistics.moments) == {"norm"}  # a failed step left nothing
    wanted, found = measure(torch.cat(list(x), 2), 4), source.statistics.moments["norm"]
    assert found.count == wanted.count
    assert_close((found.mean_BG, found.spread_BG), (wanted.mean_BG, wanted.spread_BG))


def test_a_look_stands_for_what_is_not_run_yet():
    """Tiles: the left half of each frame, then the right one, both normalised with the whole."""
    x = torch.randn(2, 1, 8, 5, 4, 6, dtype=torch.float64) * 3 + 1
    x[:] = x[:, :, :, :1]  # each window stands still, so that a look says all
    left, right = Region(0, 4, 0, 3), Region(0, 4, 3, 6)
    source = Sampled([2, 2])
    wanted = measure(torch.cat(list(x), 2), 4)
    for is_look in (True, False):
        for window in range(2):
            source.enter(window, is_look=is_look)
            for core in (left, right):
                source.begin()
                used = source.moments(seen(x[window][:, :, : 1 if is_look else 5], 4, core=core))
                source.commit()
                if not is_look and core == right:
                    assert_close((used.mean_BG, used.spread_BG), (wanted.mean_BG, wanted.spread_BG))
                    assert used.count == wanted.count


def test_whole_frames_count_once_more_at_half_weight():
    x = torch.randn(2, 1, 8, 5, 4, 6, dtype=torch.float64) * 3 + torch.tensor([1.0, 9.0]).view(2, 1, 1, 1, 1, 1)
    used, _ = look_and_run([window[:, :, :1] for window in x], [[window] for window in x])
    wanted, last = measure(torch.cat([x[0], x[1], x[1]], 2), 4), used[-1]
    assert last.count == wanted.count
    assert_close((last.mean_BG, last.spread_BG), (wanted.mean_BG, wanted.spread_BG))


@pytest.mark.parametrize("factors", [(1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("pieces", [(1,), (3,), (1, 1, 2), (2, 1)])
def test_the_short_form_of_an_upsampler_is_the_plain_one(factors, pieces):
    made = []
    for ops in (nn, Own):
        up = Upsampler(CausalConv3d(6, 5, 3, ops=ops, dtype=torch.float64), factors).requires_grad_(False)
        if made:
            up.load_state_dict(made[0].state_dict())
        made.append(up)
    x = torch.randn(2, 6, sum(pieces), 3, 5, dtype=torch.float64)
    for up in made:
        streamed, cache, out = StreamedUp(up), None, []
        for piece in x.split(pieces, 2):
            frames, cache = streamed(piece, cache)
            out.append(frames)
        assert_close(torch.cat(out, 2), made[1](x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_short_form_in_16_bit_is_as_close_as_the_plain_one(dtype):
    up = Upsampler(CausalConv3d(16, 16, 3), (2, 2, 2)).requires_grad_(False)
    x = torch.randn(1, 16, 2, 6, 6)
    wanted = up(x)
    up, x = up.to(dtype), x.to(dtype)
    short, plain = (error.abs().mean() for error in (StreamedUp(up)(x, None)[0] - wanted, up(x) - wanted))
    assert short < 1.5 * plain
