"""Cached data: what is drawn from a bucket belongs together."""

from __future__ import annotations

import torch
from comfyui_kandinsky5.kandinsky_core.train.data import Bucket, Prompts


def bucket(clips=5, prompts=3, edited=False):
    """Clip i is full of i; its prompts are full of i too, the pooled vector counts the prompt."""
    rows = torch.arange(clips * prompts)
    mine = (rows // prompts).float()
    text = Prompts(
        mine[:, None, None].expand(-1, 4, 2).half(),
        rows[:, None] % 4 >= torch.arange(4),
        (rows % prompts).float()[:, None],
    )
    latents = torch.arange(clips).half().view(-1, 1, 1, 1, 1).expand(-1, 16, 2, 4, 4)
    return Bucket(latents, rows.view(clips, prompts), text, -latents if edited else None)


def test_a_clip_comes_with_its_own_prompts_and_picture():
    data = bucket(edited=True)
    clean, text, edit = data.draw(64, torch.Generator().manual_seed(0))
    which = clean[:, 0, 0, 0, 0]
    assert clean.dtype == text.features_BLD.dtype == edit.dtype == torch.float32
    assert (text.features_BLD == which[:, None, None]).all() and torch.equal(edit, -clean)
    assert set(which.tolist()) == set(range(5)) and set(text.pooled_BP[:, 0].tolist()) == {0, 1, 2}
    rows = which.long() * 3 + text.pooled_BP[:, 0].long()
    assert torch.equal(text.mask_BL, data.prompts.mask_RL[rows])


def test_the_same_generator_draws_the_same():
    data = bucket()
    first, again = (data.draw(8, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1].pooled_BP, again[1].pooled_BP)
    assert first[2] is None
