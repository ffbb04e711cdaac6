"""Nodes between pixels and latents."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..kandinsky_core.errors import KandinskyError, ShapeError
from ..kandinsky_core.shapes import MULTIPLE_PX, VAE_TEMPORAL, snap_frames, snap_side
from .comfy_io import io
from .host import Latent, host
from .latents import HIDDEN, KEEP, kept

CATEGORY = "Kandinsky 5/latent"


class K5VAEEncode(io.ComfyNode):
    """Encode a clip or pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's definition."""
        return io.Schema(
            node_id="K5VAEEncode",
            display_name="Kandinsky 5 VAE Encode",
            category=CATEGORY,
            description="Encode images to latents: one clip with a video VAE, one picture each with an image VAE.",
            search_aliases=["k5", "kandinsky", "vae encode"],
            inputs=[
                io.Vae.Input("vae"),
                io.Image.Input("image", tooltip="4n+1 frames for a video VAE; sides are multiples of 16."),
            ],
            outputs=[io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def execute(cls, vae: Any, image: Tensor) -> io.NodeOutput:
        """Encode, refusing sizes that would be cut silently."""
        frames, rows, columns = image.shape[:3]
        facts = host().vae_facts(vae)
        if facts is None:
            raise KandinskyError(
                "This VAE is neither HunyuanVideo's nor FLUX's. Use the Kandinsky 5 VAE Loader, or core's VAE Encode."
            )
        if facts.kind == "hunyuan" and (frames - 1) % VAE_TEMPORAL:
            raise ShapeError(
                f"{frames} frames: a clip needs 4n+1 (1, 5, 9, …). Use {snap_frames(frames)} or cut the rest."
            )
        for name, side in (("height", rows), ("width", columns)):
            if side % MULTIPLE_PX:
                raise ShapeError(
                    f"{name} {side} is not a multiple of {MULTIPLE_PX}. Resize to {snap_side(side)}."
                )
        return io.NodeOutput({"samples": host().vae_encode(vae, image[..., :3])})


class K5VAEDecode(io.ComfyNode):
    """Decode latents to images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's definition."""
        return io.Schema(
            node_id="K5VAEDecode",
            display_name="Kandinsky 5 VAE Decode",
            category=CATEGORY,
            description="Decode latents to frames; the latent itself stays as it is.",
            search_aliases=["k5", "kandinsky", "vae decode"],
            inputs=[io.Vae.Input("vae"), io.Latent.Input("latent")],
            outputs=[io.Image.Output(display_name="image", tooltip="All frames, one clip after the other.")],
            hidden=HIDDEN,
        )

    @classmethod
    def execute(cls, vae: Any, latent: Latent) -> io.NodeOutput:
        """Decode."""
        with kept(vae, latent, KEEP, cls.hidden):
            return io.NodeOutput(host().vae_decode(vae, latent["samples"]))
