"""Nodes for the host tests only: write socket values to files, and watch a model from where other packs patch it."""

from __future__ import annotations

import gc
import importlib
import json
from pathlib import Path
from typing import Any

import comfy.ldm.wan.vae
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sd
import comfy.taesd.taesd
import folder_paths
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL, AutoencodingEngine
from comfy_api.latest import ComfyExtension, io
from safetensors.torch import save_file

import nodes


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


PLAIN_CONV3D = torch.nn.functional.conv3d
SEEN: list[dict[str, Any]] = []


class K5TestWatch(io.ComfyNode):
    """Patch a MODEL like other packs do, without changing what it computes, and note every call."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5TestWatch",
            inputs=[
                io.Model.Input("model"),
                # Core's own Kandinsky 5 calls a replaced block with arguments that it does not have.
                io.Boolean.Input("blocks", default=True, optional=True),
            ],
            outputs=[io.Model.Output()],
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, model: Any, blocks: bool = True) -> io.NodeOutput:
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
                {"attention": options.get("block_index"), "of": options.get("total_blocks"), "heads": q.shape[1]}
            )
            return original(q, k, v, *args, **kwargs)

        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "k5_test", wrapper)
        if blocks:
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


def pack_host() -> Any:
    """Return the host that the pack's own nodes use in this server."""
    package = nodes.NODE_CLASS_MAPPINGS["K5LoadVAE"].__module__.rpartition(".")[0]
    return importlib.import_module(f"{package}.host").host()


class K5TestModel(io.ComfyNode):
    """Give what the pack's host knows of a MODEL to the history."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5TestModel", inputs=[io.Model.Input("model")], outputs=[], is_output_node=True
        )

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        row, note = pack_host().variant_of(model), pack_host().variant_note(model)
        return io.NodeOutput(ui={"variant": [row.name if row else None], "note": [note]})


class K5TestVAEs(io.ComfyNode):
    """Give the kinds that the pack's host takes core's VAEs for to the history; networks are core's own, tiny."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="K5TestVAEs", inputs=[], outputs=[], is_output_node=True)

    @classmethod
    def execute(cls) -> io.NodeOutput:
        plain = dict(
            double_z=True, z_channels=16, resolution=32, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 1, 1],
            num_res_blocks=1, attn_resolutions=[], dropout=0.0,
        )  # fmt: skip
        coder = "comfy.ldm.modules.diffusionmodules.model"
        engine = AutoencodingEngine(
            regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
            encoder_config={"target": f"{coder}.Encoder", "params": plain},
            decoder_config={"target": f"{coder}.Decoder", "params": plain},
        )
        clips = AutoencoderKL(ddconfig=plain | {"conv3d": True, "time_compress": 4}, embed_dim=16)
        wan = comfy.ldm.wan.vae.WanVAE(
            dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
        vaes = {
            "hunyuan": core_vae(clips, 3),
            "wan": core_vae(wan, 3),
            "flux": core_vae(engine, 2),
            "other image": core_vae(AutoencoderKL(ddconfig=plain, embed_dim=16), 2),
            "tiny image": core_vae(comfy.taesd.taesd.TAESD(latent_channels=16), 2),
        }
        facts = {name: pack_host().vae_facts(vae) for name, vae in vaes.items()}
        return io.NodeOutput(ui={"kinds": [{name: found and found.kind for name, found in facts.items()}]})


def core_vae(network: torch.nn.Module, dims: int) -> Any:
    """Core's VAE around `network`, as its constructor leaves it for 16 channels (it builds full sizes only)."""
    vae = comfy.sd.VAE.__new__(comfy.sd.VAE)
    vae.first_stage_model, vae.latent_channels, vae.latent_dim = network, 16, dims
    vae.upscale_ratio = (lambda frames: max(0, frames * 4 - 3), 8, 8) if dims == 3 else 8
    return vae


class K5TestPackedLoads(io.ComfyNode):
    """Load and unload packed layers as core does; patches of two of them, and what is loaded, go to the history."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="K5TestPackedLoads", inputs=[], outputs=[], is_output_node=True)

    @classmethod
    def execute(cls) -> io.NodeOutput:
        package = nodes.NODE_CLASS_MAPPINGS["K5LoadVAE"].__module__.rpartition(".")[0]
        packed = importlib.import_module(f"{package}.comfy_packed")
        rows = (128, 64, 512, 512, 512, 512)
        layers = [packed.HostedPackedLinear(packed.Packing("Q8_0", (count, 64)), bias=False) for count in rows]
        for layer in layers:
            layer.weight = torch.nn.Parameter(torch.zeros(layer.weight.shape, dtype=torch.uint8), requires_grad=False)
        device, size = torch.device("cpu"), sum(layer.weight.nbytes for layer in layers)
        part = 85_000  # core keeps room for unpacking patched weights, so that only the second layer fits
        network = torch.nn.Sequential(*layers)
        patcher = packed.PackedPatcher(network, load_device=device, offload_device=device)
        patcher.add_patches({f"{index}.weight": (torch.ones(rows[index], 64),) for index in range(2)})
        plain = packed.PackedPatcher(network, load_device=device, offload_device=device)
        counts, outputs, loaded = {}, {}, {}

        def look(name: str) -> None:
            counts[name] = [len(layer.weight_function) for layer in layers[:2]]
            outputs[name] = [layer(torch.ones(1, 64))[0, 0].item() for layer in layers[:2]]
            loaded[name] = [getattr(layer, "comfy_patched_weights", False) for layer in layers[:2]]

        def check(name: str, step: Any) -> None:
            step()
            look(name)

        check("part", lambda: patcher.load(device, lowvram_model_memory=part))
        check("same", lambda: patcher.partially_load(device, part - network.model_loaded_weight_memory))
        check("all", lambda: patcher.partially_load(device, 2 * size))
        check("none", lambda: patcher.partially_unload(device, 2 * size))
        check("again", lambda: patcher.partially_load(device, 2 * size))
        patcher.detach()
        check("plain", lambda: plain.load(device, full_load=True))
        plain.detach()
        return io.NodeOutput(ui={"seen": [json.dumps({"counts": counts, "outputs": outputs, "loaded": loaded})]})


class K5TestCoreVAE(io.ComfyNode):
    """Core's own HunyuanVideo VAE, tiny and random, under core's memory management; its weights go to a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="K5TestCoreVAE", inputs=[], outputs=[io.Vae.Output()])

    @classmethod
    def execute(cls) -> io.NodeOutput:
        config = dict(
            double_z=True, z_channels=16, resolution=32, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 1, 1, 1],
            num_res_blocks=1, attn_resolutions=[], dropout=0.0, conv3d=True, time_compress=4,
        )  # fmt: skip
        network = AutoencoderKL(ddconfig=config, embed_dim=16).eval()
        generator = torch.Generator().manual_seed(0)
        for name, weight in network.named_parameters():
            weight.data.normal_(std=0.02 if weight.ndim < 2 else weight[0].numel() ** -0.5, generator=generator)
            if weight.ndim == 1 and "norm" in name and name.endswith("weight"):
                weight.data += 1
        save_file(network.state_dict(), Path(folder_paths.get_temp_directory()) / "core_vae.safetensors")
        vae = core_vae(network, 3)
        vae.device = comfy.model_management.vae_device()
        vae.vae_dtype, vae.disable_offload = torch.float32, False
        vae.patcher = comfy.model_patcher.CoreModelPatcher(
            network, load_device=vae.device, offload_device=comfy.model_management.vae_offload_device()
        )
        return io.NodeOutput(vae)


class K5TestOutOfMemory(io.ComfyNode):
    """From here on the first `attempts` attempts of whatever follows run out of memory at their call `after`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5TestOutOfMemory",
            inputs=[io.Latent.Input("latent"), io.Int.Input("attempts"), io.Int.Input("after")],
            outputs=[io.Latent.Output()],
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, latent: Any, attempts: int, after: int) -> io.NodeOutput:
        convolve, calls = PLAIN_CONV3D, [0, 0]

        def scarce(*arguments: Any) -> torch.Tensor:
            calls[0] += 1
            if calls[0] > after and calls[1] < attempts:
                calls[:] = 0, calls[1] + 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            if calls[1] == attempts:
                torch.nn.functional.conv3d = convolve
            return convolve(*arguments)

        torch.nn.functional.conv3d = scarce
        return io.NodeOutput(latent)


class K5TestHeld(io.ComfyNode):
    """Give the bytes of all tensors that Python can reach to the history, cached outputs of other nodes included."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5TestHeld", inputs=[io.Image.Input("image")], outputs=[], is_output_node=True, not_idempotent=True
        )

    @classmethod
    def execute(cls, image: Any) -> io.NodeOutput:
        gc.collect()
        reached = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
        stores = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in reached}
        return io.NodeOutput(ui={"bytes": [sum(stores.values())]})


class K5TestLoaded(io.ComfyNode):
    """Give the classes of the models that core holds on its device to the history."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="K5TestLoaded",
            inputs=[io.MultiType.Input("after", [io.Latent, io.Image])],
            outputs=[],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, after: Any) -> io.NodeOutput:
        loaded = comfy.model_management.current_loaded_models
        return io.NodeOutput(ui={"loaded": [type(model.model.model).__name__ for model in loaded]})


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            K5TestSave, K5TestWatch, K5TestSeen, K5TestModel, K5TestVAEs, K5TestCoreVAE, K5TestOutOfMemory,
            K5TestHeld, K5TestLoaded, K5TestPackedLoads,
        ]  # fmt: skip


async def comfy_entrypoint() -> Extension:
    return Extension()
