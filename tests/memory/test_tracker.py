"""The tracker counts what the allocator counts, and on the meta device what it would count."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from comfyui_kandinsky5.kandinsky_core.memory.tracker import Tracker
from comfyui_kandinsky5.kandinsky_core.model import CrossDiT
from comfyui_kandinsky5.kandinsky_core.variants import NANO_VIDEO

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from measure import peak_live_bytes  # noqa: E402


def tracked(run) -> int:
    with Tracker() as tracker, torch.no_grad():
        run()
    return tracker.peak_bytes


def test_views_and_in_place_work_cost_nothing():
    x = torch.zeros(1000)
    assert tracked(lambda: x.view(10, 100).transpose(0, 1).add_(1)[2:].mul_(2)) == 0


def test_storages_are_subtracted_when_they_are_freed():
    def run():
        a = torch.zeros(1000)  # 4 kB
        b = a + 1  # 8 kB
        del a
        c = b + 1
        del b
        return c.double()  # 4 kB and 8 kB

    assert tracked(run) == 12_000


def test_a_view_keeps_its_whole_storage_alive():
    def run():
        corner = torch.zeros(1000)[:1]
        return torch.zeros(500), corner

    assert tracked(run) == 6000


def test_what_was_alive_before_does_not_count_but_makes_room_when_it_is_freed():
    held = [torch.zeros(1000)]
    with Tracker() as tracker:
        held[0].add_(1)
        assert tracker.peak_bytes == 0
        held.clear()
        torch.zeros(1500)
    assert tracker.peak_bytes == 2000


def test_resized_storages_are_counted_anew():
    x = torch.zeros(10)
    assert tracked(lambda: x.resize_(1000)) == 3960


def test_only_tensors_of_the_wanted_device_are_counted():
    with Tracker(device="meta") as tracker:
        torch.zeros(1000)
        torch.zeros(10, device="meta")
    assert tracker.peak_bytes == 40


def test_meta_attention_is_one_output_in_the_layout_of_the_kernels():
    q = torch.zeros(1, 2, 4096, 64, device="meta", dtype=torch.bfloat16)
    with Tracker() as tracker, torch.no_grad():
        out = F.scaled_dot_product_attention(q, q, q)
        flat = out.transpose(1, 2).flatten(2)
    assert out.shape == q.shape and flat.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
    assert tracker.peak_bytes == q.nbytes + 2 * 4096 * 4


# On the meta device the larger one would be cut into a device's pieces, not a processor's.
@pytest.mark.parametrize(
    ("device", "tokens_thw"), [("cpu", (1, 8, 8)), ("cpu", (5, 16, 16)), ("meta", (1, 8, 8))]
)
def test_a_forward_counts_as_the_profiler_counts_it(device, tokens_thw):
    """Kernels' own buffers are in the profiler's count only: they may be at most a few per cent."""
    t, h, w = tokens_thw

    def forward(device):
        model = CrossDiT(NANO_VIDEO, device=device, dtype=torch.float32).eval()
        x = torch.zeros(1, t, 2 * h, 2 * w, NANO_VIDEO.visual_embed_dim, device=device)
        text = torch.zeros(1, 32, NANO_VIDEO.in_text_dim, device=device)
        pooled = torch.zeros(1, NANO_VIDEO.in_text_dim2, device=device)
        return lambda: model(x, text, pooled, torch.zeros(1, device=device))

    with torch.no_grad():
        wanted = peak_live_bytes(forward("cpu"))
    got = tracked(forward(device))
    assert got <= 1.05 * wanted and got >= 0.9 * wanted
