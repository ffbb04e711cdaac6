"""Text towers streamed layer by layer give the bits of towers that are in memory as a whole."""

from __future__ import annotations

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import TextError
from comfyui_kandinsky5.kandinsky_core.text import load_text_encoder

PICTURE = torch.linspace(-1, 1, 3 * 64 * 64).view(3, 64, 64)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_streamed_features_are_the_resident_ones(folders, dtype, prefetch):
    resident = load_text_encoder(*folders, dtype=dtype)
    streamed = load_text_encoder(*folders, dtype=dtype, streamed=True, prefetch=prefetch)
    for prompt in ("a cat", "two dogs on a beach"):
        wanted, got = (encoder.encode(prompt, "video") for encoder in (resident, streamed))
        assert torch.equal(got.features_LD, wanted.features_LD)
        assert torch.equal(got.pooled_P, wanted.pooled_P)
        assert got.features_LD.dtype == wanted.features_LD.dtype


def test_a_picture_is_seen_through_a_streamed_tower(folders):
    wanted, got = (
        load_text_encoder(*folders, streamed=streamed).encode("make it red", "image_edit", images=[PICTURE])
        for streamed in (False, True)
    )
    assert torch.equal(got.features_LD, wanted.features_LD)


def test_embeddings_stay_on_the_host_and_layers_travel(folders):
    encoder = load_text_encoder(*folders, streamed=True, dtype=torch.bfloat16)
    rows = encoder.qwen.embed_tokens.weight
    assert rows.dtype is torch.float32  # as stored: only the rows of the prompt are converted
    encoder.encode("a cat", "video")
    layers = sum(p.nbytes for p in encoder.qwen.layers[0].parameters()) // 2
    assert layers <= encoder.streams[0].ring_bytes / 2 < layers + 256 * 16
    assert all(p.dtype is torch.float32 for p in encoder.qwen.layers.parameters())


def test_an_fp8_file_streams_what_it_computes_resident(load_single, comfy_qwen, comfy_clip):
    packed = {}
    for name, value in comfy_qwen.items():
        if value.ndim == 2 and "proj" in name:
            packed[name] = (value * 8).to(torch.float8_e4m3fn)
            packed[name.removesuffix("weight") + "scale_weight"] = torch.tensor([1 / 8])
        else:
            packed[name] = value
    packed["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    wanted, got = (
        load_single(packed, comfy_clip, dtype=torch.float32, streamed=streamed).encode("a cat", "video")
        for streamed in (False, True)
    )
    assert torch.equal(got.features_LD, wanted.features_LD)


def test_a_cancelled_prompt_leaves_a_streamed_encoder_that_works(folders):
    encoder = load_text_encoder(*folders, streamed=True)
    wanted = encoder.encode("a cat", "video").features_LD

    def cancel(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encoder.encode("a cat", "video", on_layer=cancel)
    assert torch.equal(encoder.encode("a cat", "video").features_LD, wanted)
    encoder.close_streams()
    assert torch.equal(encoder.encode("a cat", "video").features_LD, wanted)


def test_a_freed_streamed_encoder_says_so(folders):
    encoder = load_text_encoder(*folders, streamed=True)
    encoder.free()
    with pytest.raises(TextError, match="was freed"):
        encoder.encode("a cat", "video")
