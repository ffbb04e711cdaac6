"""Free main memory, also inside a container with a limit."""

from __future__ import annotations

import pytest
from comfyui_kandinsky5.kandinsky_core.memory import ram


@pytest.mark.parametrize(
    ("limit", "free"),
    [("1000000", 1000000 - 700000 + 200000), ("max", 1 << 40), (str(1 << 50), 1 << 40), (None, 1 << 40)],
)
def test_the_limit_of_a_container_counts(tmp_path, monkeypatch, limit, free):
    monkeypatch.setattr(ram, "GROUP", tmp_path)
    monkeypatch.setattr(ram, "_system_bytes", lambda: 1 << 40)
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text("700000\n")
        (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 150000\nactive_file 50000\n")
    assert ram.free_ram_bytes() == free


def test_this_system_tells():
    assert ram.free_ram_bytes() > 0
