"""A progress line for the terminal."""

from __future__ import annotations

import time
from typing import TextIO

from .graph import Call

WIDTH = 24  # characters of the bar
REDRAW_S = 0.1


class ProgressLine:
    """Shows the running node; on a terminal one line is rewritten, elsewhere each node gets a line of its own."""

    def __init__(self, stream: TextIO, label: str = "") -> None:
        self.stream = stream
        self.is_terminal = stream.isatty()
        self._label = label
        self._shown = 0  # characters on the line now
        self._drawn_s = 0.0

    def start(self, call: Call, index: int, total: int) -> None:
        """Tell that node `index` of `total` begins."""
        self._label = f"[{index + 1}/{total}] {call.title}"
        if self.is_terminal:
            self._draw(self._label)
        else:
            self.stream.write(self._label + "\n")

    def advance(self, done: int, total: int) -> None:
        """Draw the running node's bar."""
        now_s = time.monotonic()
        if self.is_terminal and total > 1 and (done in (0, total) or now_s - self._drawn_s >= REDRAW_S):
            self._drawn_s = now_s
            filled = WIDTH * done // total
            self._draw(f"{self._label}  [{'#' * filled}{'.' * (WIDTH - filled)}] {done}/{total}")

    def clear(self) -> None:
        """Remove the line."""
        if self._shown:
            self._draw("")

    def _draw(self, text: str) -> None:
        self.stream.write("\r" + text.ljust(self._shown) + ("\r" if not text else ""))
        self.stream.flush()
        self._shown = len(text)
