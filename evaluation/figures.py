"""Pictures of plain data: masks on photos and texts, search results. No model, so each can be tested alone.

Blue = hidden and visible in this photo, orange = hidden though no eye could find it here (where ground truth is
known), dark grey = hidden (where it is not). Blue and orange stay apart for colour-blind eyes too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from syncmask.processing.processing_syncmask import split_words

from .typeset import FRAME, GREEN, GREY, PAPER, font, paragraph

OUTLINE = "#ffd34d"
PHOTO, GAP, MARGIN = 264, 20, 24


@dataclass(frozen=True)
class Masks:
    """One way of masking a pair.

    Attributes:
        name: "synchronised (attention)", "random at the same rate" ...
        words: (W,) bool over `split_words(text)`, True = hidden.
        patches: (h, w) bool over the grid, True = hidden.
    """

    name: str
    words: np.ndarray
    patches: np.ndarray


@dataclass(frozen=True)
class MaskedPhoto:
    """A photo, its text and several ways of masking both; `visible` (W,) bool where the truth is known."""

    photo: Image.Image
    text: str
    masks: Sequence[Masks]
    visible: np.ndarray | None = None


@dataclass(frozen=True)
class Hit:
    """A search result: the photo (or text) that came back, its score, and whether it is right."""

    score: float
    right: bool
    photo: Image.Image | None = None
    text: str = ""


@dataclass(frozen=True)
class Search:
    """A query (a text, a photo or both) and its best results, best first; `rank` of the first right one, if known."""

    hits: Sequence[Hit]
    text: str = ""
    photo: Image.Image | None = None
    rank: int | None = None


# ---------------------------------------------------------------------------------------------- photos and words


def enlarge(photo: Image.Image, size: int = PHOTO) -> Image.Image:
    """The photo on a white square of `size` pixels: small ones enlarged crisply, large ones reduced smoothly."""
    photo = photo.convert("RGB")
    scale = size / max(photo.size)
    wanted = tuple(max(1, round(side * scale)) for side in photo.size)
    photo = photo.resize(wanted, Image.Resampling.LANCZOS)
    square = Image.new("RGB", (size, size), PAPER)
    square.paste(photo, ((size - wanted[0]) // 2, (size - wanted[1]) // 2))
    return square


def masked_photo(photo: Image.Image, patches: np.ndarray, size: int = PHOTO) -> Image.Image:
    """The photo as the model sees it (stretched to a square), hidden patches dimmed and outlined.

    Args:
        photo: any PIL image.
        patches: (h, w) bool, True = hidden.
        size: side of the result in pixels.
    """
    patches = np.asarray(patches, dtype=bool)
    if patches.ndim != 2:
        raise ValueError(f"patches has shape {patches.shape}; give the grid (h, w), as in mask.reshape(model.grid)")
    picture = photo.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    ys, xs = (np.linspace(0, size, count + 1).round().astype(int) for count in patches.shape)
    hidden = np.repeat(np.repeat(patches, np.diff(ys), axis=0), np.diff(xs), axis=1)
    veil = Image.new("RGB", picture.size, "#2b2f36")
    picture.paste(Image.blend(picture, veil, 0.82), mask=Image.fromarray(hidden.astype(np.uint8) * 255))
    _outline(ImageDraw.Draw(picture), patches, xs, ys)
    return picture


def _outline(draw: ImageDraw.ImageDraw, patches: np.ndarray, xs: np.ndarray, ys: np.ndarray) -> None:
    """A line wherever a hidden patch meets one that is seen (or the edge of the photo)."""
    padded = np.pad(patches, 1)
    for row, column in zip(*np.nonzero(padded[:, 1:] != padded[:, :-1])):
        if 1 <= row <= patches.shape[0]:
            draw.line([xs[column], ys[row - 1], xs[column], ys[row]], fill=OUTLINE, width=2)
    for row, column in zip(*np.nonzero(padded[1:] != padded[:-1])):
        if 1 <= column <= patches.shape[1]:
            draw.line([xs[column - 1], ys[row], xs[column], ys[row]], fill=OUTLINE, width=2)


def word_styles(text: str, hidden: np.ndarray, visible: np.ndarray | None = None) -> list[tuple[str, str]]:
    """The text cut into (piece, style) at word borders, in order and complete.

    Styles: "plain" (between words and seen words), "unseen" (not hidden, not visible in the photo), "hidden",
    "right" (hidden and visible) and "wrong" (hidden, not visible). Words beyond the masks' length are plain: they
    were cut off before the model saw them.

    Example: `word_styles("a red hat", [0, 1, 0])` is `[("a ", "plain"), ("red", "hidden"), (" hat", "plain")]`.
    """
    pieces, position = [], 0
    for index, (start, end) in enumerate(split_words(text)):
        style = _style(index, hidden, visible)
        if style != "plain":
            pieces += [(text[position:start], "plain"), (text[start:end], style)]
            position = end
    pieces.append((text[position:], "plain"))
    return [piece for piece in pieces if piece[0]]


def _style(index: int, hidden: np.ndarray, visible: np.ndarray | None) -> str:
    masked = index < len(hidden) and bool(hidden[index])
    if visible is None or index >= len(visible):
        return "hidden" if masked else "plain"
    if masked:
        return "right" if visible[index] else "wrong"
    return "plain" if visible[index] else "unseen"


# ------------------------------------------------------------------------------------------------------- mask view


def mask_view(pairs: Sequence[MaskedPhoto], size: int = PHOTO) -> Image.Image:
    """One row a pair: the photo with its text, then each way of masking both, side by side.

    Raises:
        ValueError: no pair, or pairs with different ways of masking (their columns would not line up).
    """
    names = _same_ways(pairs)
    rows = [[_panel(pair, masks, size) for masks in (None, *pair.masks)] for pair in pairs]
    known = any(pair.visible is not None for pair in pairs)
    return _grid(["photo and text", *names], rows, size, legend(known))


def mask_sheet(pairs: Sequence[MaskedPhoto], count: int = 3, width: int = 1000) -> Image.Image:
    """The first `count` pairs for a page: the columns of `mask_view`, but each text beside its photo, in small type.

    Args:
        pairs: with the same ways of masking.
        count: how many rows, at most.
        width: of the picture in pixels, about.

    Raises:
        ValueError: no pair, or pairs with different ways of masking.
    """
    names = _same_ways(pairs)
    size = (width - 2 * MARGIN - GAP * len(names)) // (len(names) + 1)
    rows = [[_beside(pair, masks, size) for masks in (None, *pair.masks)] for pair in pairs[:count]]
    return _grid(
        ["photo and text", *names], rows, size, legend(any(pair.visible is not None for pair in pairs[:count]))
    )


def _same_ways(pairs: Sequence[MaskedPhoto]) -> list[str]:
    names = [[masks.name for masks in pair.masks] for pair in pairs]
    if not pairs or any(row != names[0] for row in names):
        raise ValueError(f"a view of masks needs pairs with the same ways of masking, in the same order; got {names}")
    return names[0]


def _beside(pair: MaskedPhoto, masks: Masks | None, size: int) -> Image.Image:
    """A photo of half the width with its text on the right, the masks laid on both (None: as they are)."""
    side = size // 2 - 5
    picture, styles = _masked(pair, masks, side)
    words = paragraph(styles, size - side - 10, font(12))
    panel = Image.new("RGB", (size, max(side, words.height)), PAPER)
    panel.paste(picture, (0, 0))
    ImageDraw.Draw(panel).rectangle([0, 0, side - 1, side - 1], outline=FRAME)
    panel.paste(words, (side + 10, 0))
    return panel


def legend(known: bool) -> dict[str, str]:
    """Style -> its meaning; `known` = the truth about what is visible is known."""
    if not known:
        return {"hidden": "hidden word"}
    return {
        "right": "hidden, visible in this photo",
        "wrong": "hidden, not visible in this photo",
        "unseen": "not visible in this photo",
    }


def _masked(pair: MaskedPhoto, masks: Masks | None, size: int) -> tuple[Image.Image, list[tuple[str, str]]]:
    """The photo and the styled text under some masks, or as they are."""
    if masks is None:
        return enlarge(pair.photo, size), word_styles(pair.text, np.zeros(0, dtype=bool), pair.visible)
    return masked_photo(pair.photo, masks.patches, size), word_styles(pair.text, masks.words, pair.visible)


def _panel(pair: MaskedPhoto, masks: Masks | None, size: int) -> Image.Image:
    """A photo over its text, with the masks laid on both (None: as they are)."""
    picture, styles = _masked(pair, masks, size)
    words = paragraph(styles, size)
    panel = Image.new("RGB", (size, size + 10 + words.height), PAPER)
    panel.paste(picture, (0, 0))
    ImageDraw.Draw(panel).rectangle([0, 0, size - 1, size - 1], outline=FRAME)
    panel.paste(words, (0, size + 10))
    return panel


def _grid(heads: list[str], rows: list[list[Image.Image]], size: int, meanings: dict[str, str]) -> Image.Image:
    """Panels in columns under bold heads, a legend at the foot."""
    titles = [paragraph([(name, "plain")], size, font(16, bold=True)) for name in heads]
    key = [piece for style, meaning in meanings.items() for piece in (("word", style), (f" {meaning}.  ", "plain"))]
    foot = paragraph(key, len(heads) * (size + GAP) - GAP)
    lines = [titles, *rows, [foot]]
    heights = [max(panel.height for panel in line) + GAP for line in lines]
    sheet = Image.new("RGB", (2 * MARGIN + foot.width, 2 * MARGIN + sum(heights) - GAP), PAPER)
    y = MARGIN
    for line, height in zip(lines, heights):
        for column, panel in enumerate(line):
            sheet.paste(panel, (MARGIN + column * (size + GAP), y))
        y += height
    return sheet


# -------------------------------------------------------------------------------------------------------- searches


def retrieval_sheet(searches: Sequence[Search], caption: str = "", size: int = 168) -> Image.Image:
    """One row a query, its best results beside it; the right ones are framed green and named so.

    Args:
        searches: the queries, each with the same number of hits or fewer.
        caption: a line on top, such as the recall and what chance would give.
        size: side of a result in pixels.
    """
    if not searches:
        raise ValueError("retrieval_sheet needs at least one search")
    strips = [_strip(search, size) for search in searches]
    width = max(strip.width for strip in strips) + 2 * MARGIN
    head = paragraph([(caption, "plain")], width - 2 * MARGIN, font(16, bold=True)) if caption else None
    top = MARGIN + (head.height + 12 if head else 0)
    sheet = Image.new("RGB", (width, top + sum(strip.height + GAP for strip in strips) + MARGIN - GAP), PAPER)
    if head:
        sheet.paste(head, (MARGIN, MARGIN))
    for strip in strips:
        sheet.paste(strip, (MARGIN, top))
        top += strip.height + GAP
    return sheet


def _strip(search: Search, size: int) -> Image.Image:
    """The query, then its results."""
    question = _question(search, size)
    cells = [_cell(hit, size) for hit in search.hits]
    height = max(part.height for part in [question, *cells])
    strip = Image.new("RGB", (question.width + GAP + len(cells) * (size + 12), height), PAPER)
    strip.paste(question, (0, 0))
    for place, cell in enumerate(cells):
        strip.paste(cell, (question.width + GAP + place * (size + 12), 0))
    return strip


def _question(search: Search, size: int) -> Image.Image:
    parts = [enlarge(search.photo, size)] if search.photo else []
    parts += [paragraph([(search.text, "plain")], int(1.7 * size))] if search.text else []
    if search.rank is not None:
        parts.append(paragraph([(f"first right one: rank {search.rank}", "unseen")], int(1.7 * size), font(14)))
    question = Image.new("RGB", (int(1.7 * size), sum(part.height + 6 for part in parts)), PAPER)
    y = 0
    for part in parts:
        question.paste(part, (0, y))
        y += part.height + 6
    return question


def _cell(hit: Hit, size: int) -> Image.Image:
    """A result in its frame, score below; a right one is also named, for eyes that see no green."""
    body = enlarge(hit.photo, size - 10) if hit.photo else paragraph([(hit.text, "plain")], size - 10, font(14))
    height = max(size, body.height + 10) + 26
    cell = Image.new("RGB", (size, height), PAPER)
    draw = ImageDraw.Draw(cell)
    draw.rectangle([0, 0, size - 1, height - 27], outline=GREEN if hit.right else FRAME, width=5 if hit.right else 1)
    cell.paste(body, (5, 5))
    name = f"{hit.score:.2f}  right" if hit.right else f"{hit.score:.2f}"
    draw.text((2, height - 23), name, fill=GREEN if hit.right else GREY, font=font(14, bold=hit.right))
    return cell


# ---------------------------------------------------------------------------------------------------------- sheets


def over(parts: Sequence[Image.Image], gap: int) -> Image.Image:
    """Pictures below each other."""
    size = max(part.width for part in parts), sum(part.height + gap for part in parts) - gap
    sheet, y = Image.new("RGB", size, PAPER), 0
    for part in parts:
        sheet.paste(part, (0, y))
        y += part.height + gap
    return sheet


def beside(parts: Sequence[Image.Image], gap: int) -> Image.Image:
    """Pictures side by side."""
    size = sum(part.width + gap for part in parts) - gap, max(part.height for part in parts)
    sheet, x = Image.new("RGB", size, PAPER), 0
    for part in parts:
        sheet.paste(part, (x, 0))
        x += part.width + gap
    return sheet


def framed(body: Image.Image) -> Image.Image:
    """A sheet with a white margin."""
    sheet = Image.new("RGB", (body.width + 2 * MARGIN, body.height + 2 * MARGIN), PAPER)
    sheet.paste(body, (MARGIN, MARGIN))
    return sheet
