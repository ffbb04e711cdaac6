"""Count the bytes of live tensors while code runs, on a processor or on the meta device, where nothing is computed.

Storages are counted, so views and in-place operations cost nothing. What a kernel allocates inside itself is not seen.

Shapes: B batch, A heads, N tokens, E head width.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tracker(TorchDispatchMode):
    """`with Tracker() as tracker: run()`, then `tracker.peak_bytes`: the most bytes alive at once beyond those before.

    `device` limits the count to tensors of one device type ("meta" in a run whose weights are on the processor).
    What was alive before and is freed during the run makes room, as in an allocator.
    """

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.peak_at = ""  # the operation during which the peak was reached
        self._device = device
        self._sizes: dict[int, int] = {}  # bytes of each storage, by its identity
        self._refs: dict[int, weakref.ref[Any]] = {}
        self._attention = _MetaAttention()

    def __enter__(self) -> Tracker:
        self._attention.__enter__()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._attention.__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(self._storages((args, kwargs)))
        for storage in given:
            if id(storage) not in self._sizes:
                self._watch(storage)  # it was there before, or it came from outside PyTorch
        out = func(*args, **kwargs)
        for storage in given:
            self._add(storage.nbytes() - self._sizes[id(storage)], func)  # resized
            self._sizes[id(storage)] = storage.nbytes()
        for storage in self._storages(out):
            if id(storage) not in self._sizes:
                self._watch(storage)
                self._add(storage.nbytes(), func)
        return out

    def _storages(self, tree: Any) -> Iterator[torch.UntypedStorage]:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor) and self._device in (None, leaf.device.type):
                yield leaf.untyped_storage()

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)  # PyTorch keeps one object per storage for as long as the storage lives
        self._sizes[key] = storage.nbytes()
        self._refs[key] = weakref.ref(storage, partial(self._freed, key))

    def _freed(self, key: int, _: object) -> None:
        self.live_bytes -= self._sizes.pop(key)
        del self._refs[key]

    def _add(self, count_bytes: int, func: Any) -> None:
        self.live_bytes += count_bytes
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_at = self.live_bytes, str(func)


class _MetaAttention(TorchFunctionMode):
    """On the meta device, attention as the fused kernels do it: an output and its row sums, no matrix of scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_attention = func is torch.nn.functional.scaled_dot_product_attention
        if not (is_attention and args[0].is_meta) or torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        q_BANE, _, v_BANE = args[:3]
        batch, heads, tokens, _ = q_BANE.shape
        sums_BAN = q_BANE.new_empty(batch, heads, tokens, dtype=torch.float32)
        out_BNAE = v_BANE.new_empty(batch, tokens, heads, v_BANE.shape[-1])  # the layout that the kernels return
        del sums_BAN
        return out_BNAE.transpose(1, 2)
