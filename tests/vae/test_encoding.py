"""Encoding in pieces is the un-tiled encode: the first frame alone, then multiples of four, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import ShapeError
from comfyui_kandinsky5.kandinsky_core.vae.causal import StreamedConv
from comfyui_kandinsky5.kandinsky_core.vae.encoding import (
    encode_with,
    exact_encode_statistics,
    sampled_encode_statistics,
)
from comfyui_kandinsky5.kandinsky_core.vae.plan import REFERENCE
from comfyui_kandinsky5.kandinsky_core.vae.tiling import sampled_latents, single_plan
from tiny_vae import EXACT, clip, encode_plan, error, tiny_vae


class Case:
    """A clip, its un-tiled moments by the module itself, and that encode's statistics."""

    def __init__(self, vae, *shape):
        self.vae, self.x = vae, clip(*shape)
        with torch.no_grad():
            self.whole = vae.encode(self.x, plan=single_plan(*encode_plan(self.x).latent_thw))
        self.statistics = exact_encode_statistics(vae, self.x)

    def error(self, **settings):
        got = encode_with(self.vae, self.x, encode_plan(self.x, **settings), statistics=self.statistics)
        return max(error(got.mean, self.whole.mean), error(got.logvar, self.whole.logvar))


@pytest.fixture(scope="module")
def vae():
    return tiny_vae()


@pytest.fixture(scope="module")
def small(vae):
    return Case(vae, 1, 17, 16, 24)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])  # 1, then 4, 8, 12 frames; all 17 at once
def test_every_chunk_is_the_whole(small, chunk):
    assert small.error(chunk=chunk, caches_on_host=chunk == 2) < EXACT


@pytest.mark.parametrize("shape", [(2, 9, 16, 8), (1, 1, 16, 24), (2, 5, 24, 16)])
def test_batches_and_single_frames(vae, shape):
    assert Case(vae, *shape).error(chunk=1) < EXACT


def test_a_strided_convolution_that_carries_two_frames_shows(small, monkeypatch):
    build = StreamedConv.__init__

    def greedy(self, conv):
        build(self, conv)
        self.history = conv.conv.kernel_size[0] - 1

    monkeypatch.setattr(StreamedConv, "__init__", greedy)
    assert small.error(chunk=5) < EXACT  # in one piece nothing is carried
    assert small.error(chunk=2) > 1e-3


def test_without_statistics_one_chunk_is_exact_and_more_are_sampled(small):
    ticks = []
    whole = encode_with(
        small.vae, small.x, encode_plan(small.x, chunk=5), on_tile=lambda *at: ticks.append(at)
    )
    assert error(whole.mean, small.whole.mean) < EXACT and ticks == [(5, 5)]
    ticks.clear()
    sampled = encode_with(
        small.vae, small.x, encode_plan(small.x, chunk=2), on_tile=lambda *at: ticks.append(at)
    )
    assert ticks[-1] == (5 + sampled_latents(5),) * 2
    statistics = sampled_encode_statistics(small.vae, small.x, encode_plan(small.x, chunk=2))
    same = encode_with(small.vae, small.x, encode_plan(small.x, chunk=3), statistics=statistics)
    assert error(sampled.mean, same.mean) < EXACT < error(sampled.mean, small.whole.mean)


def test_reference_mode_is_the_released_encode(small):
    plan = replace(encode_plan(small.x), mode=REFERENCE)
    with torch.no_grad():
        assert torch.equal(encode_with(small.vae, small.x, plan).mean, small.vae.encode(small.x).mean)


def test_plans_that_do_not_fit_are_refused(small):
    for plan in (
        replace(encode_plan(small.x), latent_thw=(5, 3, 2)),
        replace(encode_plan(small.x), mode="late-tile"),
        encode_plan(small.x, chunk=0),
    ):
        with pytest.raises(ShapeError):
            encode_with(small.vae, small.x, plan)
