"""Nodes between pixels and latents."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..kandinsky_core.errors import KandinskyError, ShapeError
from ..kandinsky_core.memory.plan import Plan
from ..kandinsky_core.shapes import MULTIPLE_PX, VAE_TEMPORAL, snap_frames, snap_side
from ..kandinsky_core.vae.plan import REFERENCE
from .comfy_io import io
from .decode import Wanted, decode_images, memory_inputs
from .host import Latent, VAEFacts, host
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
        facts = require_ours(vae)
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
    """Decode latents to images as the released models do."""

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
        """Decode in the released windows; what the host knows of other VAEs' latents it decodes itself."""
        with kept(vae, latent, KEEP, cls.hidden, REFERENCE):
            if host().vae_facts(vae) is None:
                return io.NodeOutput(host().vae_decode(vae, latent["samples"]))
            image, _ = decode_images(vae, latent["samples"], Wanted(mode=REFERENCE))
            return io.NodeOutput(image)


class K5VAEDecodeTiled(io.ComfyNode):
    """Decode latents to images in the memory there is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's definition."""
        return io.Schema(
            node_id="K5VAEDecodeTiled",
            display_name="Kandinsky 5 VAE Decode (Tiled)",
            category=CATEGORY,
            description="Decode in the memory there is, without seams; if it runs out, go on with less. "
            "The latent is kept on disk.",
            search_aliases=["k5", "kandinsky", "vae decode", "tiled", "low vram", "out of memory"],
            inputs=[io.Vae.Input("vae"), io.Latent.Input("latent"), *memory_inputs()],
            outputs=[
                io.Image.Output(display_name="image", tooltip="All frames, one clip after the other."),
                io.String.Output(display_name="report", tooltip="Mode, tiles, peak, and what was done about memory."),
            ],
            hidden=HIDDEN,
        )

    @classmethod
    def execute(
        cls, vae: Any, latent: Latent, mode: str, memory_gb: float, keep_latents: int, plan: Plan | None = None,
        compile: bool = False,
    ) -> io.NodeOutput:  # fmt: skip
        """Decode."""
        wanted = Wanted.of(mode, memory_gb, plan, compile)
        with kept(vae, latent, keep_latents, cls.hidden, wanted.mode) as line:
            require_ours(vae)
            image, report = decode_images(vae, latent["samples"], wanted)
            return io.NodeOutput(image, f"{report}\n{line}")


def require_ours(vae: Any) -> VAEFacts:
    """Return what is known of a VAE; one of another kind raises `KandinskyError`."""
    facts = host().vae_facts(vae)
    if facts is None:
        raise KandinskyError(
            "This VAE is neither HunyuanVideo's nor FLUX's. Use the Kandinsky 5 VAE Loader, or core's VAE nodes."
        )
    return facts
