"""Live bytes of streaming at the published widths, counted on the meta device."""

from __future__ import annotations

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.memory.tracker import Tracker
from comfyui_kandinsky5.kandinsky_core.vae import statistics
from comfyui_kandinsky5.kandinsky_core.vae.encoding import encode_with
from comfyui_kandinsky5.kandinsky_core.vae.hunyuan import HunyuanVideoVAE
from comfyui_kandinsky5.kandinsky_core.vae.passage import Passage
from comfyui_kandinsky5.kandinsky_core.vae.plan import LATE_TILE, STREAM, DecodePlan, EncodePlan
from comfyui_kandinsky5.kandinsky_core.vae.statistics import GroupMoments
from comfyui_kandinsky5.kandinsky_core.variants import HUNYUAN_VAE

ROWS, COLUMNS = 32, 48  # latent cells of 256 x 384 px
AREA_PX = 64 * ROWS * COLUMNS
META = torch.device("meta")


@pytest.fixture(scope="module", autouse=True)
def few_operations():
    """Norms in two groups of channels: the peak is a convolution, and counting every operation is slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "SLICES", 2)
        yield


@pytest.fixture(scope="module")
def vae():
    return HunyuanVideoVAE(HUNYUAN_VAE, device=META, dtype=torch.float16).requires_grad_(False)


class Fixed:
    """Given statistics for every norm."""

    def begin(self):
        pass

    commit = begin

    def moments(self, seen):
        zero = torch.zeros(1, seen.groups, device=META)
        return GroupMoments(1, zero, zero)


def decode_bytes(vae, latents, mode=STREAM, **settings):
    """Return bytes per pixel of a decode, without the upsamplers' merged kernels, which every clip has alike."""
    z = torch.empty(1, 16, latents, ROWS, COLUMNS, dtype=torch.float16, device=META)
    plan = DecodePlan(mode=mode, latent_thw=(latents, ROWS, COLUMNS), **settings)
    with Tracker(META.type) as tracker:
        way = Passage(vae, z, plan, Fixed(), device=META, on_piece=lambda _: None, on_latents=lambda _: None)
        before = tracker.live_bytes
        way.run()
    return (tracker.peak_bytes - before) / AREA_PX


def test_a_longer_clip_needs_hardly_more(vae):
    three, five = (decode_bytes(vae, latents, chunk=1) for latents in (3, 5))
    assert five == pytest.approx(1500 + 5120 + 7200, rel=0.05)
    more = (five - three) / 2  # per latent frame
    assert more > 0 and 31 * more <= 0.05 * (five + 26 * more)  # 121 frames to 241


def test_tiles_need_what_a_tile_needs(vae):
    tile_px = (128 + 24) * (192 + 24)
    late = tile_px * (1500 + 5120 + 6080) / AREA_PX
    assert decode_bytes(vae, 3, LATE_TILE, tiles=(2, 2), chunk=1) < late + 3 * 64


def test_encoding_needs_what_a_chunk_needs(vae, monkeypatch):
    x = torch.empty(1, 3, 9, 8 * ROWS, 8 * COLUMNS, dtype=torch.float16, device=META)
    plan = EncodePlan(mode=STREAM, latent_thw=(3, ROWS, COLUMNS), chunk=1)
    monkeypatch.setattr(statistics.Given, "moments", lambda self, seen: Fixed().moments(seen))
    with Tracker(META.type) as tracker:
        encode_with(vae, x, plan, statistics=statistics.Statistics({}))
    assert tracker.peak_bytes / AREA_PX < 9200
