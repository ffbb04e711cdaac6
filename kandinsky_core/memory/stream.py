"""Weights of blocks that visit the device one after the other, while everything else of the model stays there."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from ..errors import KandinskyError
from .cargo import Cargo, DtypeOf, as_stored
from .host_store import HostStore
from .lane import Lane, Mark, StreamLane, has_streams, page_locked

logger = logging.getLogger("kandinsky5")


@dataclass(slots=True)
class Buffer:
    """One place of the ring on the device."""

    memory: Tensor
    free: Mark = None  # passed when the last block that computed with it is done
    filled: Mark = None  # passed when the copy into it is done


class BlockStream:
    """Runs a model whose `blocks` share a ring of `prefetch + 1` device buffers; nothing is ever copied back.

    The blocks must be called in their order, over and over: while one computes, the next `prefetch` are copied, after
    the last one the first. Any other order is right but slow. Before a block runs its parameters are given the
    buffer's memory, afterwards the tensors they had: between calls, and after an exception, the model is as loaded.
    All other parameters and buffers move to the device when the stream is made, except those of the modules in `keep`,
    which are left where they are. `close` puts everything back.

    Works on the processor as well, from mapped weights into buffers in main memory. Values are those of a model that
    was moved and converted as a whole. For inference: a backward pass would read buffers that hold other blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        device: torch.device,
        *,
        prefetch: int = 1,
        pinned_bytes: int = 0,
        dtype_of: DtypeOf = as_stored,
        keep: Collection[nn.Module] = (),
        lane: Lane | None = None,
    ) -> None:
        """Move what stays and prepare the ring; block weights are copied when the model first runs.

        `pinned_bytes` limits the page-locked copies on the host (devices with streams only); the blocks beyond it
        are read from where they are. `lane` replaces the way of copying that the device asks for.
        """
        _check(model, blocks, prefetch)
        inside = {id(module) for block in blocks for module in block.modules()}
        kept = {id(module) for part in keep for module in part.modules()}
        self._outside = Cargo([m for m in model.modules() if id(m) not in inside | kept], dtype_of)
        in_line = device.type == "cpu"
        self._cargos = [
            Cargo([m for m in block.modules() if id(m) not in kept], dtype_of, in_line=in_line) for block in blocks
        ]
        largest = max((cargo.nbytes for cargo in self._cargos), default=0)
        self.device = device
        self.moved_bytes = 0  # copied into the ring so far
        count = min(prefetch + 1, len(blocks))
        with torch.inference_mode(False), torch.no_grad():
            self._outside.settle(device)
            self._ring = [Buffer(torch.empty(largest, dtype=torch.uint8, device=device)) for _ in range(count)]
            streams = has_streams(device)
            self._store = HostStore(self._cargos, pinned_bytes if streams else 0, page_locked)
        self._lane = lane or (StreamLane(device, largest, page_locked) if streams else Lane())
        self._held: dict[int, Buffer] = {}  # block -> the buffer it is in or on its way to
        self._bound: int | None = None
        self._hooks = [handle for index, block in enumerate(blocks) for handle in self._hook(index, block)]
        logger.info("%s", self)

    @property
    def pass_bytes(self) -> int:
        """Bytes that one evaluation of the whole model copies; 0 when the ring holds all blocks."""
        return 0 if len(self._cargos) == len(self._ring) else sum(cargo.nbytes for cargo in self._cargos)

    @property
    def ring_bytes(self) -> int:
        """Device memory of the ring."""
        return sum(buffer.memory.nbytes for buffer in self._ring)

    @property
    def pinned_bytes(self) -> int:
        """Page-locked host memory of the blocks' copies."""
        return self._store.nbytes

    def __str__(self) -> str:
        return (
            f"{len(self._cargos)} blocks travel through {len(self._ring)} buffers of together "
            f"{self.ring_bytes / 1e6:.0f} MB on {self.device}: {self.pass_bytes / 1e9:.2f} GB an evaluation, "
            f"{self.pinned_bytes / 1e9:.2f} GB page-locked."
        )

    def __enter__(self) -> BlockStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the stream off: the model is as it was before, and the ring's memory is given back."""
        for handle in self._hooks:
            handle.remove()
        self._lane.finish()
        for cargo in (*self._cargos, self._outside):
            cargo.restore()
        self._hooks, self._ring, self._held, self._cargos, self._bound = [], [], {}, [], None
        self._outside, self._store = Cargo(()), HostStore((), 0, page_locked)
        self._lane = Lane()
        if has_streams(self.device) and hasattr(torch.accelerator, "empty_host_cache"):
            torch.accelerator.empty_host_cache()  # torch keeps page-locked memory for the next who wants some

    def _hook(self, index: int, block: nn.Module) -> Iterator[torch.utils.hooks.RemovableHandle]:
        def before(*_: object) -> None:
            self._enter(index)

        def after(*_: object) -> None:  # what a hook returns would replace the block's result
            self._leave(index)

        yield block.register_forward_pre_hook(before)
        yield block.register_forward_hook(after, always_call=True)

    @torch.no_grad()
    def _enter(self, index: int) -> None:
        if self._bound is not None:  # KeyboardInterrupt passes by the hooks that exceptions call
            self._leave(self._bound)
        if index not in self._held:
            self._restart(index)
        buffer = self._held[index]
        self._lane.wait(buffer.filled)
        self._cargos[index].bind(buffer.memory)
        self._bound = index

    @torch.no_grad()
    def _leave(self, index: int) -> None:
        if self._bound != index:
            return
        self._cargos[index].restore()
        self._bound = None
        if len(self._cargos) > len(self._ring):
            buffer = self._held.pop(index)
            buffer.free = self._lane.mark()
            self._fill(buffer, index + len(self._ring))

    def _restart(self, index: int) -> None:
        """Begin at a block that was not expected: the first run, or the one after a cancelled run."""
        self._held.clear()
        here = self._lane.mark()
        for ahead, buffer in enumerate(self._ring):
            buffer.free = here
            self._fill(buffer, index + ahead)

    def _fill(self, buffer: Buffer, index: int) -> None:
        index %= len(self._cargos)
        cargo = self._cargos[index]
        buffer.filled = self._lane.carry(cargo, self._store.image(cargo), buffer.memory, buffer.free)
        self._held[index] = buffer
        self.moved_bytes += cargo.nbytes


def spread(blocks: Sequence[nn.Module], resident: int | None) -> list[nn.Module]:
    """Return the blocks to stream when `resident` of them stay (None: all stay), the resident ones evenly between.

    Between two streamed blocks a resident one computes without a copy of its own, which gives the copy more time.
    """
    count = len(blocks)
    streamed = 0 if resident is None else max(0, count - resident)
    return [block for place, block in enumerate(blocks) if (place + 1) * streamed // count > place * streamed // count]


def _check(model: nn.Module, blocks: Sequence[nn.Module], prefetch: int) -> None:
    if prefetch < 0:
        raise KandinskyError(f"prefetch is {prefetch}; it must be 0 (nothing is copied ahead) or more.")
    known = {id(module) for module in model.modules()}
    if any(id(block) not in known for block in blocks):
        raise KandinskyError("A block to stream is not a part of the model. Give the model's own blocks.")
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise KandinskyError("The model has no weights (meta device). Load it before it is streamed.")
