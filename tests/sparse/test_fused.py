"""The Triton kernels do what plain PyTorch does, checked without a GPU in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is first imported, by whomever, so functions named `check_…` run in a process of
their own, which `test_the_kernels_in_the_interpreter` starts.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from comfyui_kandinsky5.kandinsky_core.errors import BackendUnavailable
from comfyui_kandinsky5.kandinsky_core.sparse import kernels
from comfyui_kandinsky5.kandinsky_core.sparse.kernels import fused, trial
from comfyui_kandinsky5.kandinsky_core.sparse.kernels.trial import masked
from comfyui_kandinsky5.kandinsky_core.sparse.layout import BlockLayout
from torch import Tensor
from torch.testing import assert_close

from .conftest import Problem, problem

ROOT = Path(__file__).parents[2]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


# Not installed there, these tests fail: Triton is among the test dependencies.
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="PyPI has Triton for Linux only")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def assert_right(out: Tensor, case: Problem) -> None:
    assert out.dtype == case.q.dtype
    assert_close(out.float(), masked(*case.tensors(), case.layout), atol=TOLERANCE[out.dtype], rtol=0)


@on_linux
def test_the_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", __file__, "-o", "python_functions=check_*", "-p", "no:cacheprovider"]
    # Its matrices are too small to gain from threads, which only wait for each other where cores are busy.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@on_linux
@pytest.mark.skipif(
    not torch.accelerator.is_available(),
    reason="torch.accelerator.is_available() is False; the same programs run in the interpreter above",
)
def test_the_kernels_on_a_gpu():
    device = torch.accelerator.current_accelerator()
    for dtype in (torch.bfloat16, torch.float16):
        for width in (24, 64, 128):
            for is_whole in (True, False):
                trial.check(fused.attend, torch.zeros(1, 1, 1, width, dtype=dtype, device=device), is_whole)
    weight_RCK = exact_weights(300)
    found = fused.threshold(weight_RCK.to(device), 0.1).cpu()
    assert torch.equal(found, crossing(weight_RCK, 0.1).nextafter(torch.zeros(())))


@pytest.mark.parametrize(
    ("grid", "batch", "heads", "width", "dtype"),
    [
        pytest.param((2, 16, 24), 2, 3, 64, torch.float32, id="whole"),
        pytest.param((1, 24, 24), 1, 2, 24, torch.float32, id="odd-24-channels"),
        pytest.param((2, 13, 19), 2, 3, 16, torch.float32, id="ragged"),
        pytest.param((1, 20, 20), 1, 2, 64, torch.float32, id="ragged-odd"),
        pytest.param((1, 3, 5), 1, 2, 8, torch.float32, id="one-small-block"),
        pytest.param((2, 16, 24), 1, 2, 24, torch.bfloat16, id="whole-bf16"),
        pytest.param((2, 13, 19), 2, 1, 64, torch.bfloat16, id="ragged-bf16"),
        pytest.param((1, 24, 24), 1, 1, 128, torch.float16, id="odd-fp16"),
    ],
)
def check_attention_is_dense_attention_under_the_mask(grid, batch, heads, width, dtype):
    case = problem(grid, batch=batch, heads=heads, width=width, dtype=dtype)
    out = fused.attend(*case.tensors(), case.layout)
    assert out.stride() == case.q.stride()
    assert_right(out, case)


def check_any_strides():
    case = problem((1, 13, 24), batch=2, heads=3)
    q = torch.stack((case.q, case.k), dim=3)[:, :, :, 0]
    k, v = case.k.contiguous(), case.v.mT.contiguous().mT
    assert_right(fused.attend(q, k, v, case.layout), case)


@pytest.mark.parametrize("grid", [(1, 16, 24), (1, 13, 11)], ids=str)
def check_nothing_beside_a_head_is_read(grid):
    case = problem(grid, width=24)
    q, k, v = (F.pad(x, (0, 8, 0, 64), value=torch.nan)[:, :, : x.shape[2], :24] for x in case.tensors())
    assert_right(fused.attend(q, k, v, case.layout), case)


def check_all_blocks_live_is_dense():
    case = problem((1, 24, 16), kept=1.0, width=32)
    out = fused.attend(*case.tensors(), case.layout)
    assert_close(out, F.scaled_dot_product_attention(*case.tensors()), atol=2e-6, rtol=0)


@pytest.mark.parametrize("grid", [(1, 24, 24), (1, 20, 20)], ids=str)
def check_rows_that_keep_a_single_block(grid):
    case = problem(grid, kept=0.0)
    assert (case.layout.counts_R == 1).all()
    assert_right(fused.attend(*case.tensors(), case.layout), case)


def check_scores_far_below_zero():
    case = problem((1, 13, 24))
    case.q.fill_(64)
    case.k.fill_(-64)
    assert_right(fused.attend(*case.tensors(), case.layout), case)


def crossing(weight_RCK: Tensor, dropped: float) -> Tensor:
    """The entry of each row at which the sum of the smallest ones reaches `dropped`, or the largest."""
    sorted_RCK = weight_RCK.sort(-1).values
    at_RC1 = (sorted_RCK.double().cumsum(-1) < dropped).sum(-1, keepdim=True).clamp(max=weight_RCK.shape[-1] - 1)
    return sorted_RCK.gather(-1, at_RC1)


def exact_weights(blocks: int) -> Tensor:
    """Rows of multiples of a power of two, whose sums are exact in any order; many are equal, some 0."""
    weight_RCK = torch.randint(0, 16, (2, 3, blocks)).float() / 4096
    weight_RCK[..., -1] += 1 - weight_RCK.sum(-1)
    return weight_RCK


@pytest.mark.parametrize("dropped", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("blocks", [1, 37, 300])
def check_the_threshold_is_the_number_below_the_crossing_entry(blocks, dropped):
    weight_RCK = exact_weights(blocks)
    found = fused.threshold(weight_RCK, dropped)
    assert torch.equal(found, crossing(weight_RCK, dropped).nextafter(torch.zeros(())))


def check_entries_that_sum_to_the_dropped_share_are_too_many():
    found = fused.threshold(torch.tensor([[[0.5, 0.25, 0.125, 0.125]]]), 0.25)
    assert found.item() == torch.tensor(0.125).nextafter(torch.tensor(0.0))


def check_the_threshold_of_a_softmax():
    weight_RCK = torch.randn(3, 70, 2).mul(3).softmax(1).mT
    found_RC1 = fused.threshold(weight_RCK, 0.2)
    edges = found_RC1, crossing(weight_RCK, 0.2)
    below, up_to_crossing = (torch.where(weight_RCK <= edge, weight_RCK, 0).double().sum(-1) for edge in edges)
    assert found_RC1.shape == (3, 2, 1)
    assert (below < 0.2 + 1e-6).all() and (up_to_crossing >= 0.2 - 1e-6).all()


def check_an_error_of_triton_becomes_ours(monkeypatch):
    from comfyui_kandinsky5.kandinsky_core.sparse.kernels import fused_triton

    class Broken:
        def __getitem__(self, grid):
            raise fused_triton.TritonError("out of shared memory\nand more")

    monkeypatch.setattr(fused_triton, "attend_pair", Broken())
    case = problem((1, 8, 8))
    with pytest.raises(BackendUnavailable, match="out of shared memory.*kernel to auto") as caught:
        fused.attend(*case.tensors(), case.layout)
    assert "and more" not in str(caught.value)


@pytest.mark.parametrize("piece", [1, 100, 1 << 21])
@pytest.mark.parametrize("grid", [(2, 16, 24), (1, 24, 24), (2, 13, 19), (1, 8, 8)], ids=str)
def test_pairs_see_the_union_of_their_rows(grid, piece, monkeypatch):
    monkeypatch.setattr(fused, "PAIRED_BLOCKS", piece)
    layout = problem(grid, batch=2, heads=3).layout
    starts, columns, halves = fused.paired(layout)
    assert (starts.dtype, columns.dtype, halves.dtype) == (torch.int64, layout.columns_M.dtype, torch.uint8)
    bounds = starts.tolist()
    found = [
        list(zip(columns[low:high].tolist(), halves[low:high].tolist(), strict=True))
        for low, high in zip(bounds, bounds[1:], strict=False)
    ]
    assert bounds[0] == 0 and found == unions(layout)


def unions(layout: BlockLayout) -> list[list[tuple[int, int]]]:
    """The column and who keeps it (1 the even row, 2 the odd, 3 both), for one pair of query blocks after the other."""
    blocks = layout.tiles.blocks
    wanted = []
    for rows in layout.live().flatten(0, 1).tolist():
        for even, odd in zip(rows[::2], [*rows[1::2], [False] * blocks][: len(rows[::2])], strict=True):
            wanted.append([(at, even[at] + 2 * odd[at]) for at in range(blocks) if even[at] or odd[at]])
    return wanted


def test_without_triton_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, f"{kernels.__name__}.fused_triton", raising=False)
    monkeypatch.delattr(kernels, "fused_triton", raising=False)
    case = problem((1, 8, 8))
    with pytest.raises(BackendUnavailable, match="pip install triton"):
        fused.attend(*case.tensors(), case.layout)


@on_linux
def test_a_cpu_tensor_needs_the_interpreter():
    """A process of its own, in which Triton is not interpreted whatever this one's environment says."""
    code = f"import torch, {fused.__name__} as fused; fused.threshold(torch.ones(1, 1, 4) / 4, 0.1)"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search("BackendUnavailable: .*on a GPU, not on cpu.*TRITON_INTERPRET", done.stderr)


@pytest.mark.parametrize(("width", "dtype"), [(256, torch.float32), (64, torch.float64)])
def test_what_no_program_can_hold_is_refused(width, dtype):
    case = problem((1, 8, 8), width=width, dtype=dtype)
    with pytest.raises(BackendUnavailable, match=f"not {width} in {dtype}"):
        fused.attend(*case.tensors(), case.layout)


def test_rows_too_long_for_a_program_are_refused():
    with pytest.raises(BackendUnavailable, match="8192 blocks, not 8193"):
        fused.threshold(torch.ones(1, 1, 8193), 0.1)


def test_importing_the_module_leaves_triton_out():
    code = f"import sys, {fused.__name__}; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
