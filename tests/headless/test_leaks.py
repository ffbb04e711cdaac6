"""What a run must survive: the same graph again and again in flat memory, and being killed while it decodes."""

from __future__ import annotations

import gc
import mmap
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny
import torch
from comfyui_kandinsky5.headless.cli import node_types
from comfyui_kandinsky5.headless.run import run
from comfyui_kandinsky5.headless.workflow import parse
from comfyui_kandinsky5.kandinsky_core.io.latents import saved_latents
from comfyui_kandinsky5.kandinsky_core.io.media import read_video
from resident import anonymous_bytes, is_flat
from tiny_graphs import node, text_to_video

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

WARM_UP, RUNS = 2, 3

START = "import sys; from comfyui_kandinsky5.headless.cli import main; sys.exit(main(sys.argv[1:]))"


def to_a_file(seed, length=9, mode="auto"):
    """Text to a clip in a file."""
    return text_to_video(seed=seed, length=length, steps=1, cfg=1.0) | {
        "decode": node(
            "K5DecodeVideo", vae=["vae", 0], latent=["sample", 0], fps=8.0, filename_prefix="x", format="mkv",
            codec="lossless", crf=14.0, mode=mode, memory_gb=0.0, keep_latents=2,
        )
    }  # fmt: skip


def tensor_bytes():
    """Bytes of all tensors that Python can reach."""
    gc.collect()
    reached = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in reached}.values())


@linux
def test_three_runs_of_a_graph_leave_memory_flat(host):
    types = node_types()
    resident, tensors, files = [], [], []
    for seed in range(WARM_UP + RUNS):
        run(parse(to_a_file(seed), types), types, host)
        tensors.append(tensor_bytes())
        resident.append(anonymous_bytes())
        files.append(len(os.listdir("/proc/self/fd")))
    assert len(set(tensors[WARM_UP - 1 :])) == 1, tensors
    assert is_flat(resident[WARM_UP - 1 :]), resident
    assert files[-1] <= files[WARM_UP - 1], files
    assert len(host.latents()) == 2


@linux
def test_a_leak_is_seen():
    kept, resident = [], [anonymous_bytes()]
    for _ in range(RUNS):
        # Not from the allocator, which may have room left.
        kept.append(mmap.mmap(-1, 2 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        kept[-1].write(b"x" * (2 << 20))
        resident.append(anonymous_bytes())
    assert not is_flat(resident)


@linux
def test_a_run_killed_while_it_decodes_leaves_a_latent_that_becomes_the_clip(host, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    wish = [
        "--device", "cpu", "--models", str(models), "--prompt", "a red circle", "--model", tiny.VIDEO, "--vae",
        tiny.VIDEO_VAE, "--text-encoder", tiny.QWEN, "--clip", tiny.CLIP, "--steps", "1", "--frames", "49", "--width",
        "64", "--height", "48", "--quiet",
    ]  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", START, "generate", *wish, "--out", str(killed)])
    deadline = time.monotonic() + 300
    while not saved_latents(killed / "latents"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    assert [path.name for path in killed.iterdir()] == ["latents"]
    from comfyui_kandinsky5.headless.cli import main

    assert main(["generate", *wish, "--out", str(whole)]) == 0
    assert main(["decode", "--models", str(models), "--device", "cpu", "--out", str(killed), "--quiet"]) == 0
    clips = [read_video(folder / "kandinsky5_00001_.mp4").frames_THW3 for folder in (killed, whole)]
    assert torch.equal(*clips)
