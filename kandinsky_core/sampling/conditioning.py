"""What the transformer sees besides noise: text, and the known frames or the picture to edit.

B batch, C latent channels, T/H/W latent frames/rows/columns, L text tokens, D text width, P pooled width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ShapeError
from ..variants import CrossDiTSpec

# First-frame normalisation of the released sampler, in scaled latent units.
NORM_FRAMES = 4
NORM_REFERENCE = 5
MEAN_CLAMP = (-0.05, 0.10)
STD_CLAMP = (-0.10, 0.25)


@dataclass(frozen=True, slots=True)
class TextCondition:
    """Encoded prompt: Qwen features, pooled CLIP vector and, for padded batches, the key mask (True = token)."""

    features_BLD: Tensor
    pooled_BP: Tensor
    mask_BL: Tensor | None = None

    def expand(self, batch: int) -> TextCondition:
        """Repeat a single prompt over a batch; a batch of prompts must have the batch's size already."""
        given = self.features_BLD.shape[0]
        if given == batch:
            return self
        if given != 1:
            raise ShapeError(
                f"{given} prompts for a batch of {batch}: give one prompt for all, or one for each sample."
            )
        mask = None if self.mask_BL is None else self.mask_BL.expand(batch, -1)
        return TextCondition(
            self.features_BLD.expand(batch, -1, -1), self.pooled_BP.expand(batch, -1), mask
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> TextCondition:
        """The same condition on a device, features in `dtype`."""
        mask = None if self.mask_BL is None else self.mask_BL.to(device)
        return TextCondition(
            self.features_BLD.to(device, dtype), self.pooled_BP.to(device, dtype), mask
        )


@dataclass(frozen=True, slots=True)
class Known:
    """Latents that are given, not sampled, in model units.

    `frames_BCTHW`: clean leading frames of an image-to-video clip. `edit_BCTHW`: the encoded picture of an
    editing model. At most one of them is set.
    """

    frames_BCTHW: Tensor | None = None
    edit_BCTHW: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> Known:
        """The same latents on a device, in `dtype`."""
        frames, edit = self.frames_BCTHW, self.edit_BCTHW
        return Known(
            None if frames is None else frames.to(device, dtype),
            None if edit is None else edit.to(device, dtype),
        )


NOTHING_KNOWN = Known()


def transformer_input(spec: CrossDiTSpec, x_BCTHW: Tensor, known: Known = NOTHING_KNOWN) -> Tensor:
    """Assemble the transformer's channels-last input `[B,T,H,W,visual_embed_dim]`.

    Video models: `[latent | zeros | mask]`, known frames written into the latent with mask 1; the middle channels
    are zero in every released inference path, image-to-video included. Editing: `[noise | edit latent | 1]`,
    zeros without a picture. Text-to-image: the latent alone.
    """
    batch, channels, frames, height, width = x_BCTHW.shape
    if channels != spec.in_visual_dim:
        raise ShapeError(f"The latent has {channels} channels; this model takes {spec.in_visual_dim}.")
    _check_known(spec, x_BCTHW, known)
    x_BTHWC = x_BCTHW.movedim(1, -1)
    if spec.visual_embed_dim == channels:
        return x_BTHWC
    full = x_BCTHW.new_zeros(batch, frames, height, width, spec.visual_embed_dim)
    full[..., :channels] = x_BTHWC
    if known.frames_BCTHW is not None:
        given = known.frames_BCTHW.shape[2]
        full[:, :given, ..., :channels] = known.frames_BCTHW.movedim(1, -1)
        full[:, :given, ..., -1] = 1
    if known.edit_BCTHW is not None:
        full[..., channels:-1] = known.edit_BCTHW.movedim(1, -1)
        full[..., -1] = 1
    return full


def _check_known(spec: CrossDiTSpec, x_BCTHW: Tensor, known: Known) -> None:
    if known.frames_BCTHW is not None:
        if not spec.visual_cond:
            raise ShapeError("This model has no channels for a start image; use a Kandinsky 5 video model.")
        _same_size("start image", known.frames_BCTHW, x_BCTHW)
    if known.edit_BCTHW is not None:
        if spec.instruct_type != "channel":
            raise ShapeError("This model cannot edit pictures; use the Kandinsky 5 image-editing (I2I) model.")
        _same_size("picture to edit", known.edit_BCTHW, x_BCTHW)


def _same_size(what: str, given: Tensor, x_BCTHW: Tensor) -> None:
    fits = given.shape[3:] == x_BCTHW.shape[3:] and given.shape[2] <= x_BCTHW.shape[2]
    if not fits or given.shape[1] != x_BCTHW.shape[1]:
        raise ShapeError(
            f"The {what} has latent size {tuple(given.shape[1:])}, the clip {tuple(x_BCTHW.shape[1:])} "
            "(channels, frames, rows, columns). Encode it at the clip's width and height."
        )
    if given.shape[0] not in (1, x_BCTHW.shape[0]):
        raise ShapeError(
            f"{given.shape[0]} {what}s for a batch of {x_BCTHW.shape[0]}: give one for all, or one for each sample."
        )


def keep_known(x_BCTHW: Tensor, known: Known) -> Tensor:
    """Write the clean leading frames back over what the sampler made of them."""
    if known.frames_BCTHW is None:
        return x_BCTHW
    _same_size("start image", known.frames_BCTHW, x_BCTHW)
    given = known.frames_BCTHW.shape[2]
    frames = known.frames_BCTHW.to(x_BCTHW).expand(x_BCTHW.shape[0], -1, -1, -1, -1)
    return torch.cat((frames, x_BCTHW[:, :, given:]), dim=2)


def normalise_first_frames(
    x_BCTHW: Tensor, frames: int = NORM_FRAMES, reference: int = NORM_REFERENCE
) -> Tensor:
    """Pull mean and spread of the first latent frames towards the frames after them (image-to-video).

    Scaled latents in and out. Statistics per sample and frame over (C, H, W), reference statistics over the next
    `reference` frames jointly, both with Bessel's correction, moved at most by MEAN_CLAMP and STD_CLAMP. A clip of
    at most `frames` latent frames has no reference and is returned unchanged (the released code gives NaN there);
    a frame of one single value has no spread to change and gets the mean only.
    """
    if x_BCTHW.shape[2] <= frames:
        return x_BCTHW
    head, tail = x_BCTHW[:, :, :frames], x_BCTHW[:, :, frames : frames + reference]
    mean = head.mean(dim=(1, 3, 4), keepdim=True)
    std = head.std(dim=(1, 3, 4), keepdim=True)
    target_mean = tail.mean(dim=(1, 2, 3, 4), keepdim=True)
    target_std = tail.std(dim=(1, 2, 3, 4), keepdim=True)
    target_mean = target_mean.clamp(mean + MEAN_CLAMP[0], mean + MEAN_CLAMP[1])
    target_std = target_std.clamp(std + STD_CLAMP[0], std + STD_CLAMP[1])
    head = (head - mean) / std.where(std > 0, 1) * target_std + target_mean
    return torch.cat((head, x_BCTHW[:, :, frames:]), dim=2)
