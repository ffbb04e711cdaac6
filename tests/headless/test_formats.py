"""Packed weights of the nano video model: nearly the same clip as bf16, in fewer bytes, resident or travelling."""

from __future__ import annotations

from dataclasses import replace

import gguf
import pytest
import torch
from comfyui_kandinsky5.headless.cli import main, node_types
from comfyui_kandinsky5.headless.generate import Wish, build
from comfyui_kandinsky5.headless.graph import Call
from comfyui_kandinsky5.headless.run import run
from comfyui_kandinsky5.kandinsky_core import nano
from comfyui_kandinsky5.kandinsky_core.io import load_crossdit, open_checkpoint
from comfyui_kandinsky5.kandinsky_core.io.convert import PACKED, convert
from comfyui_kandinsky5.kandinsky_core.io.media import read_image
from comfyui_kandinsky5.kandinsky_core.memory.plan import Plan
from comfyui_kandinsky5.nodes import host as door
from comfyui_kandinsky5.nodes.host import SampleRequest
from comfyui_kandinsky5.nodes.host_standalone import StandaloneHost

SOURCE = nano.files()["model"]
PROMPT = "A red circle moves right on a black background."
LIMIT_DB = 35
FORMATS = ("fp8", "gguf-Q8_0", "gguf-Q5_0", "package")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Path of the nano video model in a format: by our converter, or by the gguf package alone ("package")."""
    folder = tmp_path_factory.mktemp("formats")

    def path(to):
        target = folder / f"nano_{to}.{'safetensors' if to in ('fp8', 'bf16') else 'gguf'}"
        if not target.exists():
            by_the_package(target) if to == "package" else convert(SOURCE, target, to)
        return target

    return path


def by_the_package(path):
    """A GGUF file without a line of ours: the package's writer and its quantiser."""
    checkpoint = open_checkpoint(SOURCE)
    writer = gguf.GGUFWriter(path, "kandinsky5")
    for key, value in checkpoint.metadata.items():
        writer.add_string(key, value)
    for name in checkpoint.tensors:
        value = checkpoint.tensor(name).float().numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if PACKED.fullmatch(name) else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Frames `[T,H,W,3]` of the graph that `kandinsky5 generate` makes, saved as pictures: `clip(model, dtype)`."""
    folder = tmp_path_factory.mktemp("clips")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(door, "_current", [])
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        host = StandaloneHost(models=folder, output=folder, device="cpu")
        door.install(host)

        def make(model, dtype="bf16"):
            graph = build(Wish(prompt=PROMPT, model=str(model), dtype=dtype, steps=8), host)
            video = next(call for call in graph.values() if call.type == "CreateVideo")
            made = {name: call for name, call in graph.items() if call.type not in ("CreateVideo", "SaveVideo")}
            frames = {"images": video.inputs["images"], "filename_prefix": "frame"}
            made["frames"] = Call(id="frames", type="SaveImage", title="frames", inputs=frames)
            files = run(made, node_types(), host).files
            return torch.cat([read_image(entry["path"]).pixels_1HW3 for entry in files if entry["node"] == "frames"])

        yield make


@pytest.fixture(scope="module")
def exact(clip):
    return clip("nano")


def decibel(one, other):
    return -10 * (one - other).square().mean().log10().item()


@pytest.mark.parametrize("to", FORMATS)
def test_a_packed_model_gives_nearly_the_clip_of_bf16(converted, clip, exact, to):
    made = clip(converted(to))
    assert made.shape == exact.shape == (17, 64, 64, 3) and exact.std() > 0.05
    assert LIMIT_DB <= decibel(made, exact) < 90


@pytest.mark.parametrize(("to", "part"), [("fp8", 0.55), ("gguf-Q8_0", 0.58), ("gguf-Q5_0", 0.4)])
def test_packed_weights_take_less_memory(converted, to, part):
    def held(path):
        state = load_crossdit(path, dtype=torch.bfloat16).model.state_dict()
        return sum(tensor.nbytes for name, tensor in state.items() if PACKED.fullmatch(name.removesuffix("_scale")))

    assert held(converted(to)) < part * held(SOURCE)


@pytest.mark.parametrize("to", ["fp8", "gguf-Q8_0"])
def test_packed_blocks_may_travel(converted, to):
    host = StandaloneHost(device="cpu")
    model = host.load_model(converted(to), variant=None, dtype="bf16").model
    torch.manual_seed(0)
    spec = model.variant.spec
    text = [[torch.randn(1, 5, spec.in_text_dim), {"pooled_output": torch.randn(1, spec.in_text_dim2)}]]
    request = SampleRequest(
        positive=text, negative=None, latent={"samples": torch.zeros(1, 16, 2, 8, 8)}, seed=0,
        sigmas=torch.tensor([1.0, 0.5, 0.0]), guidance=1.0, sampler_name="euler",
    )  # fmt: skip
    whole = host.sample(model, request)
    assert torch.equal(host.sample(replace(model, plan=Plan(budget_bytes=0, resident_blocks=1)), request), whole)


def test_the_command_converts_and_what_it_wrote_generates(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(door, "_current", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "nano.gguf"
    assert main(["convert", str(SOURCE), str(out), "--to", "gguf-Q8_0"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(out) and "46 Q8_0" in said.err
    made = ["generate", "--prompt", "a", "--model", str(out), "--out", str(tmp_path), "--device", "cpu", "--quiet",
            "--frames", "1", "--steps", "1", "--dtype", "bf16", "--text-dtype", "nf4"]  # fmt: skip
    assert main(made) == 0
    assert capsys.readouterr().out.strip().endswith(".png")
    assert main(["convert", str(SOURCE), str(out), "--to", "gguf-Q8_0"]) == 2
    assert "exists already" in capsys.readouterr().err
