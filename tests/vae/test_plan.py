"""Plans fit, are the best that fit, get smaller rung by rung, and cover every pixel."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from comfyui_kandinsky5.kandinsky_core.errors import BudgetError, KandinskyError, ShapeError
from comfyui_kandinsky5.kandinsky_core.shapes import VideoShape
from comfyui_kandinsky5.kandinsky_core.vae import footprint
from comfyui_kandinsky5.kandinsky_core.vae.flux import FluxVAE
from comfyui_kandinsky5.kandinsky_core.vae.hunyuan import HunyuanVideoVAE
from comfyui_kandinsky5.kandinsky_core.vae.plan import (
    AUTO,
    LATE_TILE,
    MODES,
    REFERENCE,
    SINGLE_PASS,
    STREAM,
    decode_plans,
    late_cuts,
    needed_bytes,
    plan_decode,
    plan_encode,
    reference_tile_px,
    smaller,
)
from comfyui_kandinsky5.kandinsky_core.vae.tiling import tile_spans
from comfyui_kandinsky5.kandinsky_core.variants import FLUX_VAE, HUNYUAN_VAE
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import IMAGE_VAE_SPEC, VIDEO_VAE_SPEC

GIB = 2**30
REPEATABLE = settings(deadline=None, derandomize=True, max_examples=25)
GRIDS = st.tuples(st.integers(1, 61), st.integers(2, 100), st.integers(2, 180))
FREE = st.floats(0.1, 90).map(lambda gib: int(gib * GIB))
SIZES = ((512, 768), (768, 512), (512, 512), (640, 1408), (1408, 640), (768, 1280), (1280, 768), (1024, 1024))
CLIP = (31, 64, 96)  # 121 frames of 768 x 512


def decode(latent_thw=CLIP, free_gib=None, mode=AUTO, spec=HUNYUAN_VAE, itemsize=2, **asked):
    free_bytes = None if free_gib is None else int(free_gib * GIB)
    return plan_decode(spec, latent_thw, free_bytes=free_bytes, itemsize=itemsize, mode=mode, **asked)


def ladder(plan, spec=HUNYUAN_VAE):
    while plan is not None:
        yield plan
        plan = smaller(plan, spec)


@pytest.mark.parametrize("spec", [HUNYUAN_VAE, FLUX_VAE, VIDEO_VAE_SPEC, IMAGE_VAE_SPEC], ids=str)
def test_weights_are_counted_from_the_spec(spec):
    vae = (HunyuanVideoVAE if spec.kind == "hunyuan" else FluxVAE)(spec, device="meta")
    sizes = {name: value.numel() for name, value in vae.state_dict().items()}
    assert footprint.weight_bytes(spec, 2) == 2 * sum(sizes.values())
    decoder = sum(size for name, size in sizes.items() if name.startswith(("decoder", "post_quant")))
    assert footprint.weight_bytes(spec, 1, encoder=False) == decoder
    assert footprint.weight_bytes(spec, 1, decoder=False) == sum(sizes.values()) - decoder


def test_multiply_adds_are_those_of_the_reference():
    area = CLIP[1] * CLIP[2] * 64
    frames = 4  # of one later latent frame
    frame = [footprint.Cut.whole(CLIP[1])], [footprint.Cut.whole(CLIP[2])]
    count = footprint.decoder_network(HUNYUAN_VAE).macs(1001, *frame)
    assert count / 1001 / frames / area == pytest.approx(
        6.48e6, rel=0.002
    )  # with upsamplers in their short form
    count = footprint.encoder_network(HUNYUAN_VAE).macs(1001, *frame)
    assert count / 1001 / frames / area == pytest.approx(4.53e6, rel=0.002)


@pytest.mark.parametrize(
    ("latent_thw", "free_gib", "mode", "tiles", "chunk"),
    [
        (CLIP, 6.0, LATE_TILE, (1, 2), 2),
        (CLIP, 6.7, STREAM, (1, 1), 1),  # an 8 GB card, its decoder's weights taken off
        (CLIP, 10.7, STREAM, (1, 1), 2),
        (CLIP, 14.5, STREAM, (1, 1), 4),
        ((31, 96, 160), 14.5, LATE_TILE, (1, 2), 2),
        ((31, 96, 160), 22.2, STREAM, (1, 1), 1),
        ((5, 64, 96), 11, REFERENCE, (1, 1), 5),
        ((1, 128, 128), 3, REFERENCE, (1, 1), 1),
    ],
)
def test_cards_get_the_plans_of_the_reference(latent_thw, free_gib, mode, tiles, chunk):
    plan = decode(latent_thw, free_gib)
    assert (plan.mode, plan.tiles, plan.chunk) == (mode, tiles, chunk)


@pytest.mark.parametrize("height_width", SIZES)
@pytest.mark.parametrize("frames", [121, 241])
def test_every_trained_size_fits_six_gigabytes(height_width, frames):
    height, width = height_width
    shape = VideoShape(width_px=width, height_px=height, frames=frames)
    plan = decode(shape.latent_thw, 5.0)
    assert plan.mode in (STREAM, LATE_TILE) and needed_bytes(plan.peak_bytes) <= 5 * GIB
    for cells, count in zip(shape.latent_thw[1:], plan.tiles, strict=True):
        cuts = late_cuts(cells, count)
        assert [cut.start for cut in cuts] == [0, *(cut.stop for cut in cuts[:-1])] and cuts[
            -1
        ].stop == 2 * cells


@REPEATABLE
@given(GRIDS, FREE, st.sampled_from((AUTO, *MODES)))
def test_a_plan_fits_and_is_the_first_that_does(latent_thw, free_bytes, mode):
    plans = list(decode_plans(HUNYUAN_VAE, latent_thw, 2, mode))
    fitting = [plan for plan in plans if needed_bytes(plan.peak_bytes) <= free_bytes]
    try:
        plan = plan_decode(HUNYUAN_VAE, latent_thw, free_bytes=free_bytes, itemsize=2, mode=mode)
    except BudgetError:
        assert not fitting
    else:
        assert plan == fitting[0]
        assert plan.latent_thw == latent_thw and plan.mode in (MODES if mode == AUTO else (mode,))
        assert plan.work >= 0.99 and 1 <= plan.chunk <= latent_thw[0]


@REPEATABLE
@given(GRIDS, FREE, FREE)
def test_more_memory_is_never_more_work(latent_thw, free_bytes, more_bytes):
    try:
        plan = plan_decode(HUNYUAN_VAE, latent_thw, free_bytes=free_bytes, itemsize=2)
    except BudgetError:
        return
    roomy = plan_decode(HUNYUAN_VAE, latent_thw, free_bytes=free_bytes + more_bytes, itemsize=2)
    tiled = [one.caches_on_host for one in (plan, roomy)]
    assert roomy.work <= plan.work or tiled == [True, False]  # host memory is the last resort


@settings(REPEATABLE, max_examples=12)
@given(GRIDS, st.sampled_from((AUTO, *MODES)))
def test_the_ladder_goes_down_and_never_back_to_whole_frames(latent_thw, mode):
    rungs = list(ladder(next(decode_plans(HUNYUAN_VAE, latent_thw, 2, mode), None)))
    for plan, less in zip(rungs, rungs[1:], strict=False):
        assert less.peak_bytes <= 0.85 * plan.peak_bytes
        assert less.mode != REFERENCE and (plan.mode, less.mode) != (LATE_TILE, STREAM)
        assert not (plan.caches_on_host and not less.caches_on_host and less.mode == plan.mode)


def test_rungs_come_in_order():
    rungs = list(ladder(decode()))
    seen = [(plan.mode, plan.caches_on_host) for plan in rungs]
    assert sorted(set(seen), key=seen.index) == [(STREAM, False), (LATE_TILE, False), (LATE_TILE, True)]
    assert [plan.chunk for plan in rungs if plan.mode == STREAM] == [4, 3, 2, 1]
    tiles = [math.prod(plan.tiles) for plan in rungs if plan.mode == LATE_TILE and not plan.caches_on_host]
    assert tiles == sorted(tiles) and tiles[0] == 2 and len(set(tiles)) > 2
    assert rungs[-1].peak_bytes < 0.06 * rungs[0].peak_bytes
    windows = list(ladder(decode(mode=REFERENCE)))
    assert windows[0].mode == REFERENCE and windows[1].mode == STREAM
    single = list(ladder(decode(mode=SINGLE_PASS)))
    assert [plan.mode for plan in single[:5]] == [SINGLE_PASS] * 4 + [SINGLE_PASS]
    assert single[-1].mode == LATE_TILE


def test_only_whole_frames_that_indices_reach():
    assert decode((31, 96, 160), mode=STREAM).chunk == 1  # 256 channels of 2 x 4 + 2 frames are too many
    wide = (31, 160, 176)
    assert all(plan.mode == LATE_TILE for plan in decode_plans(HUNYUAN_VAE, wide, 2))
    with pytest.raises(BudgetError, match="not possible"):
        decode(wide, mode=STREAM)
    for plan in decode_plans(HUNYUAN_VAE, (31, 96, 160), 2, REFERENCE):
        height, width = (
            reference_tile_px(cells, count) for cells, count in zip((96, 160), plan.tiles, strict=True)
        )
        assert 256 * 17 * height * width < 2**31


def test_reference_tiles_are_as_many_as_the_plan_says_or_cover_what_the_released_grid_loses():
    for plan in decode_plans(HUNYUAN_VAE, (31, 64, 96), 2, REFERENCE):
        for cells, count in zip((64, 96), plan.tiles, strict=True):
            spans = tile_spans(cells, reference_tile_px(cells, count))
            assert spans[-1].stop == cells and len(spans) >= count
    released = decode(mode=REFERENCE)
    assert released.tiles == (1, 1) and released.work == pytest.approx(14 * 17 / 121, rel=0.05)


def test_a_picture_of_the_image_autoencoder_is_one_pass():
    plan = decode((1, 128, 128), spec=FLUX_VAE)
    assert plan.peak_bytes == pytest.approx(1300 * 1024 * 1024, rel=0.05)
    assert smaller(plan, FLUX_VAE) is None
    with pytest.raises(BudgetError, match=r"1024 x 1024 px .* 1\.0\d? GiB is free|is free"):
        decode((1, 128, 128), 1.0, spec=FLUX_VAE)


def test_what_does_not_fit_is_said_with_what_would():
    with pytest.raises(BudgetError) as raised:
        decode(free_gib=0.3)
    message = str(raised.value)
    least = min(decode_plans(HUNYUAN_VAE, CLIP, 2), key=lambda plan: plan.peak_bytes)
    assert "121 frames of 768 x 512 px" in message and "0.30 GiB is free" in message and str(least) in message
    assert f"{needed_bytes(least.peak_bytes) / GIB:.2f} GiB with the least plan" in message


def test_choices_can_be_made_by_hand():
    assert decode(chunk=1).chunk == 1
    assert decode(tiles=(2, 3)).tiles == (2, 3)
    with pytest.raises(BudgetError, match="chunk 7"):
        decode(chunk=7)
    with pytest.raises(KandinskyError, match="unknown"):
        decode(mode="fast")
    with pytest.raises(ShapeError):
        decode((0, 4, 4))


def test_float32_takes_twice_the_bytes():
    for mode in MODES:
        half, full = decode(mode=mode), decode(mode=mode, itemsize=4)
        assert full.peak_bytes == 2 * half.peak_bytes and full == replace(
            half, peak_bytes=full.peak_bytes, itemsize=4
        )


def test_encoding_takes_whole_frames_in_chunks():
    def encode(latent_thw, free_gib=None, **settings):
        free_bytes = None if free_gib is None else int(free_gib * GIB)
        return plan_encode(HUNYUAN_VAE, latent_thw, free_bytes=free_bytes, itemsize=2, **settings)

    assert (encode(CLIP).mode, encode(CLIP).chunk) == (STREAM, 4)
    assert [(encode((n, 64, 96)).chunk, encode((n, 64, 96)).work) for n in (1, 5)] == [(1, 1), (5, 1)]  # one pass
    tight = encode(CLIP, 4.0)
    assert tight.mode == STREAM and tight.chunk < 4 and needed_bytes(tight.peak_bytes) <= 4 * GIB
    assert encode(CLIP, 3.0).caches_on_host
    assert encode(CLIP, mode=REFERENCE).work == pytest.approx(14 * 17 / 121, rel=0.05)
    with pytest.raises(BudgetError, match="Encoding 121 frames"):
        encode(CLIP, 0.5)
    with pytest.raises(KandinskyError, match="unknown"):
        encode(CLIP, mode=LATE_TILE)


def test_plans_print_themselves():
    assert str(decode(free_gib=10.7)).startswith("stream: 2 latent frames at a time, peak 7.")
    text = str(decode((61, 96, 160), 5.0))
    assert "late-tile: " in text and " tiles, caches in main memory, peak " in text and "work x 1." in text
    assert str(decode((5, 64, 96))).startswith("reference: one pass, peak ")
    assert str(decode(mode=REFERENCE)).startswith("reference: windows of 17 frames, peak ")
