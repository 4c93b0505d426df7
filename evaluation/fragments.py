"""Fragments of HTML that stand alone: escaped text, images inside the page, tables, masked words, no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from PIL import Image

from .figures import Hit, MaskedPhoto, Search, enlarge, legend, masked_photo, word_styles
from .plots import Panel, curves
from .result import NOTE, Result, cell, counts, pivot
from .style import STYLE


def page(title: str, sections: Iterable[tuple[str, str]], contents: bool = False) -> str:
    """A whole page from (heading, fragment) pairs; empty fragments are left out with their headings.

    Args:
        title: of the page.
        sections: escaped fragments under plain headings.
        contents: put a table of contents before them.
    """
    kept = [(f"part-{place}", head, part) for place, (head, part) in enumerate(sections, 1) if part]
    body = "\n".join(f'<section id="{name}">\n<h2>{escape(head)}</h2>\n{part}\n</section>' for name, head, part in kept)
    links = "".join(f'<a href="#{name}">{escape(head)}</a>' for name, head, _ in kept) if contents else ""
    links = f'<nav aria-label="contents">{links}</nav>\n' if links else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{links}{body}\n</body>\n</html>\n"
    )


def image(picture: Image.Image, alt: str, *, photo: bool = False) -> str:
    """An <img> with its bytes inside: JPEG for photos, PNG for drawings (light on dark where the reader's page is)."""
    buffer, picture = io.BytesIO(), picture.convert("RGB")
    if photo:
        picture.save(buffer, "JPEG", quality=88)
    else:
        picture.quantize(128, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    kind, data = ("jpeg" if photo else "png"), base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img{"" if photo else " class=drawn"} alt="{escape(alt)}" width="{picture.width}" height="{picture.height}" '
        f'src="data:image/{kind};base64,{data}">'
    )


def words(text: str, hidden: np.ndarray, visible: np.ndarray | None = None) -> str:
    """The text, escaped, with hidden words marked."""
    return "".join(
        escape(piece) if style == "plain" else f'<mark class="{style}">{escape(piece)}</mark>'
        for piece, style in word_styles(text, hidden, visible)
    )


def mask_rows(pairs: Sequence[MaskedPhoto]) -> str:
    """The mask view as HTML: a row a pair, the ways of masking side by side (below each other on a phone)."""
    if not pairs:
        return ""
    return word_key(any(pair.visible is not None for pair in pairs)) + "\n".join(_mask_row(pair) for pair in pairs)


def word_key(known: bool, hidden: bool = False) -> str:
    """What the colours of words mean; `known` = what is visible is known, `hidden` = hidden words alone are shown."""
    meanings = {style: meaning for style, meaning in legend(known).items() if not hidden or style != "unseen"}
    key = " &nbsp; ".join(f'<mark class="{style}">word</mark> {meaning}' for style, meaning in meanings.items())
    return f'<p class="note">{key}</p>\n'


def _mask_row(pair: MaskedPhoto) -> str:
    nothing = np.zeros(0, dtype=bool)
    views = [("photo and text", enlarge(pair.photo), nothing)]
    views += [(masks.name, masked_photo(pair.photo, masks.patches), masks.words) for masks in pair.masks]
    figures = [
        f"<figure><b>{escape(name)}</b>{image(picture, f'{name}: {pair.text}', photo=True)}"
        f"<figcaption>{words(pair.text, hidden, pair.visible)}</figcaption></figure>"
        for name, picture, hidden in views
    ]
    return f'<div class="row">{"".join(figures)}</div>'


def search_rows(searches: Sequence[Search]) -> str:
    """Queries with their best results, right ones framed and named."""
    return "\n".join(_search_row(search) for search in searches)


def _search_row(search: Search) -> str:
    query = f"<h3>{escape(search.text)}</h3>" if search.text else ""
    query += image(enlarge(search.photo, 168), "the query photo", photo=True) if search.photo else ""
    rank = f'<p class="note">first right one: rank {search.rank}</p>' if search.rank is not None else ""
    return f'<div>{query}{rank}<div class="results">{"".join(_hit(hit) for hit in search.hits)}</div></div>'


def _hit(hit: Hit) -> str:
    body = image(enlarge(hit.photo, 168), "a result", photo=True) if hit.photo else f"<p>{escape(hit.text)}</p>"
    name, kind = (f"{hit.score:.2f} right", "hit is-right") if hit.right else (f"{hit.score:.2f}", "hit")
    return f'<figure class="{kind}">{body}<figcaption>{name}</figcaption></figure>'


def sample_rows(samples: Sequence[tuple[Image.Image, str]]) -> str:
    """Photos with their texts."""
    figures = [
        f"<figure>{image(enlarge(photo, 200), 'a photo of the corpus', photo=True)}"
        f"<figcaption>{escape(text)}</figcaption></figure>"
        for photo, text in samples
    ]
    return f'<div class="samples">{"".join(figures)}</div>' if figures else ""


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Plain cells, escaped, in a table that scrolls by itself where a phone is too narrow."""
    top = "<tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr>" if head else ""
    body = "".join("<tr>" + "".join(f"<td>{escape(str(one))}</td>" for one in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table>{top}{body}</table></div>' if rows else ""


def finding_table(rows: Sequence[tuple[str, str, str]]) -> str:
    """(what, "value [interval]" in %, what to read it against) as a table."""
    body = "".join(
        f"<tr><td>{escape(what)}</td><td>{_with_interval(escape(mine))}</td><td>{escape(beside)}</td></tr>"
        for what, mine, beside in rows
    )
    head = "<tr><th></th><th>this model, %</th><th>to compare</th></tr>"
    return f'<div class="scroll"><table class="findings">{head}{body}</table></div>' if rows else ""


def plots(panels: Sequence[Panel]) -> str:
    """Plots side by side, below each other where the window is narrow."""
    return pictures(image(curves([panel]), panel.words) for panel in panels)


def pictures(images: Iterable[str]) -> str:
    """Drawings side by side, below each other where the window is narrow."""
    parts = "".join(f"<div>{one}</div>" for one in images)
    return f'<div class="plots">{parts}</div>' if parts else ""


def folded(summary: str, body: str) -> str:
    """What most readers skip: a line that opens."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>" if body else ""


def result_tables(result: Result | None, quantities: Sequence[str] | None = None) -> str:
    """The tables of a result, or of some of its quantities."""
    if result is None:
        return ""
    chosen = [part for part in pivot(result.metrics) if quantities is None or part[0] in quantities]
    return "\n".join(_quantity(*part) for part in chosen) + (f'<p class="note">{NOTE}</p>' if chosen else "")


def _quantity(quantity: str, rows: dict, figures: list[str]) -> str:
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in [quantity, *figures, "n"])
    body = ""
    for name, row in rows.items():
        cells = "".join(f'<td class="figure">{_with_interval(cell(row.get(figure)))}</td>' for figure in figures)
        body += f"<tr><td>{escape(name.replace('_', ' '))}</td>{cells}<td>{escape(counts(row))}</td></tr>"
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _with_interval(text: str) -> str:
    value, bracket, interval = text.partition(" [")
    return f'{value} <span class="interval">[{interval}</span>' if bracket else value
