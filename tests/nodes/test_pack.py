"""The pack outside ComfyUI: importable, silent, quick; the host stays behind its door."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACK = Path(__file__).parents[2]
HOST_MODULES = {"comfy", "folder_paths", "latent_preview", "comfy_extras", "execution", "server", "nodes"}
BEHIND_THE_DOOR = {
    "comfy_attention.py", "host_comfy.py", "comfy_model.py", "comfy_packed.py", "comfy_plan.py", "comfy_vae.py",
    "comfy_clip.py",
}  # fmt: skip
FORBIDDEN_AT_IMPORT = ("transformers", "diffusers", "av", "PIL", "safetensors.torch")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stderr, done.stderr
    return done.stdout


def test_import_without_comfyui_is_silent_and_light():
    code = (
        "import sys, torch; import comfyui_kandinsky5; from comfyui_kandinsky5.nodes import comfy_entrypoint;"
        f"print([name for name in {FORBIDDEN_AT_IMPORT} if name in sys.modules], hasattr(comfyui_kandinsky5, 'nodes'))"
    )
    assert run(code).split() == ["[]", "True"]


def test_entry_is_hidden_outside_comfyui():
    """ComfyUI takes the newer branch only if no NODE_CLASS_MAPPINGS is there."""
    code = "import comfyui_kandinsky5 as pack; print(hasattr(pack, 'NODE_CLASS_MAPPINGS'), pack.__all__)"
    assert run(code) == "False ['WEB_DIRECTORY']\n"


def imported(path: Path) -> set[str]:
    """Top-level names of the absolute imports of a file."""
    names = set()
    for found in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(found, ast.Import):
            names |= {alias.name.split(".")[0] for alias in found.names}
        elif isinstance(found, ast.ImportFrom) and not found.level:
            names.add(found.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", sorted(PACK.glob("nodes/*.py")), ids=lambda path: path.name)
def test_only_the_host_modules_import_comfyui(path):
    reached = imported(path) & HOST_MODULES
    assert not reached or path.name in BEHIND_THE_DOOR, reached
    assert "comfy_api" not in imported(path) or path.name == "comfy_io.py"


def test_web_folder_holds_only_help():
    """Every script in the web folder would be loaded by every user's browser."""
    assert {path.suffix for path in (PACK / "js").rglob("*") if path.is_file()} == {".md"}
