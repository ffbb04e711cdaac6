"""The one import of ComfyUI's node API (`comfy_api.latest`), or a stand-in with the part of it that our nodes use.

The stand-in keeps core's names and attributes (`Schema.inputs[i].id`, `.io_type`, `.default`, `.options`, …), so the
same node classes, the headless runner and the contract tests read both. Widgets are the inputs that have a `default`.
"""

from __future__ import annotations

from importlib.util import find_spec

INSIDE_COMFYUI = find_spec("comfy_api") is not None

if INSIDE_COMFYUI:
    from comfy_api.latest import ComfyExtension, InputImpl, io
else:
    from .standalone_io import ComfyExtension, io

    InputImpl = None  # core's classes of values on the wires; only the host that is ComfyUI makes any

__all__ = ["INSIDE_COMFYUI", "ComfyExtension", "InputImpl", "io"]
