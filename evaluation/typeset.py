"""Setting words in lines with Pillow: fonts, colours, a paragraph with marked words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

INK, GREY, PAPER, FRAME = "#1b1b1b", "#5c5c5c", "#ffffff", "#c4c4c4"
BLUE, ORANGE, DARK, GREEN = "#1763a6", "#c2540a", "#3d3d3d", "#1a7f37"

# Style of a word -> ground (None = paper) and ink.
STYLES = {
    "plain": (None, INK),
    "unseen": (None, "#757575"),
    "hidden": (DARK, PAPER),
    "right": (BLUE, PAPER),
    "wrong": (ORANGE, PAPER),
}


@lru_cache
def font(size: int = 16, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which travels with matplotlib and so is everywhere."""
    weight = "bold" if bold else "normal"
    return ImageFont.truetype(
        font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight=weight)), size
    )


Style = str | tuple[str | None, str]  # a name in STYLES, or ground and ink themselves


def paragraph(
    pieces: Sequence[tuple[str, Style]], width: int, face: ImageFont.FreeTypeFont | None = None
) -> Image.Image:
    """Pieces of text with their styles, set in lines of at most `width` pixels.

    Args:
        pieces: (text, style) in reading order, styles as in STYLES or (ground, ink).
        width: of the picture in pixels.
        face: a font; 16 pixels DejaVu Sans by default.

    Example: `paragraph([("a ", "plain"), ("red", "hidden"), (" hat", "plain")], 200)`.
    """
    face = face or font(16)
    line_height = sum(face.getmetrics()) + 5
    placed, lines = _place(pieces, width, face)
    sheet = Image.new("RGB", (width, line_height * lines), PAPER)
    draw = ImageDraw.Draw(sheet)
    for x, line, word, style in placed:
        ground, ink = STYLES[style] if isinstance(style, str) else style
        y = line * line_height
        if ground:
            draw.rectangle([x - 1, y, x + face.getlength(word) + 1, y + line_height - 4], fill=ground)
        draw.text((x, y), word, fill=ink, font=face)
    return sheet


def _place(
    pieces: Sequence[tuple[str, Style]], width: int, face: ImageFont.FreeTypeFont
) -> tuple[list[tuple[float, int, str, Style]], int]:
    """(x, line, word, style) of every word, and the number of lines."""
    placed, x, line, space = [], 0.0, 0, face.getlength(" ")
    for unit in _units(pieces):
        if unit is None:
            x += space if x else 0
            continue
        if x and x + sum(face.getlength(part) for part, _ in unit) > width:
            x, line = 0.0, line + 1
        for part, style in unit:
            for word in _fitting(part, width, face):
                length = face.getlength(word)
                if x and x + length > width:
                    x, line = 0.0, line + 1
                placed.append((x, line, word, style))
                x += length
    return placed, line + 1


def _units(pieces: Sequence[tuple[str, Style]]) -> list[list[tuple[str, Style]] | None]:
    """What no line break may part: neighbours without a space between, such as a marked word and its comma.

    None stands for a space.
    """
    units: list[list[tuple[str, Style]] | None] = []
    for piece, style in pieces:
        for part in re.findall(r"\s+|\S+", piece):
            if part.isspace():
                units.append(None)
            elif units and units[-1] is not None:
                units[-1].append((part, style))
            else:
                units.append([(part, style)])
    return units


def _fitting(word: str, width: int, face: ImageFont.FreeTypeFont) -> list[str]:
    """The word, cut into parts where it alone is wider than a line."""
    parts = []
    while face.getlength(word) > width and len(word) > 1:
        fits = max(1, sum(face.getlength(word[:end]) <= width for end in range(1, len(word))))
        parts.append(word[:fits])
        word = word[fits:]
    return [*parts, word]
