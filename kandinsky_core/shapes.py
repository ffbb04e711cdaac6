"""Pixel, latent and token arithmetic: integers only, shared by every other module."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ShapeError

VAE_SPATIAL = 8  # pixels per latent row/column (both autoencoders)
VAE_TEMPORAL = 4  # frames per latent frame after the first (HunyuanVideo autoencoder)
PATCH = (1, 2, 2)  # latent cells per token (time, height, width)
MULTIPLE_PX = VAE_SPATIAL * PATCH[1]  # 16: a side must be a multiple of this
NABLA_MULTIPLE_PX = MULTIPLE_PX * 8  # 128: a side that the published NABLA recipe can tile


def latent_frames(frames: int) -> int:
    """Latent frames of a clip of `frames` = 4k+1 frames: k+1."""
    return (frames - 1) // VAE_TEMPORAL + 1


def pixel_frames(latents: int) -> int:
    """Frames that `latents` latent frames decode to: 4(n-1)+1."""
    return VAE_TEMPORAL * (latents - 1) + 1


def snap_frames(frames: int) -> int:
    """Nearest legal frame count 4k+1, at least 1; ties go up."""
    return pixel_frames(max(1, (frames - 1 + VAE_TEMPORAL // 2) // VAE_TEMPORAL + 1))


def snap_side(side_px: int, multiple_px: int = MULTIPLE_PX) -> int:
    """Nearest positive multiple of `multiple_px`; ties go up."""
    return max(1, (side_px + multiple_px // 2) // multiple_px) * multiple_px


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoShape:
    """Size of one clip in pixels and frames; an image is a clip of one frame. Illegal sizes raise `ShapeError`."""

    width_px: int
    height_px: int
    frames: int = 1

    def __post_init__(self) -> None:
        for name, side in (("width", self.width_px), ("height", self.height_px)):
            if side < MULTIPLE_PX or side % MULTIPLE_PX:
                raise ShapeError(
                    f"{name} {side} is not a positive multiple of {MULTIPLE_PX}. Use {snap_side(side)}."
                )
        if self.frames < 1 or (self.frames - 1) % VAE_TEMPORAL:
            raise ShapeError(
                f"{self.frames} frames: the count must be 4k+1 (1, 5, 9, …). Use {snap_frames(self.frames)}."
            )

    @classmethod
    def nearest(
        cls, width_px: int, height_px: int, frames: int = 1, multiple_px: int = MULTIPLE_PX
    ) -> VideoShape:
        """The legal shape closest to what was asked for."""
        return cls(
            width_px=snap_side(width_px, multiple_px),
            height_px=snap_side(height_px, multiple_px),
            frames=snap_frames(frames),
        )

    @property
    def latent_thw(self) -> tuple[int, int, int]:
        """(latent frames, latent rows, latent columns)."""
        return latent_frames(self.frames), self.height_px // VAE_SPATIAL, self.width_px // VAE_SPATIAL

    @property
    def token_thw(self) -> tuple[int, int, int]:
        """(frames, rows, columns) of transformer tokens."""
        t, h, w = self.latent_thw
        return t // PATCH[0], h // PATCH[1], w // PATCH[2]

    @property
    def tokens(self) -> int:
        """Number of visual tokens N."""
        t, h, w = self.token_thw
        return t * h * w
