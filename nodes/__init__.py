"""The ComfyUI nodes of this pack: schemas and short bodies; the work is done by the core and the host."""

from __future__ import annotations

from .comfy_io import ComfyExtension, io


def node_list() -> list[type[io.ComfyNode]]:
    """Return every node class, in the order of a workflow."""
    from .attention import K5AttentionError, K5Nabla, K5NablaReport
    from .conditioning import K5EncodeText, K5ImageToVideo
    from .editing import K5ImageEdit
    from .latents import K5LoadLatent
    from .loaders import K5LoadModel, K5LoadTextEncoder, K5LoadVAE
    from .memory import K5MemoryEstimate, K5MemoryPlan
    from .sampling import K5Sample
    from .size import K5EmptyLatent, K5Size
    from .vae import K5VAEDecode, K5VAEDecodeTiled, K5VAEEncode
    from .video import K5DecodeVideo

    return [
        K5LoadModel,
        K5LoadTextEncoder,
        K5LoadVAE,
        K5EncodeText,
        K5Size,
        K5EmptyLatent,
        K5ImageToVideo,
        K5ImageEdit,
        K5Sample,
        K5VAEEncode,
        K5VAEDecode,
        K5VAEDecodeTiled,
        K5DecodeVideo,
        K5LoadLatent,
        K5Nabla,
        K5NablaReport,
        K5AttentionError,
        K5MemoryEstimate,
        K5MemoryPlan,
    ]


class Kandinsky5Extension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node classes."""
        return node_list()


async def comfy_entrypoint() -> Kandinsky5Extension:
    """ComfyUI's entry into the pack."""
    return Kandinsky5Extension()
