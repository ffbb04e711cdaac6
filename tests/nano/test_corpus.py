"""What the recipe trains on: nothing that is held out, and clips whose first frame must not be followed."""

from __future__ import annotations

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.nano import autoencoder, batch, corpus, draw, stages, text
from comfyui_kandinsky5.kandinsky_core.nano.corpus import Slice
from comfyui_kandinsky5.kandinsky_core.nano.run import Run
from comfyui_kandinsky5.kandinsky_core.nano.transformer import put_strays

pytestmark = pytest.mark.usefixtures("one_thread", "small")


def test_no_picture_of_the_training_shows_a_held_out_combination(tmp_path, monkeypatch):
    """Of the bases and of every kind of data: whatever is drawn for them."""
    shown = []

    def noted(item, **options):
        shown.append(item)
        return draw.draw(item, **options)

    monkeypatch.setattr(batch, "draw", noted)
    monkeypatch.setattr(corpus, "encode_prompts", lambda *_: None)
    here = Run(tmp_path)
    autoencoder.video_basis(here, stages.VIDEO.vae)
    basis = autoencoder.image_basis(here, stages.IMAGE.vae)
    count = sum(clips for clips, _ in (*autoencoder.BASIS_CLIPS, *autoencoder.BASIS_PICTURES))
    assert len(shown) == count
    for stream, kind in enumerate(text.TEMPLATE_OF):
        corpus.make_bucket(here, basis, None, Slice(kind=kind, size_px=32, clips=8, batch=1), stream)
        # The picture to edit is drawn for the text encoder, as a latent, and changed.
        count += 8 * (3 if kind == "edit" else 1)
        assert len(shown) == count
    assert not any(map(draw.held_out, shown))


def test_strays_are_clean_unmarked_and_still():
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 4, 16, 3, 2, 2)
    before = clean.clone(), noise.clone()
    put_strays(clean, noise, torch.tensor([True, False, True, False]))
    assert torch.equal(clean[[1, 3]], before[0][[1, 3]]) and torch.equal(noise[[1, 3]], before[1][[1, 3]])
    assert torch.equal(clean[:, :, 1:], before[0][:, :, 1:]) and torch.equal(noise[:, :, 1:], before[1][:, :, 1:])
    assert torch.equal(clean[0, :, 0], before[0][3, :, 0]) and torch.equal(noise[0, :, 0], clean[0, :, 0])
