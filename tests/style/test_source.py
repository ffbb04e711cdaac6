"""Habits that a linter does not know: no literal devices, no machine paths, names and docstrings in place."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("kandinsky_core", "nodes", "headless", "benchmarks")
PATHS = [ROOT / "__init__.py", *(path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")))]
DEVICE = re.compile(r"(cuda|mps|xpu)(:\d+)?")
VAGUE = {"utils", "util", "misc", "common", "helper", "helpers", "manager"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_keeps_the_house_rules(path):
    assert path.stem not in VAGUE, "name the subject"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not DEVICE.fullmatch(node.value), f"line {node.lineno}: ask the host for a device"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and "benchmarks" not in path.parts:
            assert node.func.id != "print", f"line {node.lineno}: use the logger"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: name the exception"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_objects_are_described(path):
    module = tree(path)
    if path.name != "__init__.py" or module.body:
        assert ast.get_docstring(module), "say what the file is for"
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_requirements_pin_nothing():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if line.strip() and not line.startswith("#")]
