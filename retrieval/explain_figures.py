"""Pictures of an `Explanation`: heat on a photo, words in shades of support, and both on one sheet (PNG)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from syncmask.evaluation.figures import GAP, PHOTO, beside, enlarge, framed, masked_photo, over, word_styles
from syncmask.evaluation.heat import heat_photo, in_shape
from syncmask.evaluation.typeset import BLUE, FRAME, GREY, INK, ORANGE, PAPER, font, paragraph
from syncmask.processing.processing_syncmask import split_words

from .explain import Explanation

SHOWN = 8  # words with maps on a sheet, unless they are chosen
TRACE = 0.05  # of the full colour: no eye would see it
FULL = {"evidence": 2.0, "attention": 2.5}  # support that gets the full colour: nats, standard deviations
KEY = (
    "Heat: little (none) to much (dark red), each map by itself; the ring is its hottest patch. "
    "attention: where a word looks. gradient: the same, weighted by what the match gains from it."
)


def hidden_photo(explanation: Explanation, size: int = PHOTO) -> Image.Image:
    """The photo with the patches dimmed that SyncMask would hide."""
    return in_shape(masked_photo(explanation.photo, explanation.masks.patches, size), explanation.photo, size)


def shades(explanation: Explanation) -> list[tuple[str, str]]:
    """(ground, ink) of each word as "#rrggbb": blue = the photo supports it, orange = it speaks against it.

    A score of attention says only more or less than the text's other words, so less is left white; so is a trace.
    """
    strength = np.clip(explanation.support / FULL[explanation.support_kind], -1, 1)
    strength = np.where(abs(strength) < TRACE, 0, strength)
    if explanation.support_kind == "attention":
        strength = strength.clip(min=0)
    return [_shade(float(one)) for one in strength]


def _shade(strength: float) -> tuple[str, str]:
    target = BLUE if strength > 0 else ORANGE
    mixed = [round(255 + (int(target[i : i + 2], 16) - 255) * abs(strength)) for i in (1, 3, 5)]
    return "#{:02x}{:02x}{:02x}".format(*mixed), PAPER if abs(strength) > 0.55 else INK


def support_pieces(explanation: Explanation) -> list[tuple[str, str | tuple[str, str]]]:
    """The text cut into (piece, style) in order and complete; a coloured word's style is its shade, else "plain"."""
    text, pieces, position = explanation.text, [], 0
    for (start, end), shade in zip(split_words(text), shades(explanation)):
        if shade != _shade(0.0):
            pieces += [(text[position:start], "plain"), (text[start:end], shade)]
            position = end
    return [piece for piece in [*pieces, (text[position:], "plain")] if piece[0]]


def support_key(kind: str) -> list[tuple[str, tuple[str, str]]]:
    """(meaning, shade) of the ends of the colour scale."""
    ends = [("supported", _shade(1.0)), ("neutral", _shade(0.0))]
    return ends if kind == "attention" else [*ends, ("contradicted", _shade(-1.0))]


def chosen_words(explanation: Explanation, word: str | None = None, count: int = SHOWN) -> list[int]:
    """Places of one word, or of the `count` words that the photo supports most, in the order of the text."""
    if word is not None:
        return explanation.find(word)
    return sorted(np.argsort(-explanation.support, kind="stable")[:count].tolist())


def verdict(explanation: Explanation) -> str:
    """Both scores in one line."""
    return f"match {explanation.match:.2f}   cosine {explanation.similarity:.2f}   fusion layer {explanation.layer}"


def kinds(explanation: Explanation) -> list[tuple[str, np.ndarray]]:
    """(name, maps (W, h, w)) of the heatmaps that the model has."""
    both = [("attention", explanation.attention), ("gradient", explanation.gradient)]
    return [(name, maps) for name, maps in both if maps is not None]


# ----------------------------------------------------------------------------------------------------------- sheet


def explanation_sheet(explanation: Explanation, word: str | None = None, size: int = PHOTO) -> Image.Image:
    """Everything on one sheet: photo and text, the mean of all heatmaps, the masks, then the maps of single words.

    Args:
        explanation: of `explain`.
        word: its maps alone; the best supported words when None.
        size: side of the large photos in pixels.

    Raises:
        ValueError: the text has no such word.
    """
    places = chosen_words(explanation, word)
    columns = 2 + len(kinds(explanation))
    width = columns * (size + GAP) - GAP
    parts = [
        paragraph([(verdict(explanation), "plain")], width, font(18, bold=True)),
        beside(_overview(explanation, size), GAP),
        *_word_rows(explanation, places, width, size if word is not None else size // 2 - 10),
        paragraph([(KEY, "unseen")], width, font(14)),
    ]
    return framed(over(parts, GAP))


def _overview(explanation: Explanation, size: int) -> list[Image.Image]:
    """Photo over coloured words; the mean map of each kind; the photo and words under the masks."""
    ends = support_key(explanation.support_kind)
    key = [piece for name, shade in ends for piece in ((name, shade), ("   ", "plain"))]
    words = [paragraph(support_pieces(explanation), size), paragraph(key, size, font(12))]
    words.append(paragraph([(explanation.support_note, "unseen")], size, font(12)))
    panels = [_panel("photo and text", enlarge(explanation.photo, size), words)]
    for name, maps in kinds(explanation):
        panels.append(_panel(f"{name}, all words", heat_photo(explanation.photo, maps.mean(axis=0), size), []))
    masked = paragraph(word_styles(explanation.text, explanation.masks.words), size)
    return [*panels, _panel(explanation.masks.name, hidden_photo(explanation, size), [masked])]


def _word_rows(explanation: Explanation, places: Sequence[int], width: int, size: int) -> list[Image.Image]:
    """Cells of words, as many side by side as fit."""
    cells = [_word_cell(explanation, place, size) for place in places]
    fit = max(1, (width + GAP) // (cells[0].width + GAP))
    return [beside(cells[start : start + fit], GAP) for start in range(0, len(cells), fit)]


def _word_cell(explanation: Explanation, place: int, size: int) -> Image.Image:
    """A word in its shade, its support, and its heatmaps side by side."""
    maps = [(name, heat_photo(explanation.photo, every[place], size)) for name, every in kinds(explanation)]
    photos = beside([_panel(name, picture, [], font(12)) for name, picture in maps], 8)
    name = [(explanation.words[place], shades(explanation)[place]), (f"  {explanation.support[place]:+.2f}", "unseen")]
    return over([paragraph(name, photos.width, font(16, bold=True)), photos], 4)


def _panel(title: str, picture: Image.Image, below: Sequence[Image.Image], face=None) -> Image.Image:
    ImageDraw.Draw(picture).rectangle([0, 0, picture.width - 1, picture.height - 1], outline=FRAME)
    head = paragraph([(title, (None, GREY if face else INK))], picture.width, face or font(14, bold=True))
    return over([head, picture, *below], 6)
