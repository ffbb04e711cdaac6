"""`make demo`: run the nano workflows, say where clips and pictures lie and what they show by measurement."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from ..kandinsky_core.io.media import read_image, read_video, write_png
from ..kandinsky_core.nano.grade import NOTHING, grade
from ..nodes.host import install
from ..nodes.host_standalone import StandaloneHost
from .cli import BUNDLED, node_types
from .progress import ProgressLine
from .run import run
from .workflow import parse, read_document

WORKFLOWS = ("t2v_nano", "i2v_nano", "t2i_nano", "edit_nano")
SHEET_FRAMES = 6
SHEET_SCALE = 2


def main() -> int:
    """Run the workflows and write one paragraph about each."""
    host = StandaloneHost()
    install(host)
    types = node_types()
    for name in WORKFLOWS:
        line = ProgressLine(sys.stderr)
        host.on_progress = line.advance
        document = read_document(BUNDLED / f"{name}.json")
        started = time.perf_counter()
        result = run(parse(document, types), types, host, workflow=document, on_call=line.start)
        line.clear()
        seconds = time.perf_counter() - started
        saved = result.files[-1]
        describe = describe_clip if saved["kind"] == "video" else describe_picture
        prompts = [facts["prompts"][0] for facts in result.facts.values() if "prompts" in facts]
        sys.stdout.write(f"{name}: {seconds:.1f} s\n  prompt: {prompts[-1]}\n{describe(Path(saved['path']))}")
    return 0


def describe_picture(path: Path) -> str:
    """Say where a picture lies and what the grader sees in it."""
    seen = grade(read_image(path).pixels_1HW3)
    what = "no clear shape" if seen.shape == NOTHING else f"a {seen.color} {seen.shape}"
    return f"  picture: {path}\n  shows:   {what} on {seen.background} (measured)\n"


def describe_clip(path: Path) -> str:
    """Say where a clip lies and what the grader sees in it, and put its frames side by side in a picture."""
    frames_THW3 = read_video(path).frames_THW3
    seen = grade(frames_THW3)
    chosen = torch.linspace(0, len(frames_THW3) - 1, SHEET_FRAMES).round().long()
    sheet_HW3 = torch.cat(list(frames_THW3[chosen]), dim=1)
    sheet = write_png(
        path.with_suffix(".png"), sheet_HW3.repeat_interleave(SHEET_SCALE, 0).repeat_interleave(SHEET_SCALE, 1)
    )
    what = "no clear shape" if seen.shape == NOTHING else f"a {seen.color} {seen.shape}, motion '{seen.motion}',"
    return f"  clip:   {path}\n  frames: {sheet}\n  shows:  {what} on {seen.background} (measured)\n"


if __name__ == "__main__":
    sys.exit(main())
