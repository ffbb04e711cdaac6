"""Kernels that fail make room for the next one, once, aloud, and without changing the result."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from comfyui_kandinsky5.kandinsky_core.errors import BackendUnavailable
from comfyui_kandinsky5.kandinsky_core.sparse import selection
from comfyui_kandinsky5.kandinsky_core.sparse.kernels import blockwise, choice, trial
from comfyui_kandinsky5.kandinsky_core.sparse.kernels.choice import NAMES, Kernels
from comfyui_kandinsky5.kandinsky_core.sparse.kernels.trial import masked, relative_error

from .conftest import problem

CASE = problem((2, 16, 24), batch=2)


def attend(kernels: Kernels, times: int = 3) -> torch.Tensor:
    for _ in range(times):
        out = kernels.attend(*CASE.tensors(), CASE.layout)
    return out


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture(autouse=True)
def fresh_trials():
    trial._checked.cache_clear()
    yield
    trial._checked.cache_clear()


def replaced(monkeypatch, name: str, kernel) -> None:
    monkeypatch.setitem(choice._KERNELS, name, kernel)


def failing(error: Exception):
    def kernel(*_):
        raise error

    return kernel


def test_auto_takes_a_kernel_that_needs_no_compiler_for_float32(caplog):
    kernels = Kernels()
    assert relative_error(attend(kernels), masked(*CASE.tensors(), CASE.layout)) <= 2e-6
    assert kernels.used == {"torch": 3} and not warnings(caplog)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("No valid shared memory configuration"),
        torch.OutOfMemoryError("out of memory"),
        ImportError("no module named triton"),
        BackendUnavailable("not installed"),
        AssertionError("head_dim should be 64 or 128"),
        TypeError("unexpected argument"),
        ValueError("unsupported device"),
        OSError("no such file"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_raising_kernel_is_left(monkeypatch, caplog, error):
    replaced(monkeypatch, "flex", failing(error))
    kernels = Kernels("flex")
    assert relative_error(attend(kernels), masked(*CASE.tensors(), CASE.layout)) <= 2e-6
    assert kernels.used == {"torch": 3} and list(kernels.left) == ["flex"]
    [line] = warnings(caplog)
    assert "flex" in line and str(error) in line and "torch kernel takes over" in line


def test_a_kernel_that_fails_late_is_left(monkeypatch, caplog):
    """It passes its trial and then runs out of memory on the clip."""

    def greedy(q, k, v, layout):
        if len(q) > 1:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return blockwise.attend(q, k, v, layout)

    replaced(monkeypatch, "flex", greedy)
    kernels = Kernels("flex")
    assert relative_error(attend(kernels), masked(*CASE.tensors(), CASE.layout)) <= 2e-6
    assert "20 GiB" in kernels.left["flex"] and len(warnings(caplog)) == 1


def test_a_wrong_kernel_is_left(monkeypatch, caplog):
    def forgets_the_blocks(q, k, v, layout):
        return F.scaled_dot_product_attention(q, k, v)

    replaced(monkeypatch, "flex", forgets_the_blocks)
    kernels = Kernels("flex")
    assert relative_error(attend(kernels), masked(*CASE.tensors(), CASE.layout)) <= 2e-6
    assert "wrong results" in kernels.left["flex"] and len(warnings(caplog)) == 1


ALONE = """
import logging
from comfyui_kandinsky5.kandinsky_core.sparse.kernels.choice import Kernels
from comfyui_kandinsky5.kandinsky_core.sparse.kernels.trial import masked, relative_error
from comfyui_kandinsky5.tests.sparse.conftest import problem
logging.basicConfig()
case = problem((2, 16, 24))
kernels = Kernels("flex")
out = kernels.attend(*case.tensors(), case.layout)
assert relative_error(out, masked(*case.tensors(), case.layout)) <= 2e-6
assert kernels.used == {"torch": 1}, kernels.used
"""


@pytest.mark.parametrize(
    ("broken", "reason"),
    [({"CXX": "no-such-compiler", "PATH": ""}, "ompiler"), ({"TORCHDYNAMO_DISABLE": "1"}, "wrong results")],
    ids=["no compiler", "compiling switched off"],
)
def test_flex_without_a_compiler_is_left(tmp_path, broken, reason):
    """Compilers are looked for once a process. Switched off, torch runs FlexAttention eagerly: on all blocks."""
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)} | broken
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    [line] = [line for line in done.stderr.splitlines() if "the flex kernel is left" in line]
    assert reason in line


def test_when_nothing_is_left_there_is_no_sparse_attention(monkeypatch, caplog):
    replaced(monkeypatch, "torch", failing(RuntimeError("broken")))
    kernels = Kernels()
    assert attend(kernels) is None and not kernels.used
    [line] = warnings(caplog)
    assert "computed in full" in line


def test_errors_that_are_not_the_kernels_go_through(monkeypatch):
    replaced(monkeypatch, "torch", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        attend(Kernels())


def test_a_new_run_tries_again(monkeypatch):
    replaced(monkeypatch, "torch", failing(RuntimeError("busy")))
    attend(Kernels())
    monkeypatch.undo()
    kernels = Kernels()
    attend(kernels)
    assert kernels.used == {"torch": 3}


def test_candidates_by_dtype_and_size(monkeypatch):
    small, long = torch.zeros(1, 1, 64, 16), torch.zeros(1, 1, choice.COMPILE_TOK, 16)
    assert Kernels().candidates(long) == ["torch"]
    assert Kernels().candidates(small.bfloat16()) == ["torch"]
    for has_products, found in ((True, ["flex", "torch"]), (False, ["torch"])):
        monkeypatch.setattr(choice.flex, "multiplies_16_bit", lambda has=has_products: has)
        assert Kernels().candidates(long.bfloat16()) == found
    assert Kernels("triton").candidates(small) == ["triton", "torch"]
    monkeypatch.setattr(choice, "_has_triton", lambda: True)
    assert Kernels().candidates(long.to("meta")) == ["triton", "flex", "torch"]
    monkeypatch.setattr(choice, "_has_triton", lambda: False)
    assert Kernels().candidates(long.to("meta")) == ["torch"]
    assert Kernels("dense").candidates(long) == []


@pytest.mark.parametrize("broken", [failing, lambda error: lambda weight, dropped: weight[..., :1] * 0 - 1])
def test_a_failing_selection_is_left(monkeypatch, caplog, broken):
    """Run on a processor: the class thinks it is a GPU's tensor."""
    monkeypatch.setattr(choice, "_has_triton", lambda: True)
    monkeypatch.setattr(choice.fused, "threshold", broken(RuntimeError("no driver")))
    weight = torch.rand(1, 8, 50).softmax(-1).as_subclass(ElsewhereTensor)
    kernels = Kernels()
    for _ in range(2):
        found = kernels.threshold(weight, 0.3)
    assert torch.equal(found.as_subclass(torch.Tensor), selection.threshold(weight.as_subclass(torch.Tensor), 0.3))
    [line] = warnings(caplog)
    assert "plain torch operations" in line and ("no driver" in line or "wrong results" in line)


class ElsewhereTensor(torch.Tensor):
    is_cpu = False


def test_unknown_kernel():
    with pytest.raises(BackendUnavailable, match=", ".join(NAMES)):
        Kernels("sage")
