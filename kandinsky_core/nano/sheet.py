"""A contact sheet: what was made, the prompt under it, and what the grader says, wrong answers marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image, ImageFont

TILE_PX = 128  # side of one picture on the sheet, whatever its own size
LEAST_PX = 200  # width of an entry, for its longest words
FRAMES = 6  # of a clip
SHEET_PX = 1600  # about the width; decides the columns
GAP_PX = 10
FONT_PX = 15
INK = {True: "#2a6f3c", False: "#c01818", None: "#000000"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One result: pictures `[H,W,3]` in 0…1 side by side, a line of text, and verdicts (words, right or wrong)."""

    prompt: str
    pictures: Sequence[Tensor]
    verdict: Sequence[tuple[str, bool]] = field(default=())


def strip(clip_THWC: Tensor) -> list[Tensor]:
    """Return a few frames of a clip, first and last among them; of a picture itself."""
    count = min(FRAMES, len(clip_THWC))
    return list(clip_THWC[torch.linspace(0, len(clip_THWC) - 1, count).round().long()])


def verdict(asked: Mapping[str, str], shown: Mapping[str, str]) -> list[tuple[str, bool]]:
    """Compare names: "circle" where right, "WRONG circle (square)" where a square was asked for."""
    return [
        (shown[name], True) if shown[name] == wanted else (f"WRONG {shown[name]} ({wanted})", False)
        for name, wanted in asked.items()
    ]


def contact_sheet(sections: Mapping[str, Sequence[Entry]], path: Path) -> None:
    """Write a PNG with a titled block of entries for every section."""
    from PIL import Image

    blocks = [_block(title, entries) for title, entries in sections.items() if entries]
    if not blocks:
        raise ValueError("There is nothing to show on a contact sheet: every section is empty.")
    sheet = Image.new("RGB", (max(block.width for block in blocks), sum(block.height for block in blocks)), "white")
    top = 0
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def wrapped(words: Sequence[tuple[str, bool | None]], font: ImageFont.ImageFont, width_px: int) -> list[list]:
    """Break coloured words into lines that are at most `width_px` wide: `(left, word, mark)`."""
    lines: list[list] = [[]]
    left = 0.0
    space = font.getlength(" ")
    for word, mark in words:
        wide = font.getlength(word)
        if lines[-1] and left + wide > width_px:
            lines.append([])
            left = 0.0
        lines[-1].append((left, word, mark))
        left += wide + space
    return lines


def _block(title: str, entries: Sequence[Entry]) -> Image.Image:
    from PIL import Image, ImageDraw, ImageFont

    font, large = ImageFont.load_default(FONT_PX), ImageFont.load_default(FONT_PX + 5)
    line_px, title_px = FONT_PX + 4, FONT_PX + 19
    wide = max(LEAST_PX, max(len(entry.pictures) for entry in entries) * TILE_PX)
    columns = max(1, SHEET_PX // (wide + GAP_PX))
    lines = []
    for entry in entries:
        words = [(word, None) for word in entry.prompt.split()]
        lines.append([*wrapped(words, font, wide), *wrapped(entry.verdict, font, wide)])
    high = TILE_PX + max(map(len, lines)) * line_px + GAP_PX
    size = (columns * (wide + GAP_PX) + GAP_PX, title_px + -(-len(entries) // columns) * high)
    block = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(block)
    pen.text((GAP_PX, GAP_PX // 2), title, fill=INK[None], font=large)
    for index, entry in enumerate(entries):
        left, top = GAP_PX + index % columns * (wide + GAP_PX), title_px + index // columns * high
        for place, picture in enumerate(entry.pictures):
            block.paste(_tile(picture), (left + place * TILE_PX, top))
        for number, line in enumerate(lines[index]):
            for indent, word, mark in line:
                pen.text((left + indent, top + TILE_PX + 2 + number * line_px), word, fill=INK[mark], font=font)
    return block


def _tile(picture_HWC: Tensor) -> Image.Image:
    from PIL import Image

    image = Image.fromarray((picture_HWC.clamp(0, 1) * 255).round().byte().numpy())
    grows = image.width < TILE_PX
    return image.resize((TILE_PX, TILE_PX), Image.Resampling.NEAREST if grows else Image.Resampling.BOX)
