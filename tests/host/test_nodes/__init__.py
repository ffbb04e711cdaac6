"""Nodes for the host tests only: write socket values to files, and watch a model from where other packs patch it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.patcher_extension
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


SEEN: list[dict[str, Any]] = []


class K5TestWatch(io.ComfyNode):
    """Patch a MODEL like other packs do, without changing what it computes, and note every call."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5TestWatch",
            inputs=[io.Model.Input("model")],
            outputs=[io.Model.Output()],
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        SEEN.clear()
        model = model.clone()

        def wrapper(executor: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            known = kwargs.get("time_dim_replace")
            patch = executor.class_obj.patch_size
            SEEN.append(
                {
                    "call": list(x.shape),
                    "known": None if known is None else known.shape[2],
                    "patch": list(patch),
                }
            )
            return executor(x, *args, **kwargs)

        def block(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
            SEEN.append({"block": args["transformer_options"]["block_index"], "tokens": args["x"].shape[1]})
            return extra["original_block"](args)

        def attention(original: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
            options = kwargs["transformer_options"]
            SEEN.append(
                {"attention": options["block_index"], "of": options["total_blocks"], "heads": q.shape[1]}
            )
            return original(q, k, v, *args, **kwargs)

        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "k5_test", wrapper)
        model.set_model_patch_replace(block, "dit", "double_block", 1)
        model.model_options["transformer_options"]["optimized_attention_override"] = attention
        return io.NodeOutput(model)


class K5TestSeen(io.ComfyNode):
    """Give what `K5TestWatch` noted to the history, once the latent is there."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5TestSeen",
            inputs=[io.Latent.Input("latent")],
            outputs=[],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, latent: Any) -> io.NodeOutput:
        return io.NodeOutput(ui={"seen": [json.dumps(SEEN)]})


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [K5TestSave, K5TestWatch, K5TestSeen]


async def comfy_entrypoint() -> Extension:
    return Extension()
