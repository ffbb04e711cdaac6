"""Nodes for the host tests only: write socket values to files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io
from safetensors.torch import save_file


class K5TestSave(io.ComfyNode):
    """Write LATENT, IMAGE or CONDITIONING to a safetensors file and give its path to the history."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5TestSave",
            inputs=[
                io.Latent.Input("latent", optional=True),
                io.Image.Input("image", optional=True),
                io.Conditioning.Input("conditioning", optional=True),
            ],
            outputs=[],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, latent: Any = None, image: Any = None, conditioning: Any = None) -> io.NodeOutput:
        tensors: dict[str, torch.Tensor] = {}
        if latent is not None:
            tensors["latent"] = latent["samples"]
        if image is not None:
            tensors["image"] = image
        for index, (features, extra) in enumerate(conditioning or ()):
            tensors[f"features{index}"] = features
            tensors |= {
                f"{key}{index}": value for key, value in extra.items() if isinstance(value, torch.Tensor)
            }
        folder = Path(folder_paths.get_temp_directory())
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"k5_test_{len(list(folder.iterdir()))}.safetensors"
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
        return io.NodeOutput(ui={"path": [str(path)]})


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [K5TestSave]


async def comfy_entrypoint() -> Extension:
    return Extension()
