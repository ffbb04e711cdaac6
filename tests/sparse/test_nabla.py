"""NABLA as the transformer's attention: order, policy, dense steps and blocks, records, gradients, compilation."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import KandinskyError
from comfyui_kandinsky5.kandinsky_core.model import CrossDiT, dense
from comfyui_kandinsky5.kandinsky_core.sparse import nabla
from comfyui_kandinsky5.kandinsky_core.sparse.kernels import choice as nabla_kernels
from comfyui_kandinsky5.kandinsky_core.sparse.kernels.trial import masked, relative_error
from comfyui_kandinsky5.kandinsky_core.sparse.nabla import Nabla, NablaSettings, policy
from comfyui_kandinsky5.kandinsky_core.sparse.report import summary
from comfyui_kandinsky5.kandinsky_core.variants import VARIANTS, CrossDiTSpec

SPEC = CrossDiTSpec(
    model_dim=32, ff_dim=64, time_dim=16, num_text_blocks=1, num_visual_blocks=3, axes_dims=(4, 6, 6), in_text_dim=12,
    in_text_dim2=8, visual_cond=True,
)  # fmt: skip
ON = NablaSettings(mode="on", mass=0.6, window_thw=(1, 1, 1), min_tok=0)
GRIDS = ((2, 16, 24), (3, 13, 19))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> CrossDiT:
    torch.manual_seed(0)
    made = CrossDiT(SPEC).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim == 2 else 1.0)
    return made


def given(grid: tuple[int, int, int], batch: int = 1, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    t, h, w = grid
    generator = torch.Generator().manual_seed(1)
    shapes = ((batch, t, 2 * h, 2 * w, 33), (batch, 7, 12), (batch, 8))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [*tensors, torch.linspace(100, 900, batch)]


def options(run: Nabla, grid: tuple[int, int, int], sigma: float = 1.0) -> dict:
    return nabla.options(run.forward(grid, SPEC.num_visual_blocks, sigma, CPU), SPEC.num_visual_blocks, dense)


def by_mask(run: Nabla, grid: tuple[int, int, int]) -> dict:
    """Return the same attention computed densely under each block's mask."""
    forward = run.forward(grid, 3, 1.0, CPU)

    def attend(q, k, v):
        layout = nabla.select(q.detach(), k.detach(), forward.tiles, forward.mass, forward.window_KK)
        return masked(q, k, v, layout).to(q.dtype)

    return {"order_N": forward.tiles.order_N, "attend": attend}


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_equals_dense_masked_attention(model, grid, batch):
    run = Nabla(ON, None)
    out = model(*given(grid, batch), **options(run, grid))
    assert relative_error(out, model(*given(grid, batch), **by_mask(Nabla(ON, None), grid))) <= 2e-6
    assert relative_error(out, model(*given(grid, batch))) > 1e-4
    assert all(0.05 < kept < 0.95 for kept in run.record.kept.values())


@torch.no_grad()
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_all_mass_is_dense_attention(model, grid):
    run = Nabla(replace(ON, mass=1.0), None)
    assert relative_error(model(*given(grid), **options(run, grid)), model(*given(grid))) <= 2e-6


@torch.no_grad()
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_batch_is_its_samples(model, grid):
    """Passes of guidance in one batch select for themselves."""
    tensors = given(grid, 2)
    both = model(*tensors, **options(Nabla(ON, None), grid))
    for index in range(2):
        one = model(*(x[index : index + 1] for x in tensors), **options(Nabla(ON, None), grid))
        assert relative_error(both[index : index + 1], one) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_raster_order_in_and_out(model, grid):
    """A host that cannot reorder the tokens lets each attention do it."""
    run = Nabla(ON, None)
    forward = run.forward(grid, 3, 1.0, CPU)
    attends = [
        lambda q, k, v, block=block: forward.attend(q, k, v, block=block, dense=dense, is_ordered=False)
        for block in range(3)
    ]
    expected = model(*given(grid), **options(Nabla(ON, None), grid))
    assert relative_error(model(*given(grid), attend=attends), expected) <= 2e-6


@torch.no_grad()
def test_head_groups_change_nothing(model, monkeypatch):
    grid = GRIDS[0]
    expected = model(*given(grid), **options(Nabla(ON, None), grid))
    monkeypatch.setattr(nabla, "GROUP_BYTES", 1)
    run = Nabla(ON, None)
    assert torch.equal(model(*given(grid), **options(run, grid)), expected)
    assert len(run.record.kept) == 3


@pytest.mark.parametrize("groups", [1, 1 << 28])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gradients_of_attention(monkeypatch, grid, groups):
    monkeypatch.setattr(nabla, "GROUP_BYTES", groups)
    forward = Nabla(ON, None).forward(grid, 3, 1.0, CPU)
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(3, 2, 2, forward.tiles.tokens, 16, generator=generator, dtype=torch.float64)
    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    forward.attend(*ours, block=1, dense=dense).sin().sum().backward()
    q, k, v = theirs
    layout = nabla.select(q.detach(), k.detach(), forward.tiles, forward.mass, forward.window_KK)
    masked(q, k, v, layout).sin().sum().backward()
    assert relative_error(ours.grad, theirs.grad) <= 1e-12
    assert 0.05 < layout.kept < 0.95


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gradients_of_the_model(model, grid):
    """With weights half as large: the other tests' make attention so sharp that it amplifies rounding in gradients."""
    model = deepcopy(model)
    for parameter in model.parameters():
        parameter.data /= 2
    found = []
    for extra in (options(Nabla(ON, None), grid), by_mask(Nabla(ON, None), grid)):
        model.zero_grad()
        model(*given(grid), **extra).square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for ours, expected in zip(*found, strict=True):
        assert relative_error(ours, expected) <= 2e-5


@torch.no_grad()
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_autocast(grid):
    """Training runs under autocast: attention in 16 bits, blocks still chosen by the kernels, none of them lost."""
    run = Nabla(ON, None)
    forward = run.forward(grid, 3, 1.0, CPU)
    q, k, v = torch.randn(3, 1, 2, forward.tiles.tokens, 16, generator=torch.Generator().manual_seed(3))
    expected = forward.attend(*(x.bfloat16() for x in (q, k, v)), block=0, dense=dense)
    with torch.autocast("cpu", torch.bfloat16):
        out = forward.attend(q, k, v, block=0, dense=dense)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    assert run.kernels.used == {"torch": 2} and not run.kernels.left


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["dense", "torch"])
def test_without_a_kernel_nothing_is_claimed(monkeypatch, kernel):
    """Attention is full when dense is wanted or every kernel fails, and then no block counts as left out."""
    run = Nabla(replace(ON, kernel=kernel), None)
    run.begin((1.0, 0.0))
    forward = run.forward(GRIDS[0], 3, 1.0, CPU)
    if kernel == "torch":
        broken = {"torch": lambda *_: (_ for _ in ()).throw(RuntimeError("broken"))}
        monkeypatch.setattr(nabla_kernels, "_KERNELS", broken)
    q = torch.randn(1, 2, forward.tiles.tokens, 16)
    assert torch.equal(forward.attend(q, q, q, block=0, dense=dense), dense(q, q, q))
    assert run.kernels.used == {"dense": 1} and not run.record.kept
    assert "no block-sparse kernel was used" in summary(run)


@torch.no_grad()
def test_compiled_blocks(model):
    grid = GRIDS[0]
    expected = model(*given(grid), **options(Nabla(ON, None), grid))
    network = CrossDiT(SPEC).eval()
    network.load_state_dict(model.state_dict())
    for block in network.visual_transformer_blocks:
        block.compile(backend="aot_eager")
    run = Nabla(ON, None)
    run.begin((1.0, 0.5, 0.0))
    for sigma in (1.0, 0.5):
        out = network(*given(grid), **options(run, grid, sigma))
        assert relative_error(out, expected) <= 2e-6
    assert len(run.record.kept) == 6  # both steps and all blocks really ran through it


def test_dense_steps_and_blocks():
    run = Nabla(replace(ON, dense_first_steps=1, dense_last_steps=2, dense_first_blocks=1, dense_last_blocks=1), None)
    run.begin((1.0, 0.9, 0.7, 0.4, 0.1, 0.0))
    is_sparse = [run.forward(GRIDS[0], 3, sigma, CPU) is not None for sigma in run.sigmas[:-1]]
    assert is_sparse == [False, True, True, False, False]
    forward = run.forward(GRIDS[0], 3, 0.8, CPU)  # between two times: the step that began at 0.9
    assert forward.step == 1
    called = []
    q = torch.randn(1, 2, forward.tiles.tokens, 16)
    for block in range(3):
        forward.attend(q, q, q, block=block, dense=lambda *x, block=block: called.append(block))
    assert called == [0, 2] and list(run.record.kept) == [(1, 1)]


@pytest.mark.parametrize(
    ("name", "size", "frames", "mass"),
    [
        ("lite_t2v_5s_sft", (512, 768), 121, None),
        ("lite_t2v_10s_sft", (512, 768), 241, 0.9),
        ("pro_t2v_5s_sd", (512, 768), 121, None),
        ("pro_t2v_5s_sd", (768, 1280), 121, 0.8),  # the same file serves both sizes
        ("pro_t2v_10s_sd", (512, 768), 241, 0.9),
        ("pro_t2v_10s_sd", (1024, 1024), 241, 0.7),
        ("pro_i2v_5s_hd", (512, 512), 121, None),
        ("pro_i2v_5s_sd", (896, 1152), 121, 0.8),
        ("nano_video", (256, 256), 17, None),
    ],
)
def test_auto_follows_the_variant_table(name, size, frames, mass):
    height, width = size
    grid = ((frames - 1) // 4 + 1, height // 16, width // 16)
    found = policy(NablaSettings(mass=0.1), VARIANTS[name], grid)
    assert (found.P if found.kind == "nabla" else None) == mass
    if mass:
        assert (found.wT, found.wH, found.wW) == (11, 3, 3)
    assert policy(NablaSettings(mode="off"), VARIANTS[name], grid).kind == "full"
    assert policy(NablaSettings(mode="on", mass=0.5, min_tok=0), VARIANTS[name], grid).P == 0.5
    assert policy(NablaSettings(mode="on", min_tok=10**6), VARIANTS[name], grid).kind == "full"


@pytest.mark.parametrize(
    ("name", "grid", "mass"),
    [
        ("lite_t2v_5s_sft", (31, 32, 48), None),
        ("lite_t2v_5s_sft", (61, 32, 48), 0.9),
        ("pro_t2v_5s_sd", (61, 64, 64), 0.7),
        ("pro_t2v_5s_sd", (31, 48, 80), 0.8),
    ],
)
def test_auto_takes_the_length_into_account_when_the_row_is_assumed(name, grid, mass):
    """Core's own loader does not tell the 5 s from the 10 s weights."""
    found = policy(NablaSettings(), VARIANTS[name], grid, is_assumed=True)
    assert (found.P if found.kind == "nabla" else None) == mass


def test_auto_knows_nothing_of_an_unknown_model():
    assert policy(NablaSettings(), None, (61, 32, 48)).kind == "full"


@pytest.mark.parametrize(
    "wrong",
    [{"mode": "maybe"}, {"kernel": "sage"}, {"mass": 1.5}, {"mass": -0.1}, {"window_thw": (-1, 3, 3)}, {"min_tok": -1}],
    ids=str,
)
def test_wrong_settings(wrong):
    with pytest.raises(KandinskyError):
        NablaSettings(**wrong)


@torch.no_grad()
def test_record(model):
    grid = GRIDS[0]
    run = Nabla(ON, None)
    run.begin((1.0, 0.5, 0.0))
    for sigma in (1.0, 1.0, 0.5):  # the first step has two passes
        model(*given(grid), **options(run, grid, sigma))
    record = run.record
    assert list(record.kept) == [(step, block) for step in (0, 1) for block in range(3)]
    assert record.kept[0, 1] == pytest.approx(record.kept[1, 1])  # the network saw the same both times
    assert (record.token_thw, record.blocks, record.steps, record.attention.P) == (grid, 3, 2, 0.6)
    assert (record.example.step, record.example.block) == (1, 1)
    live = record.example.live()
    assert live.shape == (12, 12) and live.diagonal().all()
    run.begin((1.0, 0.0))
    assert not run.record.kept and record.kept
