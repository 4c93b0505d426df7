"""Pictures of an `Explanation`: heat on a photo, words in shades of support, and both on one sheet (PNG)."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from syncmask.evaluation.figures import GAP, MARGIN, PHOTO, enlarge, masked_photo, word_styles
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


def heat_photo(photo: Image.Image, heat: np.ndarray, size: int = PHOTO) -> Image.Image:
    """A photo in light grey under a map of where a word looks, the hottest patch ringed, on a white square.

    Args:
        photo: any PIL image.
        heat: (h, w), at least 0; scaled from its least to its largest value; a constant map shows no heat.
        size: side of the result in pixels.
    """
    heat = np.asarray(heat, dtype=np.float32)
    if heat.ndim != 2:
        raise ValueError(f"heat has shape {heat.shape}; give one map on the grid (h, w)")
    grey = np.asarray(photo.convert("L").resize((size, size), Image.Resampling.LANCZOS), dtype=np.float32)
    base = np.repeat(255 - (255 - grey[..., None]) * 0.55, 3, axis=-1)
    spread = float(heat.max() - heat.min())
    flat = spread <= 1e-6 * float(heat.max())
    heat = np.zeros_like(heat) if flat else (heat - heat.min()) / spread
    smooth = np.asarray(Image.fromarray(heat).resize((size, size), Image.Resampling.BILINEAR)).clip(0, 1)
    colour = matplotlib.colormaps["YlOrRd"](0.15 + 0.85 * smooth)[..., :3] * 255
    alpha = 0.85 * smooth[..., None] ** 0.8
    picture = Image.fromarray((base * (1 - alpha) + colour * alpha).round().astype(np.uint8))
    if not flat:
        _ring(picture, heat)
    return _in_shape(picture, photo, size)


def _ring(picture: Image.Image, heat: np.ndarray) -> None:
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    height, width = picture.height / heat.shape[0], picture.width / heat.shape[1]
    box = [column * width, row * height, (column + 1) * width - 1, (row + 1) * height - 1]
    draw = ImageDraw.Draw(picture)
    draw.rectangle(box, outline=PAPER, width=4)
    draw.rectangle([box[0] + 1, box[1] + 1, box[2] - 1, box[3] - 1], outline=INK, width=2)


def _in_shape(square: Image.Image, photo: Image.Image, size: int) -> Image.Image:
    """What was drawn on the square that the model sees, back in the photo's own shape."""
    scale = size / max(photo.size)
    shape = tuple(max(1, round(side * scale)) for side in photo.size)
    return enlarge(square.resize(shape, Image.Resampling.LANCZOS), size)


def hidden_photo(explanation: Explanation, size: int = PHOTO) -> Image.Image:
    """The photo with the patches dimmed that SyncMask would hide."""
    return _in_shape(masked_photo(explanation.photo, explanation.masks.patches, size), explanation.photo, size)


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
        _beside(_overview(explanation, size), GAP),
        *_word_rows(explanation, places, width, size if word is not None else size // 2 - 10),
        paragraph([(KEY, "unseen")], width, font(14)),
    ]
    return _stacked(parts, width)


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
    return [_beside(cells[start : start + fit], GAP) for start in range(0, len(cells), fit)]


def _word_cell(explanation: Explanation, place: int, size: int) -> Image.Image:
    """A word in its shade, its support, and its heatmaps side by side."""
    maps = [(name, heat_photo(explanation.photo, every[place], size)) for name, every in kinds(explanation)]
    photos = _beside([_panel(name, picture, [], font(12)) for name, picture in maps], 8)
    name = [(explanation.words[place], shades(explanation)[place]), (f"  {explanation.support[place]:+.2f}", "unseen")]
    return _over([paragraph(name, photos.width, font(16, bold=True)), photos], 4)


def _panel(title: str, picture: Image.Image, below: Sequence[Image.Image], face=None) -> Image.Image:
    ImageDraw.Draw(picture).rectangle([0, 0, picture.width - 1, picture.height - 1], outline=FRAME)
    head = paragraph([(title, (None, GREY if face else INK))], picture.width, face or font(14, bold=True))
    return _over([head, picture, *below], 6)


def _over(parts: Sequence[Image.Image], gap: int) -> Image.Image:
    size = max(part.width for part in parts), sum(part.height + gap for part in parts) - gap
    sheet, y = Image.new("RGB", size, PAPER), 0
    for part in parts:
        sheet.paste(part, (0, y))
        y += part.height + gap
    return sheet


def _beside(parts: Sequence[Image.Image], gap: int) -> Image.Image:
    size = sum(part.width + gap for part in parts) - gap, max(part.height for part in parts)
    sheet, x = Image.new("RGB", size, PAPER), 0
    for part in parts:
        sheet.paste(part, (x, 0))
        x += part.width + gap
    return sheet


def _stacked(parts: Sequence[Image.Image], width: int) -> Image.Image:
    body = _over(parts, GAP)
    sheet = Image.new("RGB", (2 * MARGIN + width, 2 * MARGIN + body.height), PAPER)
    sheet.paste(body, (MARGIN, MARGIN))
    return sheet
