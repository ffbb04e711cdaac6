"""Blocks that travel: values, order, what is left behind by exceptions, and who may overwrite what when."""

from __future__ import annotations

import copy

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.errors import KandinskyError
from comfyui_kandinsky5.kandinsky_core.memory.cargo import in_dtype
from comfyui_kandinsky5.kandinsky_core.memory.lane import Lane
from comfyui_kandinsky5.kandinsky_core.memory.stream import BlockStream, spread
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

CPU = torch.device("cpu")


class Block(nn.Module):
    """A residual block with a parameter that is not used every time, a buffer, and a size of its own."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.wide = nn.Linear(width, inner)
        self.back = nn.Linear(inner, width, bias=False)
        self.register_buffer("shift", torch.randn(width))

    def forward(self, x):
        return x + self.back(torch.tanh(self.wide(x))) + self.shift.to(x)


class Model(nn.Module):
    """Blocks between two layers that stay."""

    def __init__(self, blocks: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(Block(16, 16 + 8 * (index % 3)) for index in range(blocks))
        self.last = nn.Linear(16, 4)

    def forward(self, x, skip=(), before=lambda index: None):
        x = self.first(x)
        for index, block in enumerate(self.blocks):
            before(index)
            if index not in skip:
                x = block(x)
        return self.last(x)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def x():
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def pointers(model):
    return [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]


@pytest.mark.parametrize("prefetch", range(7))
@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_results_are_those_of_the_resident_model(x, blocks, prefetch):
    model = Model(blocks)
    wanted, before = model(x), pointers(model)
    with BlockStream(model, list(model.blocks), CPU, prefetch=prefetch) as stream:
        for _ in range(3):
            assert torch.equal(model(x), wanted)
            assert pointers(model) == before  # between calls the model is as loaded
        assert stream.ring_bytes == min(prefetch + 1, blocks) * max(cargo.nbytes for cargo in stream._cargos)
    assert pointers(model) == before
    assert torch.equal(model(x), wanted)


def test_a_block_reads_the_ring_and_not_what_was_loaded(x):
    model = Model()
    seen = []
    with BlockStream(model, list(model.blocks), CPU) as stream:
        ring = [range(b.memory.data_ptr(), b.memory.data_ptr() + b.memory.nbytes) for b in stream._ring]
        for block in model.blocks:
            block.wide.register_forward_hook(lambda layer, *_: seen.append(layer.weight.data_ptr()))
        model(x)
        model(x)
    assert len(seen) == 10 and all(any(pointer in place for place in ring) for pointer in seen)
    assert len({next(i for i, place in enumerate(ring) if pointer in place) for pointer in seen}) == 2


@pytest.mark.parametrize("prefetch", range(4))
def test_every_evaluation_moves_each_block_once(x, prefetch):
    model = Model()
    with BlockStream(model, list(model.blocks), CPU, prefetch=prefetch) as stream:
        model(x)
        first = stream.moved_bytes
        for count in range(1, 4):
            model(x)
            assert stream.moved_bytes - first == count * stream.pass_bytes
        assert stream.pass_bytes == sum(cargo.nbytes for cargo in stream._cargos)


def test_a_ring_for_all_blocks_is_filled_once(x):
    model = Model(3)
    with BlockStream(model, list(model.blocks), CPU, prefetch=5) as stream:
        model(x)
        filled = stream.moved_bytes
        model(x)
        assert stream.moved_bytes == filled and stream.pass_bytes == 0


@pytest.mark.parametrize("where", [0, 2, 4])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_breaks_inside_a_block_leaves_a_model_that_works(x, error, where):
    model = Model()
    wanted, before = model(x), pointers(model)

    def fail(*_):
        raise error("stop")

    with BlockStream(model, list(model.blocks), CPU):
        model(x)
        hook = model.blocks[where].back.register_forward_hook(fail)
        with pytest.raises(error):
            model(x)
        hook.remove()
        assert torch.equal(model(x), wanted)
        assert pointers(model) == before


def test_closing_after_an_interrupt_restores_the_model(x):
    model = Model()
    wanted, before = model(x), pointers(model)

    def fail(*_):
        raise KeyboardInterrupt

    stream = BlockStream(model, list(model.blocks), CPU)
    hook = model.blocks[1].back.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    hook.remove()
    stream.close()
    assert pointers(model) == before and torch.equal(model(x), wanted)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)


def test_a_run_cancelled_between_blocks_starts_over(x):
    model = Model()
    wanted = model(x)

    def cancel(index):
        if index == 3:
            raise KeyboardInterrupt

    with BlockStream(model, list(model.blocks), CPU, prefetch=2):
        with pytest.raises(KeyboardInterrupt):
            model(x, before=cancel)
        assert torch.equal(model(x), wanted)


@given(st.lists(st.sets(st.integers(0, 4), max_size=4), min_size=1, max_size=4), st.integers(0, 5))
def test_skipped_blocks_cost_time_but_no_correctness(skips, prefetch):
    model, x = Model(), torch.ones(1, 8)
    with torch.no_grad():
        wanted = [model(x, skip) for skip in skips]
        with BlockStream(model, list(model.blocks), CPU, prefetch=prefetch):
            assert all(torch.equal(model(x, skip), want) for skip, want in zip(skips, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_that_of_a_converted_model(x, dtype):
    model = Model()
    converted = copy.deepcopy(model)
    for parameter in converted.parameters():
        parameter.data = parameter.data.to(dtype)
    before = [parameter.dtype for parameter in model.parameters()]
    with BlockStream(model, list(model.blocks), CPU, dtype_of=in_dtype(dtype)):
        assert torch.equal(model(x.to(dtype)), converted(x.to(dtype)))
    assert [parameter.dtype for parameter in model.parameters()] == before


@pytest.mark.parametrize("place", [0, 8, 16, 56])
def test_tensors_keep_their_place_in_a_cache_line(x, place):
    model = Model()
    for parameter in model.parameters():
        room = torch.empty(parameter.nbytes + 64, dtype=torch.uint8)[place:]
        view = room[: parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        parameter.data = view.copy_(parameter)
    wanted = model(x[:1])  # a product with one vector rounds by it
    seen = []
    with BlockStream(model, list(model.blocks), CPU):
        for block in model.blocks:
            block.wide.register_forward_hook(lambda layer, *_: seen.append(layer.weight.data_ptr() % 64))
        assert torch.equal(model(x[:1]), wanted)
    assert seen == [place] * 5


class Packed(nn.Module):
    """A quantised layer: bytes, their scale and a table of integers."""

    def __init__(self, weight) -> None:
        super().__init__()
        self.register_buffer("scale", weight.abs().amax() / 100)
        self.weight = nn.Parameter((weight / self.scale).to(torch.int8), requires_grad=False)
        self.bias = nn.Parameter(torch.ones(len(weight)))
        self.register_buffer("fp8", weight.to(torch.float8_e4m3fn))

    def forward(self, x):
        return x @ (self.weight.float() * self.scale).to(x).T + self.bias.to(x) + self.fp8[0, 0].to(x)


def test_quantised_layers_travel_as_they_are(x):
    model = Model()
    for block in model.blocks:
        block.back = Packed(block.back.weight.data)
    x = x.bfloat16()
    for part in (model.first, model.last, *(block.wide for block in model.blocks)):
        part.bfloat16()
    wanted = model(x)
    seen = []
    with BlockStream(model, list(model.blocks), CPU, dtype_of=in_dtype(torch.bfloat16)):
        model.blocks[0].back.register_forward_hook(
            lambda layer, *_: seen.append((layer.weight.dtype, layer.scale.dtype, layer.bias.dtype))
        )
        assert torch.equal(model(x), wanted)
    assert seen == [(torch.int8, torch.float32, torch.float32)]


def test_kept_modules_do_not_travel(x):
    model = Model()
    wanted, kept = model(x), [block.wide for block in model.blocks]
    with BlockStream(model, list(model.blocks), CPU, keep=kept) as stream:
        assert torch.equal(model(x), wanted)
        inside = {id(entry.holder) for cargo in stream._cargos for entry in cargo.entries}
    assert inside == {id(t) for block in model.blocks for t in (block.back.weight, block.shift)}


class Checked(Lane):
    """Copies as late as the stream allows, and knows when a buffer was last read."""

    def __init__(self) -> None:
        self.time = 0
        self.queue = []
        self.read = {}

    def mark(self):
        self.time += 1
        return self.time

    def carry(self, cargo, image, buffer, after):
        assert after > self.read.get(buffer.data_ptr(), 0), "overwritten while a block may still compute with it"
        mark = object()
        self.queue.append((mark, cargo, buffer))
        return mark

    def wait(self, mark):
        self.time += 1
        while any(queued is mark for queued, *_ in self.queue):
            done, cargo, buffer = self.queue.pop(0)
            cargo.write(buffer)
            if done is mark:
                self.read[buffer.data_ptr()] = self.time


@pytest.mark.parametrize("prefetch", range(5))
def test_copies_may_be_late_and_never_overtake_the_computation(x, prefetch):
    model = Model()
    wanted = model(x)
    lane = Checked()
    with BlockStream(model, list(model.blocks), CPU, prefetch=prefetch, lane=lane):
        for skip in ((), (), (1, 2), ()):
            assert torch.equal(model(x, skip), wanted if not skip else model_skipping(x, skip))
    assert lane.read


def model_skipping(x, skip):
    return Model()(x, skip)


@given(st.integers(1, 70), st.one_of(st.none(), st.integers(0, 80)))
def test_resident_blocks_lie_evenly_between(count, resident):
    blocks = list(nn.ModuleList(nn.Identity() for _ in range(count)))
    streamed = spread(blocks, resident)
    assert len(streamed) == (0 if resident is None else max(0, count - resident))
    places = [blocks.index(block) for block in streamed]
    assert places == sorted(places)
    gaps = {b - a for a, b in zip(places, places[1:], strict=False)}
    assert len(gaps) <= 2 and (not gaps or max(gaps) - min(gaps) <= 1)


def test_what_cannot_be_streamed_is_said():
    model = Model()
    with pytest.raises(KandinskyError, match="not a part of the model"):
        BlockStream(model, [nn.Linear(1, 1)], CPU)
    with pytest.raises(KandinskyError, match="prefetch is -1"):
        BlockStream(model, list(model.blocks), CPU, prefetch=-1)
    with pytest.raises(KandinskyError, match="no weights"):
        BlockStream(model.to("meta"), list(model.blocks), CPU)
