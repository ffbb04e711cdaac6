"""Streaming from a mapped file needs main memory for its ring, not for the weights (acceptance at full size:
benchmarks/streaming.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = """
import argparse, json, sys
from dataclasses import replace
from pathlib import Path
import torch
sys.path.insert(0, "benchmarks")
import streaming

torch.set_num_threads(1)
spec = replace(
    streaming.ROW.spec, model_dim=512, ff_dim=2048, time_dim=128, num_visual_blocks=24, in_text_dim=256, in_text_dim2=64
)
streaming.ROW = replace(streaming.ROW, spec=spec)
streaming.TEXT_TOK = 16
path = Path(sys.argv[1])
if not path.exists():
    streaming.write_file(path, streaming.lite_shapes(), streaming.spec_metadata(streaming.ROW))
options = argparse.Namespace(wide=False, device=torch.device("cpu"), way=sys.argv[2], pinned_bytes=0, latent=(1, 8, 8))
sys.stdout.write(json.dumps(streaming.lite_run(path, options)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells anonymous memory apart")
def test_weights_of_a_streamed_model_take_no_main_memory(tmp_path):
    path = tmp_path / "random.safetensors"
    found = {}
    for way in ("streamed", "resident"):
        command = [sys.executable, "-c", RUN, str(path), way]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert not done.returncode, done.stderr
        found[way] = json.loads(done.stdout)
    streamed, resident = found["streamed"], found["resident"]
    assert streamed["sha256"] == resident["sha256"]
    blocks_bytes = streamed["pass_bytes"]
    assert resident["peak_bytes"] > blocks_bytes
    assert streamed["ring_bytes"] < 0.1 * blocks_bytes
    assert streamed["peak_bytes"] < streamed["ring_bytes"] + 0.35 * blocks_bytes
