"""Who may import whom (docs/architecture.md), and what importing the pack may not drag in."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = "kandinsky_core"
FOREIGN = (
    "comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "latent_preview", "server", "diffusers",
)  # fmt: skip

# Each room of the core and the rooms it may look into, besides itself and errors, shapes, variants.
ROOMS = {
    "errors": set(),
    "shapes": set(),
    "variants": {"shapes"},
    "cost": set(),
    "sparse": set(),
    "model": set(),
    "vae": set(),
    # The towers read their files through io's checkpoint reader, may be streamed, and may be packed while being read.
    "text": {"io", "memory", "packed"},
    "sampling": {"model", "memory"},
    "io": {"model", "vae", "packed"},
    "packed": set(),  # knows bytes and layers, neither files nor models
    "memory": {"vae", "model", "sparse", "cost"},
    "train": {"model", "sampling"},
    "nano": {"model", "vae", "text", "io", "sampling", "train"},
}
GROUND = {"errors", "shapes", "variants"}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str, int]]:
    """Yield (relative level, module, line) of every import, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module is None:
                yield from ((node.level, alias.name, node.lineno) for alias in node.names)
            else:
                yield node.level, node.module, node.lineno


def target(path: Path, level: int, module: str) -> tuple[str, ...]:
    """Parts of the imported module's path from the root of the pack."""
    folder = path.relative_to(ROOT).parent.parts
    return (*folder[: len(folder) - (level - 1)], *module.split("."))


@pytest.mark.parametrize("path", sources(CORE), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_looks_only_into_allowed_rooms(path):
    room = path.relative_to(ROOT / CORE).parts[0].removesuffix(".py")
    for level, module, line in imports(path):
        if level == 0:
            top = module.split(".")[0]
            assert top not in (*FOREIGN, "nodes", "headless", CORE), f"{path}:{line} imports {module}"
            continue
        reached = target(path, level, module)
        assert reached[0] == CORE, f"{path}:{line} leaves the core for {'.'.join(reached)}"
        if len(reached) > 1 and room != "__init__":
            allowed = ROOMS[room] | {room} | (GROUND if room not in GROUND else {"errors"})
            assert reached[1] in allowed, f"{path}:{line}: {room} may not look into {reached[1]}"


def test_every_room_has_its_rule():
    rooms = {path.name.removesuffix(".py") for path in (ROOT / CORE).iterdir() if not path.name.startswith("__")}
    assert rooms == ROOMS.keys()


@pytest.mark.parametrize("path", sources("nodes"), ids=lambda path: path.name)
def test_only_the_door_knows_the_host(path):
    is_door = path.name.startswith(("host_comfy", "comfy_"))
    for level, module, line in imports(path):
        top = module.split(".")[0]
        if level == 0 and top in FOREIGN:
            assert is_door, f"{path}:{line} imports {module}"
        if level:
            assert "headless" not in target(path, level, module), f"{path}:{line} imports {module}"


@pytest.mark.parametrize("path", sources("headless"), ids=lambda path: path.name)
def test_headless_never_imports_comfyui(path):
    for level, module, line in imports(path):
        assert level or module.split(".")[0] not in FOREIGN, f"{path}:{line} imports {module}"


def loaded_by(statement: str) -> set[str]:
    """Modules that a fresh interpreter has after a statement, besides those it starts with."""
    code = f"import sys; before = set(sys.modules); {statement}; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("comfyui_kandinsky5", {"torch", "numpy"}),
        ("comfyui_kandinsky5.headless.cli", {"torch", "numpy"}),
        ("comfyui_kandinsky5.kandinsky_core.io", {"transformers", "av", "PIL", "tokenizers"}),
        ("comfyui_kandinsky5.kandinsky_core.sampling", {"transformers", "av", "PIL", "tokenizers"}),
        ("comfyui_kandinsky5.kandinsky_core.text", {"transformers", "av", "PIL", "tokenizers"}),
        ("comfyui_kandinsky5.nodes", {"transformers", "av", "PIL", "tokenizers"}),
    ],
)
def test_importing_stays_light(module, heavy):
    assert not heavy & loaded_by(f"import {module}")
