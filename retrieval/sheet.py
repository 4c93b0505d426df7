"""Search results as a contact sheet: a picture, or a page of its own that needs no other file."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw

from syncmask.evaluation.figures import enlarge
from syncmask.evaluation.typeset import FRAME, PAPER, font, paragraph

from .encoder import Photo
from .search import Hit, Ranking

SIZE, GAP, MARGIN, COLUMNS = 190, 16, 24, 5
STYLE = """
body { font: 16px/1.45 "DejaVu Sans", sans-serif; color: #1b1b1b; background: #fff; margin: 2rem; }
ol { list-style: none; padding: 0; display: grid; gap: 1.2rem; }
ol { grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); }
li { border: 1px solid #c4c4c4; padding: .7rem; } img { max-width: 100%; height: auto; }
.photos { display: flex; gap: .3rem; flex-wrap: wrap; } .photos img:not(:first-child) { max-width: 30%; }
.scores { font-variant-numeric: tabular-nums; } .scores, .notes { color: #5c5c5c; }
dl { font-size: .85rem; margin: .5rem 0 0; } dt { float: left; margin-right: .4rem; color: #5c5c5c; } dd { margin: 0; }
"""


def save_sheet(path: str | Path, ranking: Ranking, text: str | None = None, image: Photo | None = None) -> None:
    """Write a contact sheet; the name's end says which kind (.png, .jpg or .html).

    Raises:
        ValueError: another ending.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".html":
        path.write_text(html_sheet(ranking, text, image), encoding="utf-8")
    elif path.suffix.lower() in (".png", ".jpg", ".jpeg"):
        picture_sheet(ranking, text, image).save(path)
    else:
        raise ValueError(f"a contact sheet is a .png, .jpg or .html file; {path.name!r} is none of them.")


def picture_sheet(ranking: Ranking, text: str | None = None, image: Photo | None = None) -> Image.Image:
    """The query on top, then the best photo of each hit with its scores and text, in rows of five."""
    width = 2 * MARGIN + COLUMNS * (SIZE + GAP) - GAP
    blocks = [_question(text, image, width - 2 * MARGIN)]
    cells = [_cell(place, hit) for place, hit in enumerate(ranking, 1)]
    blocks += [_row(cells[start : start + COLUMNS], width) for start in range(0, len(cells), COLUMNS)]
    blocks += [paragraph([(note, "plain")], width - 2 * MARGIN, font(13)) for note in ranking.notes]
    sheet = Image.new("RGB", (width, 2 * MARGIN + sum(block.height + GAP for block in blocks) - GAP), PAPER)
    top = MARGIN
    for block in blocks:
        sheet.paste(block, (MARGIN, top))
        top += block.height + GAP
    return sheet


def _question(text: str | None, image: Photo | None, width: int) -> Image.Image:
    words = paragraph(
        [(text or "this photo", "plain")], width - (SIZE + GAP if image is not None else 0), font(20, True)
    )
    if image is None:
        return words
    block = Image.new("RGB", (width, max(SIZE, words.height)), PAPER)
    block.paste(enlarge(_opened(image), SIZE), (0, 0))
    block.paste(words, (SIZE + GAP, 0))
    return block


def _row(cells: Sequence[Image.Image], width: int) -> Image.Image:
    row = Image.new("RGB", (width - 2 * MARGIN, max(cell.height for cell in cells)), PAPER)
    for place, cell in enumerate(cells):
        row.paste(cell, (place * (SIZE + GAP), 0))
    return row


def _cell(place: int, hit: Hit) -> Image.Image:
    name = paragraph([(f"{place}. {hit.item_id}", "plain")], SIZE, font(14, True))
    scores = paragraph([(_scores(hit), "unseen")], SIZE, font(13))
    words = paragraph([(_short(hit.text), "plain")], SIZE, font(12))
    cell = Image.new("RGB", (SIZE, SIZE + 6 + name.height + scores.height + words.height), PAPER)
    photo = _photo(hit.photos[0])
    if photo is not None:
        cell.paste(enlarge(photo, SIZE), (0, 0))
    ImageDraw.Draw(cell).rectangle([0, 0, SIZE - 1, SIZE - 1], outline=FRAME)
    top = SIZE + 6
    for block in (name, scores, words):
        cell.paste(block, (0, top))
        top += block.height
    return cell


def _scores(hit: Hit) -> str:
    return f"vector {hit.vector:.3f}" + ("" if hit.matching is None else f", matching {hit.matching:+.2f}")


def _short(text: str, limit: int = 140) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1].rsplit(" ", 1)[0] + " …"


def _opened(image: Photo) -> Image.Image:
    from syncmask.processing.processing_syncmask import open_image, to_rgb

    return to_rgb(open_image(image))


def _photo(photo) -> Image.Image | None:
    """A hit's photo; None where its file is gone, which a sheet shows as an empty frame."""
    try:
        return photo.open()
    except ValueError:
        return None


# -------------------------------------------------------------------------------------------------------------- HTML
def html_sheet(ranking: Ranking, text: str | None = None, image: Photo | None = None) -> str:
    """A page with every photo of each hit, its scores and columns; all words are escaped, photos are inside."""
    asked = f"<p>{_tag(_opened(image), 'the photo searched with')}</p>" if image is not None else ""
    hits = "".join(f"<li>{_html_hit(place, hit)}</li>" for place, hit in enumerate(ranking, 1))
    notes = "".join(f'<p class="notes">{escape(note)}</p>' for note in ranking.notes)
    title = escape(text or "search by photo")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"</head><body><h1>{title}</h1>{asked}{notes}<ol>{hits}</ol></body></html>\n"
    )


def _html_hit(place: int, hit: Hit) -> str:
    photos = [(photo.photo_id, _photo(photo)) for photo in hit.photos]
    pictures = "".join(_tag(photo, name) for name, photo in photos if photo is not None) or "<em>no photo</em>"
    columns = "".join(f"<dt>{escape(name)}</dt><dd>{escape(_plain(value))}</dd>" for name, value in hit.columns.items())
    return (
        f'<div class="photos">{pictures}</div><h2>{place}. {escape(hit.item_id)}</h2>'
        f'<p class="scores">{_scores(hit)}</p><p>{escape(hit.text)}</p><dl>{columns}</dl>'
    )


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _tag(photo: Image.Image, name: str) -> str:
    """A photo of at most 320 pixels as a part of the page."""
    photo = photo.copy()
    photo.thumbnail((320, 320))
    buffer = BytesIO()
    photo.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(name)}" src="data:image/jpeg;base64,{data}">'
