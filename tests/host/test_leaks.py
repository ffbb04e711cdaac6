"""What a server must survive: the same graph again and again in flat memory, and being killed while it decodes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from comfyui_kandinsky5.kandinsky_core.io.latents import saved_latents
from resident import anonymous_bytes, is_flat
from safetensors.torch import load_file
from tiny_graphs import node, save, text_to_video

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

WARM_UP, RUNS = 2, 3
CLOSING_S = 30  # a server closes the connection of an answered request in its own time


def decoded(seed, **changes):
    """A clip of 25 frames, decoded to images and into a file."""
    work = {"mode": "auto", "memory_gb": 0.0, "keep_latents": 8} | changes
    return text_to_video(seed=seed, width=96, height=64, length=25, steps=1, cfg=1.0) | {
        "decode": node("K5VAEDecodeTiled", vae=["vae", 0], latent=["sample", 0], **work),
        "file": node(
            "K5DecodeVideo", vae=["vae", 0], latent=["sample", 0], fps=8.0, filename_prefix="leak/x", format="mp4",
            codec="h264", crf=20.0, **work,
        ),
        "held": node("K5TestHeld", image=["decode", 0]),
    }  # fmt: skip


def open_files(process, at_most=None):
    """Return what a process holds open, after waiting for a little while until it is no more than `at_most`."""
    deadline = time.monotonic() + CLOSING_S
    while True:
        found = []
        for path in (process / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                found.append(os.readlink(path))
        if at_most is None or len(found) <= at_most or time.monotonic() > deadline:
            return sorted(found)
        time.sleep(0.05)


@linux
def test_three_runs_of_a_graph_leave_memory_flat(server):
    process = Path(f"/proc/{server.process.pid}")
    resident, tensors, files = [], [], []
    for seed in range(WARM_UP + RUNS):
        outputs = server.run(decoded(seed))
        tensors.append(outputs["held"]["bytes"][0])
        resident.append(anonymous_bytes(server.process.pid))
        files.append(open_files(process, at_most=len(files[WARM_UP - 1]) if len(files) >= WARM_UP else None))
    seen = {"resident_MB": [value >> 20 for value in resident], "tensors_MB": [value >> 20 for value in tensors]}
    assert is_flat(resident[WARM_UP - 1 :]), seen
    assert max(tensors[WARM_UP:]) <= tensors[WARM_UP - 1], seen
    assert len(files[-1]) <= len(files[WARM_UP - 1]), set(files[-1]) - set(files[WARM_UP - 1])


@linux
def test_a_server_killed_while_it_decodes_leaves_a_latent_that_becomes_the_clip(server, serving_another, saved):
    graph = decoded(31) | {"save": save(latent=["sample", 0], image=["decode", 0])}
    del graph["file"], graph["held"]
    victim = serving_another
    victim.start(graph)
    kept = victim.base / "output" / "latents"
    deadline = time.monotonic() + 300
    while not saved_latents(kept):
        assert victim.process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    victim.process.send_signal(signal.SIGKILL)
    victim.process.wait(30)
    assert "Prompt executed" not in victim.log
    (path,) = saved_latents(kept)
    (server.base / "output" / "latents").mkdir(exist_ok=True)
    shutil.copy(path, server.base / "output" / "latents" / path.name)
    wanted = saved(graph)
    resumed = {name: graph[name] for name in ("vae", "decode", "save")} | {
        "sample": node("K5LoadLatent", latent_name=path.name)
    }
    found = load_file(server.run(resumed)["save"]["path"][0])
    assert torch.equal(found["latent"], wanted["latent"]) and torch.equal(found["image"], wanted["image"])
