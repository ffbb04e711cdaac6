"""Every kernel equals dense masked attention, forwards and backwards."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from comfyui_kandinsky5.kandinsky_core.errors import BackendUnavailable
from comfyui_kandinsky5.kandinsky_core.sparse.kernels import blockwise, flex, sparge, trial
from comfyui_kandinsky5.kandinsky_core.sparse.kernels.gradient import with_gradient
from comfyui_kandinsky5.kandinsky_core.sparse.kernels.trial import masked, relative_error
from comfyui_kandinsky5.kandinsky_core.sparse.selection import select
from comfyui_kandinsky5.kandinsky_core.sparse.window import sliding_window
from hypothesis import given, settings
from hypothesis import strategies as st

from .conftest import problem

EXACT = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}
WHOLE, RAGGED = (2, 16, 24), (2, 13, 19)
GRIDS = st.tuples(st.integers(1, 3), st.integers(1, 26), st.integers(1, 26))


@settings(deadline=None, max_examples=60)
@given(GRIDS, st.integers(1, 2), st.integers(1, 3), st.floats(0, 1), st.integers(0, 99), st.sampled_from([8, 20]))
def test_blockwise(grid, batch, heads, kept, seed, width):
    case = problem(grid, batch=batch, heads=heads, kept=kept, seed=seed, width=width)
    assert relative_error(blockwise.attend(*case.tensors(), case.layout), masked(*case.tensors(), case.layout)) <= 2e-6


@settings(deadline=None, max_examples=40)
@given(GRIDS, st.integers(1, 3), st.floats(0, 1), st.tuples(*[st.integers(0, 4)] * 3), st.integers(0, 99))
def test_blocks_that_nabla_selects(grid, heads, mass, window_thw, seed):
    case = problem(grid, heads=heads, seed=seed)
    layout = select(case.q, case.k, case.layout.tiles, mass, sliding_window(case.layout.tiles, window_thw))
    assert (layout.counts_R >= 1).all()
    out = blockwise.attend(*case.tensors(), layout)
    assert relative_error(out, masked(*case.tensors(), layout)) <= 2e-6
    if mass == 1:
        assert relative_error(out, F.scaled_dot_product_attention(*case.tensors())) <= 2e-6


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("gathered", [1, 1 << 14, 1 << 30])
def test_blockwise_in_pieces(monkeypatch, gathered, dtype):
    monkeypatch.setattr(blockwise, "GATHER_BYTES", gathered)
    for grid in (WHOLE, RAGGED):
        case = problem(grid, batch=2, dtype=dtype)
        out = blockwise.attend(*case.tensors(), case.layout)
        assert out.dtype == dtype
        assert relative_error(out, masked(*case.tensors(), case.layout)) <= EXACT[dtype]


def test_blockwise_gathers_no_more_than_it_may(monkeypatch):
    monkeypatch.setattr(blockwise, "GATHER_BYTES", 1 << 16)
    case = problem((3, 24, 32), heads=3)
    allowed = (1 << 16) // (2 * 16 * 4)
    sizes = [(len(piece.query_G), len(piece.key_X) * 64) for piece in blockwise.pieces(case.layout, allowed)]
    assert sum(rows for rows, _ in sizes) == 3 * 36
    assert all(keys <= allowed or rows == 1 for rows, keys in sizes)
    assert len({keys // rows for rows, keys in sizes}) > 3  # rows of several lengths were there


@torch.no_grad()
@pytest.mark.parametrize("grids", [[WHOLE, (3, 24, 8), (2, 32, 24), (1, 24, 40)], [RAGGED]], ids=["whole", "ragged"])
def test_flex(grids):
    """Compiled by Inductor's C++ back-end: a compiler is needed for this test.

    One ragged size: torch 2.13's C++ template sometimes names a variable that is not there when it meets another one,
    and then the next kernel takes over.
    """
    chance = random.Random(0)
    for grid in grids:
        for heads, kept in ((2, 0.3), (3, chance.random()), (2, 1.0)):
            case = problem(grid, heads=heads, kept=kept, seed=chance.randrange(99), width=64)
            out = flex.attend(*case.tensors(), case.layout)
            assert relative_error(out, masked(*case.tensors(), case.layout)) <= 2e-6
        assert relative_error(out, F.scaled_dot_product_attention(*case.tensors())) <= 2e-6  # all blocks: dense


@torch.no_grad()
@pytest.mark.parametrize("has_products", [True, False])
def test_flex_in_16_bit(monkeypatch, has_products):
    monkeypatch.setattr(flex, "multiplies_16_bit", lambda: has_products)
    case = problem(WHOLE, width=64, dtype=torch.bfloat16)
    out = flex.attend(*case.tensors(), case.layout)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, masked(*case.tensors(), case.layout)) <= EXACT[torch.bfloat16]


@pytest.mark.parametrize("grid", [WHOLE, RAGGED], ids=["whole", "ragged"])
def test_all_blocks_are_dense_attention(grid):
    case = problem(grid, kept=1.0, batch=2)
    out = blockwise.attend(*case.tensors(), case.layout)
    assert relative_error(out, F.scaled_dot_product_attention(*case.tensors())) <= 2e-6


@pytest.mark.parametrize("gathered", [1, 1 << 30])
@pytest.mark.parametrize("grid", [WHOLE, RAGGED], ids=["whole", "ragged"])
def test_gradients(monkeypatch, grid, gathered):
    monkeypatch.setattr(blockwise, "GATHER_BYTES", gathered)
    case = problem(grid, batch=2, dtype=torch.float64)
    ours, theirs = ([x.detach().clone().requires_grad_() for x in case.tensors()] for _ in range(2))
    weight = torch.randn(case.q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    (with_gradient(blockwise.attend, *ours, case.layout) * weight).sum().backward()
    (masked(*theirs, case.layout) * weight).sum().backward()
    for got, expected in zip(ours, theirs, strict=True):
        assert relative_error(got.grad, expected.grad) <= 1e-12


def test_gradients_numerically():
    case = problem((1, 2, 9), heads=1, width=2, dtype=torch.float64)
    given = [x.detach().clone().requires_grad_() for x in case.tensors()]
    assert torch.autograd.gradcheck(lambda *x: with_gradient(blockwise.attend, *x, case.layout), given)


def test_16_bit_gradients_are_added_up_wide():
    case = problem((2, 32, 32), heads=1, kept=1.0)
    kinds = (torch.bfloat16, torch.float32)
    ours, theirs = ([x.to(kind).detach().requires_grad_() for x in case.tensors()] for kind in kinds)
    with_gradient(blockwise.attend, *ours, case.layout).float().sum().backward()
    masked(*theirs, case.layout).sum().backward()
    assert ours[2].grad.dtype == torch.bfloat16
    assert relative_error(ours[2].grad, theirs[2].grad) <= 1e-2


def test_trial_accepts_right_kernels_and_names_wrong_ones():
    like = torch.zeros(1, 1, 1, 16)
    for is_whole in (True, False):
        trial.check(blockwise.attend, like, is_whole)

        def forgetful(q, k, v, layout):
            return F.scaled_dot_product_attention(q, k, v)

        def broken(q, k, v, layout):
            return torch.full_like(q, torch.nan)

        for wrong in (forgetful, broken):
            with pytest.raises(BackendUnavailable, match="wrong results"):
                trial.check(wrong, like, is_whole)


def test_spargeattn_mask_is_the_union_of_two_rows():
    case = problem((3, 8, 24), kept=0.2)
    live = case.layout.live()
    mask = sparge.paired_mask(case.layout)
    assert mask.shape == (1, 2, 5, 9) and mask.dtype == torch.int8
    for pair in range(5):
        assert torch.equal(mask[:, :, pair].bool(), live[:, :, 2 * pair : 2 * pair + 2].any(2))


def test_spargeattn_says_what_is_missing():
    case = problem(WHOLE)
    with pytest.raises(BackendUnavailable, match="spas_sage_attn"):
        sparge.attend(*case.tensors(), case.layout)
