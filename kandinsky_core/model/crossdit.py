"""CrossDiT: the Kandinsky 5 diffusion transformer (arXiv 2511.14993), one class for every published size.

Shapes: B batch, T/H/W latent frames/rows/columns, C latent channels, N visual tokens, L text tokens, D width,
E time width, P rotary pairs of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ShapeError
from ..variants import CrossDiTSpec
from .attention import Attend, Attention, dense, masked
from .layers import (
    FeedForward,
    Modulate,
    Modulation,
    Ops,
    OutLayer,
    TextEmbeddings,
    TimeEmbeddings,
    VisualEmbeddings,
    computed,
)
from .regime import WHOLE, Regime
from .rope import rope_1d, rope_3d

OnBlock = Callable[[int, int], None]
"""Called with `(index, total)` before each visual block; raise from it to cancel."""


class TextBlock(nn.Module):
    """Self-attention and feed-forward over the text tokens."""

    regime = WHOLE

    def __init__(self, spec: CrossDiTSpec, ops: Ops, **factory: Any) -> None:
        super().__init__()
        self.text_modulation = Modulation(spec.time_dim, spec.model_dim, 6, ops, **factory)
        self.self_attention = Attention(spec.model_dim, spec.head_dim, ops, **factory)
        self.feed_forward = FeedForward(spec.model_dim, spec.ff_dim, ops, **factory)

    def forward(
        self,
        x_BLD: Tensor,
        time_BE: Tensor,
        rope_LP2: Tensor,
        attend: Attend = dense,
        modulate: Modulate = computed,
    ) -> Tensor:
        """Return refined text tokens `[B,L,D]`."""
        vectors_BV = modulate(self.text_modulation, time_BE)
        own, ff = vectors_BV.chunk(2, dim=-1)
        x_BLD = self.regime.attend_own(self.self_attention, x_BLD, own, attend, rope_LP2)
        return self.regime.feed(self.feed_forward, x_BLD, ff)


class VisualBlock(nn.Module):
    """Self-attention, cross-attention to the refined text, and feed-forward over the visual tokens."""

    regime = WHOLE

    def __init__(self, spec: CrossDiTSpec, ops: Ops, **factory: Any) -> None:
        super().__init__()
        self.visual_modulation = Modulation(spec.time_dim, spec.model_dim, 9, ops, **factory)
        self.self_attention = Attention(spec.model_dim, spec.head_dim, ops, **factory)
        self.cross_attention = Attention(spec.model_dim, spec.head_dim, ops, **factory)
        self.feed_forward = FeedForward(spec.model_dim, spec.ff_dim, ops, **factory)

    def forward(
        self,
        x_BND: Tensor,
        text_BLD: Tensor,
        time_BE: Tensor,
        rope_NP2: Tensor,
        attend: Attend = dense,
        attend_text: Attend = dense,
        modulate: Modulate = computed,
    ) -> Tensor:
        """Return the next visual tokens `[B,N,D]`; the input tensor is left as it is."""
        own, cross, ff = modulate(self.visual_modulation, time_BE).chunk(3, dim=-1)
        x_BND = self.regime.attend_own(self.self_attention, x_BND, own, attend, rope_NP2)
        x_BND = self.regime.attend_text(self.cross_attention, x_BND, cross, attend_text, text_BLD)
        return self.regime.feed(self.feed_forward, x_BND, ff)


class CrossDiT(nn.Module):
    """Predict the flow velocity of a latent clip or image from text features, a pooled text vector and a time.

    `ops` supplies `Linear`, `LayerNorm` and `RMSNorm` with the signatures of `torch.nn`; a host may hand in classes
    that cast, offload or dequantise. Parameter names are the published state-dict keys.
    """

    regime = WHOLE

    def __init__(
        self,
        spec: CrossDiTSpec,
        *,
        ops: Ops = nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        made: dict[str, Any] = {"ops": ops, "device": device, "dtype": dtype}
        self.time_embeddings = TimeEmbeddings(spec.model_dim, spec.time_dim, **made)
        self.text_embeddings = TextEmbeddings(spec.in_text_dim, spec.model_dim, **made)
        self.pooled_text_embeddings = TextEmbeddings(spec.in_text_dim2, spec.time_dim, **made)
        self.visual_embeddings = VisualEmbeddings(
            spec.visual_embed_dim, spec.model_dim, spec.patch_size, **made
        )
        self.text_transformer_blocks = nn.ModuleList(
            TextBlock(spec, **made) for _ in range(spec.num_text_blocks)
        )
        self.visual_transformer_blocks = nn.ModuleList(
            VisualBlock(spec, **made) for _ in range(spec.num_visual_blocks)
        )
        self.out_layer = OutLayer(spec.model_dim, spec.time_dim, spec.out_visual_dim, spec.patch_size, **made)

    def forward(
        self,
        x_BTHWC: Tensor,
        text_BLD: Tensor,
        pooled_BP: Tensor,
        time_B: Tensor,
        *,
        text_mask_BL: Tensor | None = None,
        rope_scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
        attend: Attend | Sequence[Attend] = dense,
        order_N: Tensor | None = None,
        on_block: OnBlock | None = None,
        modulate: Modulate = computed,
    ) -> Tensor:
        """Return the velocity `[B,T,H,W,16]` in the dtype of `x_BTHWC`.

        `time_B` is the flow time already multiplied by 1000, float32. `text_mask_BL` is True at real tokens.
        `rope_scale` divides the positions along time, height, width. `attend` is visual self-attention: one value,
        or one per visual block. `order_N` holds the raster index of the visual token at each place: the blocks see
        the tokens in that order (block-sparse attention wants tiles), the result comes back in raster order. `modulate`
        gives the modulations' vectors: by calling them, or from a table made beforehand.
        """
        token_thw = self.token_grid(x_BTHWC)
        batches = [len(given) for given in (x_BTHWC, text_BLD, pooled_BP, time_B)]
        if len(set(batches)) > 1:
            raise ShapeError(
                "Latent, text, pooled text and time have batch sizes {}, {}, {}, {}; all must be the same. "
                "Expand the text to the latent's.".format(*batches)
            )
        attend_text = masked(text_mask_BL)
        time_BE = self.embed_time(time_B, pooled_BP)
        text_BLD = self.refine_text(text_BLD, time_BE, attend_text, modulate).to(dtype=self.regime.dtype)
        rope_NP2 = rope_3d(token_thw, self.spec.axes_dims, rope_scale, x_BTHWC.device)
        x_BND = self.visual_embeddings(x_BTHWC).flatten(1, 3).to(dtype=self.regime.stream_dtype)
        if order_N is not None:
            x_BND, rope_NP2 = x_BND.index_select(1, order_N), rope_NP2.index_select(0, order_N)
        tokens = [x_BND]
        del x_BND  # a name here would keep the first block's input alive while all blocks run
        x_BND = self.run_blocks(
            tokens.pop(), text_BLD, time_BE, rope_NP2, attend, attend_text, on_block, modulate
        )
        if order_N is not None:
            x_BND = x_BND.index_select(1, order_N.argsort())
        return self.out_layer(x_BND, time_BE, token_thw, modulate, self.regime.dtype)

    def token_grid(self, x_BTHWC: Tensor) -> tuple[int, int, int]:
        """Return the (frames, rows, columns) of tokens of a latent; raise `ShapeError` if it does not fit."""
        _, *sides, channels = x_BTHWC.shape
        patch = self.spec.patch_size
        if any(side < 1 or side % step for side, step in zip(sides, patch, strict=True)):
            raise ShapeError(
                f"A latent of {'x'.join(map(str, sides))} (frames x rows x columns) cannot be cut into patches of "
                f"{'x'.join(map(str, patch))}. Use sides that are positive multiples of the patch."
            )
        if channels != self.spec.visual_embed_dim:
            raise ShapeError(
                f"The latent has {channels} channels, this model takes {self.spec.visual_embed_dim}. "
                "Append the condition and mask channels for a video or editing model, none for text-to-image."
            )
        t, h, w = (side // step for side, step in zip(sides, patch, strict=True))
        return t, h, w

    def set_regime(self, regime: Regime) -> None:
        """Let all blocks treat their tokens so; pieces are for the visual blocks, the text is short."""
        self.regime = regime
        for block in self.text_transformer_blocks:
            block.regime = Regime(dtype=regime.dtype)
        for block in self.visual_transformer_blocks:
            block.regime = regime

    def modulations(self) -> Iterator[Modulation]:
        """Yield all modulations in the order in which an evaluation calls them."""
        yield from (block.text_modulation for block in self.text_transformer_blocks)
        yield from (block.visual_modulation for block in self.visual_transformer_blocks)
        yield self.out_layer.modulation

    def embed_time(self, time_B: Tensor, pooled_BP: Tensor) -> Tensor:
        """Return the float32 vector `[B,E]` of time and pooled text that modulates every block."""
        return self.time_embeddings(time_B) + self.pooled_text_embeddings(pooled_BP)

    def refine_text(
        self, text_BLD: Tensor, time_BE: Tensor, attend: Attend = dense, modulate: Modulate = computed
    ) -> Tensor:
        """Embed text features and run the text blocks; every visual block reads the result."""
        text_BLD = self.text_embeddings(text_BLD).to(dtype=self.regime.stream_dtype)
        rope_LP2 = rope_1d(text_BLD.shape[1], self.spec.head_dim, text_BLD.device)
        for block in self.text_transformer_blocks:
            text_BLD = block(text_BLD, time_BE, rope_LP2, attend, modulate)
        return text_BLD

    def run_blocks(
        self,
        x_BND: Tensor,
        text_BLD: Tensor,
        time_BE: Tensor,
        rope_NP2: Tensor,
        attend: Attend | Sequence[Attend] = dense,
        attend_text: Attend = dense,
        on_block: OnBlock | None = None,
        modulate: Modulate = computed,
    ) -> Tensor:
        """Run the visual blocks in order. Hosts override this to replace, stream or skip blocks.

        Token order is free as long as `rope_NP2` has the same order.
        """
        total = len(self.visual_transformer_blocks)
        per_block = [attend] * total if callable(attend) else attend
        for index, (block, block_attend) in enumerate(
            zip(self.visual_transformer_blocks, per_block, strict=True)
        ):
            if on_block is not None:
                on_block(index, total)
            x_BND = block(x_BND, text_BLD, time_BE, rope_NP2, block_attend, attend_text, modulate)
        return x_BND
