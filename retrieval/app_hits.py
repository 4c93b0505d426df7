"""What the page shows, made of plain data: hits for a gallery, the reasons for one of them as HTML. No Gradio here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

from syncmask.evaluation.figures import enlarge
from syncmask.evaluation.fragments import image
from syncmask.evaluation.typeset import FRAME

from .catalogue import Catalogue
from .encoder import Encoder
from .explain import Explanation, explain
from .explain_figures import KEY, chosen_words, verdict
from .explain_page import overview, word_cells
from .filters import filterable
from .search import Hit, Ranking

THUMBNAIL, STRIP = 360, 96
OPTIONS = 30  # values of a column that are offered as filters
OTHERS = 3  # photos that a word's evidence is measured against
WORDS = 60  # of a text under a photo


@dataclass
class Found:
    """An answer: its ranking and the words that were searched for."""

    ranking: Ranking
    words: str


def find(
    catalogue: Catalogue, words: str, photo: Image.Image | None, conditions: Sequence[str], k: int, rerank: bool
) -> Found:
    """Searches by words, a photo or both.

    Args:
        catalogue: that is searched.
        words: may be empty.
        photo: may be None.
        conditions: "column=value" and the like; all must hold.
        k: items.
        rerank: whether the matching head orders them; not for a photo with words, which it cannot judge.

    Raises:
        ValueError: nothing to search for, an unknown column, a model of another revision.
    """
    words = (words or "").strip()
    again = 2 * int(k) if rerank and not (words and photo is not None) else 0
    ranking = catalogue.search(
        text=words or None, image=photo, filter=list(conditions or ()) or None, k=int(k), rerank=again
    )
    return Found(ranking, words)


def filter_options(catalogue: Catalogue) -> list[str]:
    """Conditions to choose from: every value of each further column that has few, as "column=value"."""
    snapshot, options = catalogue.snapshot(), []
    for name in (name for name in filterable(snapshot.schema) if name in snapshot.columns):
        values = snapshot.table.search().select([name]).to_arrow()[name].unique().drop_null().to_pylist()
        if 1 < len(values) <= OPTIONS:
            options += [f"{name}={value}" for value in sorted(values, key=str)]
    return options


def summary(found: Found) -> str:
    """How many items, and what the searcher should know, as HTML."""
    count = len(found.ranking)
    notes = "".join(f" · {escape(note)}" for note in found.ranking.notes)
    return f"{count} item{'' if count == 1 else 's'}{notes}" + (" · click one to see why" if count else "")


def problem(error: Exception) -> str:
    """What is wrong and how to mend it, as HTML."""
    return f'<span class="error">{escape(str(error))}</span>'


def gallery(found: Found) -> list[tuple[Image.Image, str]]:
    """Each item's best photo over its place, scores and the beginning of its text (plain text, not HTML)."""
    return [(thumbnail(hit), _caption(place, hit)) for place, hit in enumerate(found.ranking, 1)]


def thumbnail(hit: Hit) -> Image.Image:
    """A hit's best photo; a grey square where it can no longer be read."""
    try:
        return enlarge(hit.photos[0].open(), THUMBNAIL)
    except ValueError:
        return Image.new("RGB", (THUMBNAIL, THUMBNAIL), FRAME)


def _caption(place: int, hit: Hit) -> str:
    scores = f"{hit.vector:.2f}" + ("" if hit.matching is None else f" / {hit.matching:+.1f}")
    text = hit.text or hit.item_id
    return f"{place}.  {scores}  {text[:WORDS]}{'…' if len(text) > WORDS else ''}"


def why(encoder: Encoder, found: Found, place: int, own_text: bool) -> Explanation:
    """Explains the hit at `place` by the words that were searched for, or by the item's own text.

    Raises:
        ValueError: neither has a word, the photo cannot be read, or the model has no matching head.
    """
    hit = found.ranking[place]
    text = hit.text if own_text or not found.words else found.words
    if not text.strip():
        raise ValueError(f"item {hit.item_id} has no text, and no words were searched for: there is nothing to explain")
    others = [other for other in found.ranking if other.item_id != hit.item_id]
    photos = []
    for other in others:
        try:
            photos += [other.photos[0].open()] if len(photos) < OTHERS else []
        except ValueError:
            continue  # the others are only there to be compared with
    return explain(encoder, hit.photos[0].open(), text, others=photos)


def reasons(hit: Hit, explanation: Explanation, word: str | None = None) -> str:
    """A hit's text, columns and photos, then its explanation, as HTML; every text is escaped.

    Args:
        hit: that was explained.
        explanation: of `why`.
        word: its maps alone; the best supported words when None.
    """
    plain = {name: value for name, value in hit.columns.items() if not isinstance(value, (list, dict, bytes))}
    columns = " · ".join(f"{escape(name)}: {escape(str(value))}" for name, value in plain.items())
    cells = word_cells(explanation, chosen_words(explanation, word), size=264 if word else 150)
    return (
        f'<h3>{escape(hit.item_id)}</h3><p>{escape(hit.text)}</p><p class="note">{columns}</p>{_strip(hit)}'
        f"<h3>{escape(verdict(explanation))}</h3>{overview(explanation)}"
        f'<h3>Where each word looks</h3><p class="note">{escape(KEY)}</p>{cells}'
    )


def _strip(hit: Hit) -> str:
    """All photos of an item, small, where it has several."""
    pictures = []
    for photo in hit.photos if len(hit.photos) > 1 else []:
        try:
            pictures.append(image(enlarge(photo.open(), STRIP), f"{photo.photo_id}: {photo.score:.2f}", photo=True))
        except ValueError:
            continue
    return f'<div class="strip">{"".join(pictures)}</div>'
