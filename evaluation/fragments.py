"""Fragments of HTML that stand alone: escaped text, images inside the page, tables, masked words, no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from PIL import Image

from .figures import Hit, MaskedPhoto, Search, enlarge, legend, masked_photo, word_styles
from .result import NOTE, Result, cell, counts, pivot
from .typeset import STYLES

STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: #fff; color: #1b1b1b;
  font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; } p { margin: .4rem 0; max-width: 46rem; }
.note { color: #5c5c5c; font-size: .9rem; }
img { max-width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: .5rem 0; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
td.figure { white-space: nowrap; font-variant-numeric: tabular-nums; }
.interval { color: #5c5c5c; font-size: .85em; font-weight: 400; }
table.findings td:nth-child(2) { font-weight: 700; white-space: nowrap; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 1rem 1.5rem;
  border-bottom: 1px solid #ddd; padding: 1rem 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1rem; }
.results { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); gap: .6rem;
  margin: .4rem 0 1.4rem; }
figure { margin: 0; } figure b { display: block; margin-bottom: .3rem; }
figcaption { font-size: .9rem; margin-top: .3rem; }
.row img { width: 100%; max-width: 18rem; } .results img { width: 100%; }
.hit { border: 1px solid #c4c4c4; padding: 4px; } .hit.is-right { border: 4px solid #1a7f37; padding: 1px; }
.is-right figcaption { color: #1a7f37; font-weight: 700; }
mark { padding: 0 .15em; border-radius: .15em; } mark.unseen { padding: 0; }
""" + "".join(
    f"mark.{style} {{ background: {ground or 'none'}; color: {ink}; }}\n" for style, (ground, ink) in STYLES.items()
)


def page(title: str, sections: Iterable[tuple[str, str]]) -> str:
    """A whole page from (heading, fragment) pairs; empty fragments are left out with their headings."""
    body = "\n".join(f"<section>\n<h2>{escape(head)}</h2>\n{part}\n</section>" for head, part in sections if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def image(picture: Image.Image, alt: str, *, photo: bool = False) -> str:
    """An <img> with its bytes inside: JPEG for photos, PNG for drawings."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(
        buffer, "JPEG" if photo else "PNG", **({"quality": 88} if photo else {"optimize": True})
    )
    kind, data = ("jpeg" if photo else "png"), base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img alt="{escape(alt)}" width="{picture.width}" height="{picture.height}" '
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
    known = any(pair.visible is not None for pair in pairs)
    key = " &nbsp; ".join(f'<mark class="{style}">word</mark> {meaning}' for style, meaning in legend(known).items())
    return f'<p class="note">{key}</p>\n' + "\n".join(_mask_row(pair) for pair in pairs)


def _mask_row(pair: MaskedPhoto) -> str:
    nothing = np.zeros(0, dtype=bool)
    views = [("photo and text", enlarge(pair.photo), nothing)]
    views += [(masks.name, masked_photo(pair.photo, masks.patches), masks.words) for masks in pair.masks]
    figures = [
        f"<figure><b>{escape(name)}</b>{image(picture, name, photo=True)}"
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
    return f'<div class="row">{"".join(figures)}</div>' if figures else ""


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


def pictures(images: Iterable[str]) -> str:
    """Images side by side, below each other where the window is narrow."""
    parts = "".join(f"<div>{one}</div>" for one in images)
    return f'<div class="plots">{parts}</div>' if parts else ""


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
        body += f"<tr><td>{escape(name.replace('_', ' '))}</td>{cells}<td>{counts(row)}</td></tr>"
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _with_interval(text: str) -> str:
    value, bracket, interval = text.partition(" [")
    return f'{value} <span class="interval">[{interval}</span>' if bracket else value
