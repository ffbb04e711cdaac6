"""Compiled norms give the same decode, and whatever the compiler does, nothing of a decode is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import BackendUnavailable
from comfyui_kandinsky5.kandinsky_core.vae import compiled, statistics
from comfyui_kandinsky5.kandinsky_core.vae.compiled import Compiled
from comfyui_kandinsky5.kandinsky_core.vae.decoding import Decoding, decode_with, exact_statistics
from comfyui_kandinsky5.kandinsky_core.vae.plan import (
    LATE_TILE,
    REFERENCE,
    SINGLE_PASS,
    STREAM,
    plan_decode,
    smaller,
)
from comfyui_kandinsky5.kandinsky_core.vae.rescue import finish
from compiler import can_compile
from tiny_vae import EXACT, Own, error, latent, plan_for, tiny_vae
from torch import nn
from torch.testing import assert_close

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from measure import peak_live_bytes  # noqa: E402

ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def is_out_of_memory(error):
    return "out of memory" in str(error)


@pytest.fixture
def lines():
    return []


@pytest.fixture
def normalise(lines):
    return Compiled(is_out_of_memory, lines.append)


@pytest.fixture(autouse=True)
def fresh_trials():
    compiled.check.cache_clear()
    yield
    compiled.check.cache_clear()


@pytest.fixture(scope="module")
def vae():
    return tiny_vae()


@pytest.fixture(scope="module")
def clip(vae):
    """A latent, statistics and the plain decode."""
    z = latent(1, 3, 3, 4)
    known = exact_statistics(vae, z)
    return z, known, decode_with(vae, z, plan_for(z, chunk=2), statistics=known)


def only_compiled(patch):
    """From here on a norm with SiLU that is not computed by the kernel is an error."""

    def no_silu(*given, silu):
        assert not silu, "torch's own kernels took over"
        statistics.in_slices(*given, silu=silu)

    patch.setattr(compiled, "in_slices", no_silu)


@pytest.mark.parametrize(
    "settings",
    [{"chunk": 2}, {"mode": LATE_TILE, "tiles": (2, 2), "chunk": 1, "caches_on_host": True}, {"mode": REFERENCE},
     {"mode": SINGLE_PASS, "chunk": 1}],
    ids=lambda settings: settings.get("mode", STREAM),
)  # fmt: skip
def test_every_mode_gives_the_plain_frames(vae, clip, monkeypatch, normalise, lines, settings):
    z, known, _ = clip
    plan = plan_for(z, **settings)
    given = {"statistics": known if plan.mode in (STREAM, LATE_TILE) else None}
    wanted = decode_with(vae, z, plan, **given)
    if can_compile():
        compiled.check(z.device, z.dtype)
        only_compiled(monkeypatch)
    assert error(decode_with(vae, z, plan, normalise=normalise, **given), wanted) < EXACT
    assert len(lines) == (not can_compile()) and (normalise.left is None) == can_compile()


def test_a_host_s_layers_and_batches(vae, normalise):
    z = latent(2, 2, 2, 3)
    wanted = decode_with(vae, z, plan_for(z, chunk=1))
    own = decode_with(tiny_vae(ops=Own), z, plan_for(z, chunk=1), normalise=normalise)
    assert error(own, wanted) < EXACT


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_one_kernel_serves_all_places_and_sizes(normalise, dtype):
    """Where there is no compiler nothing is compiled at all."""
    from torch._dynamo.utils import counters

    vae = tiny_vae(dtype=dtype)

    def graphs(z, **settings):
        decode_with(vae, z.to(dtype), plan_for(z, **settings), normalise=normalise)
        return counters["stats"]["unique_graphs"]

    first = graphs(latent(1, 1, 2, 2))
    assert graphs(latent(2, 3, 3, 4), chunk=2) == first
    assert graphs(latent(1, 5, 4, 3), chunk=1) == graphs(latent(1, 3, 8, 5), mode=LATE_TILE, tiles=(3, 2)) == first
    assert (normalise.left is None) == can_compile()


@pytest.mark.parametrize("dtype", ROUNDING)
@torch.no_grad()
def test_a_norm_of_a_piece_in_any_type(normalise, dtype):
    torch.manual_seed(0)
    layer = nn.GroupNorm(4, 24, eps=1e-6).requires_grad_(False).to(dtype)
    layer.weight.uniform_(0.5, 1.5)
    layer.bias.uniform_(-0.5, 0.5)
    x = (torch.randn(2, 24, 3, 9, 12) * 2 + 3).to(dtype)[..., 1:7, 2:]
    moments = statistics.measure(x, 4)
    out = torch.full((2, 24, 5, 8, 12), torch.nan, dtype=dtype)
    statistics.Norm("norm", layer, x, normalise).write(x, moments, out[:, :, 2:, 1:-1, 1:-1], silu=True)
    wide = torch.promote_types(dtype, torch.float32)
    wanted = nn.functional.silu(layer.to(wide)(x.to(wide)))
    assert_close(out[:, :, 2:, 1:-1, 1:-1].to(wide), wanted, atol=ROUNDING[dtype] * 4, rtol=ROUNDING[dtype])
    assert out[:, :, :2].isnan().all() and out[..., 0].isnan().all() and out[..., -1, :].isnan().all()


@pytest.mark.parametrize("shape", [(2, 32, 32), (1, 32, 32), (2, 33, 40)])
@torch.no_grad()
def test_no_temporaries(normalise, shape):
    """Whole frames, a single one, a piece of some."""
    x = torch.zeros(1, 32, *shape, dtype=torch.float64)[..., :32, :32]
    layer = nn.GroupNorm(4, 32, eps=1e-6, dtype=torch.float64).requires_grad_(False)
    moments, out = statistics.measure(x, 4), x.new_empty(1, 32, 2 + x.shape[2], 34, 34)[:, :, 2:, 1:-1, 1:-1]
    peaks = []
    for way in (statistics.in_slices, normalise):
        norm = statistics.Norm("norm", layer, x, way)
        norm.write(x, moments, out, silu=True)  # compiles
        peaks.append(peak_live_bytes(lambda norm=norm: norm.write(x, moments, out, silu=True)))
    plain, fused = peaks
    assert plain >= out.nbytes / 8
    assert fused < out.nbytes / 100 if can_compile() else fused == plain


class Faulty:
    """The kernel, or one that writes nonsense and raises, when `fails(call)` says so; calls of the trial count."""

    def __init__(self, monkeypatch, fails, raised, kernel=None):
        self.calls, self.failures = 0, 0
        plain = kernel or _plainly

        def kernel(*given):
            self.calls += 1
            if fails(self.calls):
                self.failures += 1
                given[-1].fill_(torch.nan)
                raise raised
            plain(*given)

        monkeypatch.setattr(compiled, "_kernel", lambda: kernel)


def _plainly(x_CWH, parameters_3C, out_CWH):
    """What the kernel computes, in place of a compiled one where only the way around it is tested."""
    mean, scale, bias = parameters_3C[..., None, None]
    out_CWH.copy_(nn.functional.silu((x_CWH - mean) * scale + bias))


@pytest.mark.parametrize(
    ("raised", "at"),
    [
        (RuntimeError("invalid cubin"), 1), (RuntimeError("invalid cubin"), 200), (ImportError("no triton"), 1),
        (AttributeError("no attribute"), 10), (TypeError("unexpected argument"), 10), (ValueError("bad value"), 10),
        (KeyError("s77"), 10), (AssertionError("assert"), 10), (OSError("no such file"), 10),
    ],
    ids=lambda given: type(given).__name__ if isinstance(given, Exception) else str(given),
)  # fmt: skip
def test_a_kernel_that_fails_is_left_once_and_nothing_is_lost(vae, clip, monkeypatch, normalise, lines, raised, at):
    z, known, whole = clip
    faulty = Faulty(monkeypatch, lambda call: call >= at, raised)
    for _ in range(2):  # clips of one batch share what was learned
        out = decode_with(vae, z, plan_for(z, chunk=2), statistics=known, normalise=normalise)
        assert error(out, whole) < EXACT
    [line] = lines
    assert faulty.failures == 1 and faulty.calls == at
    assert type(raised).__name__ in line and str(raised) in line and "same picture" in line
    assert normalise.left in line


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_kernel_a_little_off_is_refused(monkeypatch, dtype):
    def scales_less(x, parameters, out):
        _plainly(x, parameters * torch.tensor([1, 0.97, 1])[:, None].to(parameters), out)

    monkeypatch.setattr(compiled, "_kernel", lambda: scales_less)
    with pytest.raises(BackendUnavailable, match="wrong results"):
        compiled.check(torch.device("cpu"), dtype)
    monkeypatch.setattr(compiled, "_kernel", lambda: _plainly)
    compiled.check(torch.device("cpu"), dtype)


def test_a_kernel_that_errs_is_left(vae, clip, monkeypatch, normalise, lines):
    z, known, whole = clip

    def forgets_the_scale(x, parameters, out):
        _plainly(x, torch.stack([parameters[0], torch.ones_like(parameters[1]), parameters[2]]), out)

    Faulty(monkeypatch, lambda _: False, None, forgets_the_scale)
    assert error(decode_with(vae, z, plan_for(z), statistics=known, normalise=normalise), whole) < EXACT
    [line] = lines
    assert "wrong results" in line


class Cancelled(BaseException):
    """Stands for whatever ends a run from outside."""


def test_what_is_not_the_compiler_s_passes_through(vae, clip, monkeypatch, normalise, lines):
    z, known, whole = clip
    frames = torch.empty_like(whole)

    def put(piece):
        frames[:, :, piece.frames] = piece.pixels_BCTHW

    Faulty(monkeypatch, lambda call: call == 60, Cancelled())
    decoding = Decoding(vae, z, plan_for(z), on_piece=put, statistics=known, normalise=normalise)
    with pytest.raises(Cancelled):
        decoding.run()
    decoding.run()
    assert error(frames, whole) < EXACT and not lines and normalise.left is None


@pytest.mark.parametrize("raised", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("out of memory")])
@pytest.mark.parametrize("at", [[1], [60], [30, 50]])
def test_running_out_of_memory_is_the_ladder_s(vae, clip, monkeypatch, normalise, lines, raised, at):
    z, known, whole = clip
    plan = plan_decode(vae.spec, tuple(z.shape[2:]), free_bytes=None, itemsize=8, mode=STREAM, chunk=2)
    out, told = torch.full_like(whole, torch.nan), []

    def put(piece):
        out[:, :, piece.frames, piece.rows, piece.columns] = piece.pixels_BCTHW

    faulty = Faulty(monkeypatch, lambda call: call in at, raised)
    decoding = Decoding(vae, z, plan, on_piece=put, statistics=known, normalise=normalise)
    finish(
        decoding, is_out_of_memory=is_out_of_memory, free_memory=lambda: None, to_processor=lambda: None,
        announce=told.append,
    )  # fmt: skip
    assert error(out, whole) < EXACT
    for line in told:
        assert line.startswith("Out of memory after")
        plan = smaller(plan, vae.spec)
    assert decoding.plan == plan and not lines and normalise.left is None
    assert faulty.failures == len(told) == len(at) and faulty.calls > at[-1] + 50, "the kernel goes on"


def test_a_compiler_that_always_runs_out_of_memory_does_not_end_the_decode(vae, clip, monkeypatch, normalise, lines):
    z, known, whole = clip
    Faulty(monkeypatch, lambda _: True, RuntimeError("cc1plus: out of memory allocating 65536 bytes"))
    with pytest.raises(RuntimeError, match="cc1plus"):
        decode_with(vae, z, plan_for(z), statistics=known, normalise=normalise)
    assert error(decode_with(vae, z, plan_for(z), statistics=known, normalise=normalise), whole) < EXACT
    [line] = lines
    assert "cc1plus" in line


ALONE = """
import logging
from comfyui_kandinsky5.kandinsky_core.vae.compiled import Compiled
from comfyui_kandinsky5.kandinsky_core.vae.decoding import decode_with
from comfyui_kandinsky5.tests.tiny_vae import error, latent, plan_for, tiny_vae
logging.basicConfig()
vae, z = tiny_vae(), latent(1, 2, 2, 2)
normalise = Compiled(lambda error: False)
plain, out = (decode_with(vae, z, plan_for(z), **how) for how in ({}, {"normalise": normalise}))
assert error(out, plain) < 1e-10 and normalise.left
"""


@pytest.mark.parametrize(
    ("broken", "reason"),
    [({"CXX": "no-such-compiler", "PATH": ""}, "ompiler"), ({"TORCHDYNAMO_DISABLE": "1"}, "without compiling")],
    ids=["no compiler", "compiling switched off"],
)
def test_without_a_compiler_the_decode_goes_on(tmp_path, broken, reason):
    """Compilers are looked for once a process."""
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)} | broken
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    [line] = [line for line in done.stderr.splitlines() if "torch.compile is left" in line]
    assert reason in line
