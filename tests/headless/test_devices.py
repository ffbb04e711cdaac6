"""Devices that are not here: what the standalone host asks of their modules, with stand-ins for these."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import tiny
import torch
from comfyui_kandinsky5.kandinsky_core.memory.lane import has_streams
from comfyui_kandinsky5.kandinsky_core.memory.measurement import Measurement, free_bytes
from comfyui_kandinsky5.nodes import standalone_text, standalone_vae
from comfyui_kandinsky5.nodes.standalone_device import has_bf16
from comfyui_kandinsky5.nodes.standalone_vae import StandaloneWorkplace


def test_a_device_without_a_module_tells_nothing():
    device = torch.device("privateuseone:0")  # DirectML
    assert not hasattr(torch, device.type)
    assert not has_streams(device) and free_bytes(device) == 0 and has_bf16(device)
    with Measurement(device) as measured:
        pass
    assert measured.peak_bytes is None


@pytest.mark.parametrize("tells_emulation", [True, False])
def test_the_device_itself_is_asked_for_bf16(monkeypatch, tells_emulation):
    here, asked = [None], []

    @contextmanager
    def entered(device):
        here[0] = device
        yield
        here[0] = None

    def ask():
        return here[0].index == 1

    def ask_more(including_emulation=True):
        asked.append(including_emulation)
        return ask()

    module = SimpleNamespace(is_bf16_supported=ask_more if tells_emulation else ask, device=entered)
    monkeypatch.setattr(torch, "npu", module, raising=False)
    assert has_bf16(SimpleNamespace(type="npu", index=1))
    assert not has_bf16(SimpleNamespace(type="npu", index=0))
    assert asked == [False] * 2 * tells_emulation


def test_weights_on_the_device_are_not_free(monkeypatch):
    monkeypatch.setattr(torch, "npu", SimpleNamespace(memory_allocated=lambda device: 300), raising=False)
    monkeypatch.setattr(standalone_vae, "free_bytes", lambda device: 1000)
    place = StandaloneWorkplace(None, SimpleNamespace(type="npu"), torch.float16, lambda: None)
    assert place.free_bytes() == 700
    place.device = torch.device("cpu")
    assert place.free_bytes() == 1000


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "nf4"])
def test_text_weights_are_counted_as_they_will_be_loaded(host, models, dtype):
    folder = models / "text_encoders"
    clip = host.load_clip(folder / tiny.QWEN, folder / tiny.CLIP, tokenizer=None, dtype=dtype)
    counted = standalone_text.weight_bytes(clip)
    tower = standalone_text.load(clip, host.device)[0].qwen
    held = sum(tensor.nbytes for tensor in (*tower.parameters(), *tower.buffers()))
    assert counted == pytest.approx(held, rel=0.05)
