"""ComfyUI-Kandinsky5: Kandinsky 5.0 in ComfyUI. Imports nothing heavy; outside ComfyUI it is a plain package."""

from __future__ import annotations

import importlib.util

WEB_DIRECTORY = "./js"

__all__ = ["WEB_DIRECTORY"]

if __package__ and importlib.util.find_spec("comfy_api") is not None:
    from .nodes import comfy_entrypoint

    __all__ += ["comfy_entrypoint"]
