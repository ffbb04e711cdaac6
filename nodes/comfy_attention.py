"""Visual self-attention of a MODEL inside ComfyUI, ours or the one core's own loader gives.

Core keeps one slot for an attention override, and nodes overwrite each other's. So nothing is put there when the
graph is built: a wrapper around the network fills the slot for the time of one call, on a copy of the options, and
keeps the override it found for everything that is not visual self-attention. The order of nodes does not matter.

Shapes: B batch, A heads, N visual tokens, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import torch
from torch import Tensor, nn

from ..kandinsky_core.sparse.nabla import AttentionForward, AttentionRun
from .comfy_model import TOKEN_ORDER, HostedCrossDiT

KEY = "kandinsky5_attention"
OVERRIDE = "optimized_attention_override"


def patched(model: Any, run: AttentionRun) -> Any:
    """Return a clone of a MODEL patcher with `run` as its visual self-attention."""
    clone = model.clone()
    kinds = comfy.patcher_extension.WrappersMP
    for kind, wrapper in ((kinds.OUTER_SAMPLE, _around_run(run)), (kinds.DIFFUSION_MODEL, _around_network(run))):
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    clone.set_attachments(KEY, run)
    return clone


def run_of(model: Any) -> AttentionRun | None:
    """Return the run that `patched` gave this MODEL or one it was cloned from."""
    return model.get_attachment(KEY)


def _around_run(run: AttentionRun) -> Callable[..., Any]:
    def wrapper(executor: Any, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, *rest: Any, **more: Any):
        # Core's trainer hands the indices of its samples over as sigmas: there are no steps then.
        run.begin(() if comfy.model_management.in_training else sigmas.tolist())
        return executor(noise, latent, sampler, sigmas, *rest, **more)

    return wrapper


def _around_network(run: AttentionRun) -> Callable[..., Any]:
    def wrapper(executor: Any, x: Tensor, timestep: Tensor, context: Tensor, *rest: Any, **more: Any) -> Tensor:
        network = executor.class_obj
        options = dict(more.get("transformer_options") or {})
        blocks = len(network.visual_transformer_blocks)
        sigmas = options.get("sigmas")
        forward = run.forward(
            token_grid(x, network.patch_size), blocks, 1.0 if sigmas is None else float(sigmas[0]), x.device
        )
        if forward is None:
            return executor(x, timestep, context, *rest, **more)
        is_ours = isinstance(network, HostedCrossDiT)
        if is_ours:
            options[TOKEN_ORDER] = forward.tiles.order_N
        options.pop("block_index", None)  # of an earlier call: text blocks come before the first visual one
        options[OVERRIDE] = Override(forward, is_ours, context.shape[1], options.get(OVERRIDE))
        told = is_ours or not torch.is_grad_enabled()
        with nullcontext() if told else _own_index(network.visual_transformer_blocks):
            return executor(x, timestep, context, *rest, **(more | {"transformer_options": options}))

    return wrapper


@contextmanager
def _own_index(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Give each of core's blocks options of its own that say which one it is.

    Core writes the index into one dictionary for all. A trainer that computes blocks again in the backward pass would
    find the last block's index there.
    """

    def hook(index: int, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        return args, named | {"transformer_options": named["transformer_options"] | {"block_index": index}}

    handles = [
        block.register_forward_pre_hook(partial(hook, index), with_kwargs=True) for index, block in enumerate(blocks)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def token_grid(x: Tensor, patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return (frames, rows, columns) of tokens of a latent [B,C,T,H,W] or [B,C,H,W], padded to whole patches."""
    frames = x.shape[2] if x.ndim == 5 else 1
    t, h, w = (-(-side // step) for side, step in zip((frames, *x.shape[-2:]), patch, strict=True))
    return t, h, w


@dataclass(slots=True)
class Override:
    """Core's attention override for one call of the network: `(original, q, k, v, ...)`."""

    forward: AttentionForward
    is_ordered: bool  # tokens come in tile order
    text_tokens: int
    previous: Callable[..., Tensor] | None
    last_block: int | None = field(default=None)  # whose self-attention has been seen, and no attention to the text

    def __call__(self, original: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any):
        """Attend by blocks where this is visual self-attention, else by what would have been used."""

        def fallback(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.previous is not None:
                return self.previous(original, q, k, v, *rest, **more)
            return original(q, k, v, *rest, **more)

        block = (more.get("transformer_options") or {}).get("block_index")
        if not self._is_visual(q, k, block, more):
            return fallback(q, k, v)
        keeps_shape = more.get("skip_output_reshape", False)

        def dense(q_BANE: Tensor, k_BANE: Tensor, v_BANE: Tensor) -> Tensor:
            out = fallback(q_BANE, k_BANE, v_BANE)
            return out if keeps_shape else out.unflatten(-1, (q_BANE.shape[1], -1)).transpose(1, 2)

        out_BANE = self.forward.attend(q, k, v, block=block, dense=dense, is_ordered=self.is_ordered)
        return out_BANE if keeps_shape else out_BANE.transpose(1, 2).flatten(2)

    def _is_visual(self, q: Tensor, k: Tensor, block: int | None, more: dict[str, Any]) -> bool:
        """Tell self-attention of the visual tokens from the text blocks' and from attention to the text."""
        tokens = self.forward.tiles.tokens
        fits = more.get("skip_reshape", False) and q.ndim == 4 and q.shape[2] == k.shape[2] == tokens
        if block is None or not fits or more.get("mask") is not None:
            return False
        if tokens != self.text_tokens:
            return True
        # Only the order of the calls tells them apart: in every block self-attention, then attention to the text.
        is_self = block != self.last_block
        self.last_block = block if is_self else None
        return is_self
