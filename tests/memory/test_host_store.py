"""Page-locked copies and the way over a copy stream, with plain memory and torch's stand-in streams."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from weakref import ref

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.memory import stream as streaming
from comfyui_kandinsky5.kandinsky_core.memory.cargo import Cargo, in_dtype
from comfyui_kandinsky5.kandinsky_core.memory.host_store import HostStore
from comfyui_kandinsky5.kandinsky_core.memory.lane import STAGES, StreamLane
from comfyui_kandinsky5.kandinsky_core.memory.stream import BlockStream
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

CPU = torch.device("cpu")


def memory(nbytes):
    return torch.zeros(nbytes, dtype=torch.uint8)


@given(st.lists(st.integers(1, 40), max_size=12), st.integers(-1, 200_000))
def test_slabs_stay_under_the_limit_and_hold_what_travels(widths, limit):
    cargos = [Cargo([nn.Linear(width, 64)], in_dtype(torch.bfloat16)) for width in widths]
    sizes = []
    store = HostStore(cargos, limit, lambda nbytes: sizes.append(nbytes) or memory(nbytes))
    assert store.nbytes == sum(sizes) <= max(0, limit)
    assert all(size & (size - 1) == 0 for size in sizes)
    held = [store.image(cargo) is not None for cargo in cargos]
    assert held == sorted(held, reverse=True)  # the first blocks, none in between left out
    if limit >= 2 * sum(cargo.nbytes for cargo in cargos):
        assert all(held)
    for cargo, image in ((cargo, store.image(cargo)) for cargo in cargos):
        if image is not None:
            wanted = memory(cargo.nbytes)
            cargo.write(wanted)
            assert torch.equal(image, wanted)


def test_without_page_locked_memory_weights_travel_from_where_they_are(caplog):
    def refuse(nbytes):
        raise RuntimeError("CUDA error: out of memory")

    cargos = [Cargo([nn.Linear(8, 64)]) for _ in range(3)]
    store = HostStore(cargos, 1 << 20, refuse)
    assert store.nbytes == 0 and not any(store.image(cargo) is not None for cargo in cargos)
    assert len(caplog.records) == 1 and "page-locked" in caplog.text


class Event:
    """Knows whether the host waited for it."""

    def __init__(self) -> None:
        self.waited = False

    def synchronize(self):
        self.waited = True


class Stream:
    """A stream that is always done; it remembers what it was told to wait for."""

    def __init__(self, device=None) -> None:
        self.events, self.waits = [], []

    def record_event(self):
        self.events.append(Event())
        return self.events[-1]

    def wait_event(self, event):
        self.waits.append(event)

    def synchronize(self):
        for event in self.events:
            event.synchronize()


@pytest.fixture
def kind():
    computing = Stream()
    return SimpleNamespace(
        Stream=Stream, current_stream=lambda device: computing, stream=nullcontext, computing=computing
    )


@pytest.mark.parametrize("limit", [0, 3000, 1 << 20])
def test_a_copy_stream_gives_the_same_results(kind, limit):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)))
    x = torch.randn(2, 16)
    stages = []

    def stage(nbytes):
        stages.append(memory(nbytes))
        return stages[-1]

    with torch.no_grad():
        wanted = model(x)
        largest = max(Cargo([layer]).nbytes for layer in model)
        lane = StreamLane(CPU, largest, stage, kind)
        with BlockStream(model, list(model), CPU, lane=lane) as stream:
            stream._store = HostStore(stream._cargos, limit, memory)
            for _ in range(3):
                assert torch.equal(model(x), wanted)
    held = sum(limit >= size for size in (3000, 1 << 20)) == 2
    assert len(stages) == (0 if held else STAGES)
    assert lane.stream.waits and all(event in kind.computing.events for event in lane.stream.waits)
    assert kind.computing.waits and all(event in lane.stream.events for event in kind.computing.waits)


def test_a_staging_buffer_is_written_again_only_after_it_was_read(kind):
    lane = StreamLane(CPU, 4096, memory, kind)
    cargos = [Cargo([nn.Linear(8, 8)]) for _ in range(5)]
    marks = []
    for cargo in cargos:
        marks.append(lane.carry(cargo, None, memory(4096), None))
        assert [mark.waited for mark in marks] == [place < len(marks) - STAGES for place in range(len(marks))]


def test_a_closed_stream_gives_back_its_page_locked_memory(kind, monkeypatch):
    model, slabs, alive = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6))), [], []

    def slab(nbytes):
        slabs.append(ref(made := memory(nbytes).untyped_storage()))
        return torch.empty(0, dtype=torch.uint8).set_(made)

    stream = BlockStream(model, list(model), CPU, lane=StreamLane(CPU, 4096, slab, kind))
    stream._store = HostStore(stream._cargos[:2], 3000, slab)  # the others go through staging buffers
    with torch.no_grad():
        model(torch.randn(2, 16))
    monkeypatch.setattr(streaming, "has_streams", lambda device: True)

    def empty():
        alive.append([slab() is not None for slab in slabs])

    monkeypatch.setattr(torch.accelerator, "empty_host_cache", empty, raising=False)
    stream.close()
    assert alive == [[False] * (1 + STAGES)]
