"""An `Explanation` as HTML: fragments for any page, and one page that stands alone. Every text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from syncmask.evaluation import fragments
from syncmask.evaluation.figures import PHOTO, enlarge
from syncmask.evaluation.heat import heat_photo

from .explain import Explanation
from .explain_figures import (
    KEY,
    chosen_words,
    explanation_sheet,
    hidden_photo,
    kinds,
    shades,
    support_key,
    support_pieces,
    verdict,
)

SMALL = 150
PAGES = (".html", ".htm")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def write_explanation(explanation: Explanation, path: str | Path, word: str | None = None) -> Path:
    """Writes a picture (.png, .jpg, .webp) or a page (.html), by the ending of `path`.

    Args:
        explanation: of `explain`.
        path: where to; missing folders are made.
        word: its maps alone; on a picture the best supported words when None, on a page all of them.

    Raises:
        ValueError: another ending, or a word that the text does not have.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in (*PAGES, *PICTURES):
        raise ValueError(f"{path.name} ends in {ending or 'nothing'!r}; give one of {', '.join((*PICTURES, *PAGES))}")
    content = explanation_page(explanation, word) if ending in PAGES else explanation_sheet(explanation, word)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        content.save(path)
    return path


def explanation_page(explanation: Explanation, word: str | None = None) -> str:
    """One HTML file with its pictures inside: no script, no address of another host.

    Raises:
        ValueError: the text has no such word.
    """
    places = range(len(explanation.words)) if word is None else chosen_words(explanation, word)
    sections = [
        (verdict(explanation), overview(explanation)),
        ("Where each word looks", f'<p class="note">{escape(KEY)}</p>{word_cells(explanation, places)}'),
    ]
    return fragments.page("Why this photo and this text", sections)


def coloured_words(explanation: Explanation) -> str:
    """The text with each word in its shade, a key to the colours, and how they were measured."""
    text = "".join(
        escape(piece) if isinstance(style, str) else _mark(piece, style) for piece, style in support_pieces(explanation)
    )
    key = " ".join(_mark(name, shade) for name, shade in support_key(explanation.support_kind))
    return f'<p>{text}</p><p class="note">{key}</p><p class="note">{escape(explanation.support_note)}</p>'


def word_cells(explanation: Explanation, places: Sequence[int], size: int = SMALL) -> str:
    """A figure a word: the word in its shade, its support, its heatmaps side by side."""
    style = f"display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min({2 * size + 10}px,100%),1fr))"
    return f'<div style="{style}">{"".join(_word_cell(explanation, place, size) for place in places)}</div>'


def overview(explanation: Explanation) -> str:
    """A row of figures: the photo over its coloured text, the mean map of each kind, the masks on both."""
    figures = [_figure("photo and text", enlarge(explanation.photo, PHOTO), coloured_words(explanation))]
    for name, maps in kinds(explanation):
        figures.append(_figure(f"{name}, all words", heat_photo(explanation.photo, maps.mean(axis=0))))
    masked = fragments.words(explanation.text, explanation.masks.words)
    figures.append(_figure(explanation.masks.name, hidden_photo(explanation), masked))
    return f'<div class="row">{"".join(figures)}</div>'


def _word_cell(explanation: Explanation, place: int, size: int) -> str:
    word = explanation.words[place]
    maps = "".join(
        f'<div style="flex:1">{fragments.image(heat_photo(explanation.photo, every[place], size), name, photo=True)}'
        f'<span class="note">{escape(name)}</span></div>'
        for name, every in kinds(explanation)
    )
    head = f"{_mark(word, shades(explanation)[place])} {explanation.support[place]:+.2f}"
    return f'<figure><b>{head}</b><div style="display:flex;gap:6px">{maps}</div></figure>'


def _figure(title: str, picture, caption: str = "") -> str:
    """A picture under its title; `caption` is HTML already."""
    body = fragments.image(picture, title, photo=True)
    return f"<figure><b>{escape(title)}</b>{body}<figcaption>{caption}</figcaption></figure>"


def _mark(word: str, shade: tuple[str, str]) -> str:
    ground, ink = shade
    return f'<mark style="background:{ground};color:{ink}">{escape(word)}</mark>'
