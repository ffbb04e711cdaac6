"""A real ComfyUI server for the session: set COMFYUI_DIR to its checkout (COMFYUI_PYTHON to its interpreter)."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny

PACK = Path(__file__).parents[2]
FOLDER = "ComfyUI-Kandinsky5"
START_LIMIT_S = 400
RUN_LIMIT_S = 180


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test here, and skip them all without a ComfyUI."""
    missing = (
        None
        if os.environ.get("COMFYUI_DIR")
        else pytest.mark.skip(reason="set COMFYUI_DIR to run against ComfyUI")
    )
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.host)
            if missing is not None:
                item.add_marker(missing)


@dataclass(frozen=True)
class Server:
    """A running server, and what it has said so far."""

    address: str
    folder: str  # name of the pack in custom_nodes
    base: Path
    process: subprocess.Popen[bytes]

    @property
    def log(self) -> str:
        """Everything the server has written."""
        return (self.base / "server.log").read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> Any:
        """Read JSON from the server."""
        with urllib.request.urlopen(self.address + path) as answer:
            return json.load(answer)

    def text(self, path: str) -> str:
        """Read text from the server."""
        with urllib.request.urlopen(self.address + path) as answer:
            return answer.read().decode()

    def post(self, path: str, content: Any) -> tuple[int, Any]:
        """Send JSON; return status and answer, also of a refusal."""
        request = urllib.request.Request(
            self.address + path, json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def start(self, graph: dict[str, Any], **extra: Any) -> str:
        """Queue a graph and return its id."""
        status, answer = self.post("/prompt", {"prompt": graph, "prompt_id": str(uuid.uuid4()), **extra})
        assert status == 200 and not answer["node_errors"], answer
        return answer["prompt_id"]

    def finish(self, prompt_id: str) -> dict[str, Any]:
        """Wait for a queued graph and return its history entry."""
        deadline = time.monotonic() + RUN_LIMIT_S
        while not (history := self.get(f"/history/{prompt_id}")):
            assert self.process.poll() is None, f"the server died:\n{self.log[-4000:]}"
            assert time.monotonic() < deadline, f"still running after {RUN_LIMIT_S} s:\n{self.log[-4000:]}"
            time.sleep(0.1)
        return history[prompt_id]

    def run(self, graph: dict[str, Any], **extra: Any) -> dict[str, Any]:
        """Run a graph that must succeed; return the outputs by node id."""
        entry = self.finish(self.start(graph, **extra))
        assert entry["status"]["status_str"] == "success", self.error(entry)
        return entry["outputs"]

    def error(self, entry: dict[str, Any]) -> str:
        """Return the message of a failed run."""
        return next(
            f"{content['node_type']}: {content['exception_message']}"
            for kind, content in entry["status"]["messages"]
            if kind == "execution_error"
        )

    def file(self, entry: dict[str, str]) -> Path:
        """Return the path of a saved file."""
        return self.base / entry["type"] / entry["subfolder"] / entry["filename"]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server with this pack, the tiny models and the test nodes."""
    with serving(tmp_path_factory.mktemp("comfy")) as running:
        yield running


@pytest.fixture
def serving_another(tmp_path: Path) -> Iterator[Server]:
    """A server that a test may kill."""
    with serving(tmp_path) as running:
        yield running


@contextlib.contextmanager
def serving(base: Path) -> Iterator[Server]:
    """A server of its own in the empty folder `base`."""
    comfy = Path(os.environ["COMFYUI_DIR"]).expanduser()
    python = os.environ.get("COMFYUI_PYTHON") or comfy.parent / "venv" / "bin" / "python"
    for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
        (base / name).mkdir()
    (base / "custom_nodes" / FOLDER).symlink_to(PACK)
    (base / "custom_nodes" / "k5_test_nodes").symlink_to(Path(__file__).parent / "test_nodes")
    tiny.write(base / "models")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(python), "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(base),
        "--database-url", "sqlite:///:memory:", "--disable-auto-launch", "--dont-print-server", "--disable-api-nodes",
        "--preview-method", "latent2rgb",
    ]  # fmt: skip
    with (base / "server.log").open("wb") as log:
        environment = os.environ | {"PYTHONPATH": str(_extras(base))}
        process = subprocess.Popen(command, cwd=comfy, stdout=log, stderr=subprocess.STDOUT, env=environment)
    running = Server(f"http://127.0.0.1:{port}", FOLDER, base, process)
    try:
        _wait(running)
        yield running
    finally:
        process.terminate()
        process.wait(30)


def _extras(base: Path) -> Path:
    """A folder with what a user may install beside ComfyUI: the gguf package, plain Python, from these tests' own."""
    folder = base / "packages"
    folder.mkdir()
    (folder / "gguf").symlink_to(Path(gguf.__file__).parent)
    return folder


def _wait(server: Server) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        try:
            server.get("/system_stats")
            return
        except (urllib.error.URLError, ConnectionError):
            assert server.process.poll() is None, f"the server did not start:\n{server.log[-4000:]}"
            assert time.monotonic() < deadline, f"no answer after {START_LIMIT_S} s:\n{server.log[-4000:]}"
            time.sleep(0.25)


@pytest.fixture
def saved(server: Server) -> Callable[[dict[str, Any], str], Any]:
    """Run a graph and read what its `K5TestSave` node with the given id wrote: a dict of tensors."""
    from safetensors.torch import load_file

    def run(graph: dict[str, Any], node: str = "save") -> Any:
        return load_file(server.run(graph)[node]["path"][0])

    return run
