"""Sampled statistics on the nano autoencoder: near the un-tiled decode, no flicker, no seams."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.io.load import load_vae
from comfyui_kandinsky5.kandinsky_core.nano import files
from comfyui_kandinsky5.kandinsky_core.nano.codec import pixels
from comfyui_kandinsky5.kandinsky_core.nano.draw import draw, scene
from comfyui_kandinsky5.kandinsky_core.vae import causal
from comfyui_kandinsky5.kandinsky_core.vae.decoding import Decoding, decode_with
from comfyui_kandinsky5.kandinsky_core.vae.plan import LATE_TILE, REFERENCE, STREAM, DecodePlan, plan_decode
from comfyui_kandinsky5.kandinsky_core.vae.tiling import single_plan

LATENTS = 9
THW = (LATENTS, 8, 8)


@pytest.fixture(scope="module")
def vae():
    return load_vae(files()["vae"], dtype=torch.float32).vae.requires_grad_(False)


@pytest.fixture(scope="module")
def clips(vae):
    """Clips, each with its latent and the un-tiled decode; the third is a growing circle, the hardest of twelve."""
    return [seen(vae, pixels(draw(scene(seed, seed), frames=4 * LATENTS - 3)[None])) for seed in range(6)]


def seen(vae, truth):
    with torch.no_grad():
        z = vae.encode(truth, plan=single_plan(*THW)).mean
        return truth, z, vae.decode(z, plan=single_plan(*THW))


def decibels(a, b):
    return 10 * math.log10(4 / (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean().item())


def flicker(out, truth):
    """Mean change of a frame's mean error from frame to frame, in 1/255."""
    return (out.clamp(-1, 1) - truth).mean((0, 1, 3, 4)).diff().abs().mean().item() * 127.5


def seam(error):
    """How much steeper an error is across the middle, where tiles meet, than a little beside it: the worse side."""
    ratios = []
    for dim in (-2, -1):
        slope = error.diff(dim=dim).abs().movedim(dim, -1)
        middle = error.shape[dim] // 2 - 1
        beside = [middle + step for step in (-4, -3, -2, 2, 3, 4)]
        ratios.append((slope[..., middle].mean() / slope[..., beside].mean()).item())
    return max(ratios)


@pytest.fixture(scope="module")
def windows_flicker(vae, clips):
    """Sum of the released windows' flicker."""
    plan = plan_decode(vae.spec, THW, free_bytes=None, itemsize=4, mode=REFERENCE)
    return sum(flicker(decode_with(vae, z, plan), truth) for truth, z, _ in clips)


@pytest.mark.parametrize(("mode", "tiles"), [(STREAM, (1, 1)), (LATE_TILE, (2, 2))])
def test_sampled_statistics_come_near_the_whole(vae, clips, windows_flicker, mode, tiles):
    flickers = []
    for truth, z, whole in clips:
        out = decode_with(vae, z, DecodePlan(mode=mode, latent_thw=THW, chunk=2, tiles=tiles))
        assert decibels(out, whole) >= 45
        assert seam(out - whole) <= 1.05
        assert seam(out) <= 1.01 * seam(whole)
        assert abs(decibels(out, truth) - decibels(whole, truth)) < 1
        flickers.append(flicker(out, truth))
        assert flickers[-1] <= 1.02 * flicker(whole, truth)
    whole_flicker = sum(flicker(whole, truth) for truth, _, whole in clips)
    assert sum(flickers) <= 1.002 * whole_flicker  # 0.998 and 1.000 were seen; rounding may differ
    assert sum(flickers) < windows_flicker


@pytest.mark.parametrize("at", [20, 100, 180])  # in a look, in two windows
def test_statistics_taken_in_changing_pieces_come_near_the_whole(vae, clips, monkeypatch, at):
    """Memory runs out while statistics are sampled from whole frames, which goes on tile by tile."""
    _, z, whole = clips[2]
    calls, out = itertools.count(), torch.empty_like(whole)

    def failing(*args, tail=causal.Padded.tail):
        if next(calls) == at:
            raise MemoryError
        return tail(*args)

    def put(piece):
        out[:, :, piece.frames, piece.rows, piece.columns] = piece.pixels_BCTHW

    monkeypatch.setattr(causal.Padded, "tail", failing)
    decoding = Decoding(vae, z, DecodePlan(mode=STREAM, latent_thw=THW, chunk=2), on_piece=put)
    with pytest.raises(MemoryError):
        decoding.run()
    assert decoding.statistics is None
    decoding.replan(DecodePlan(mode=LATE_TILE, latent_thw=THW, chunk=1, tiles=(2, 2)))
    decoding.run()
    assert decibels(out, whole) >= 45


def test_a_seam_is_seen(vae, clips):
    _, z, whole = clips[0]
    error = decode_with(vae, z, DecodePlan(mode=LATE_TILE, latent_thw=THW, chunk=2, tiles=(2, 2))) - whole
    error[..., error.shape[-1] // 2 :] += 0.01
    assert seam(error) > 1.05
