"""The corpus at a glance: how many photos and items, how many photos an item, how long texts are, what is in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from syncmask.processing.processing_syncmask import split_words

from . import fragments
from .figures import beside, enlarge, framed, over
from .parts import Part
from .plots import bars, histogram
from .typeset import font, paragraph

TITLE = "The corpus"
CATEGORIES = 12


@dataclass(frozen=True)
class Glance:
    """Counts over a corpus.

    Attributes:
        splits: (photos, items) by split.
        photos_an_item: (items,) of all splits.
        words_a_text: (photos,) of all splits.
        texts: distinct texts.
        categories: photos by category, the commonest first; empty without such a column.
    """

    splits: Mapping[str, tuple[int, int]]
    photos_an_item: np.ndarray
    words_a_text: np.ndarray
    texts: int
    categories: Mapping[str, int] = field(default_factory=dict)


def glance(splits: Mapping) -> Glance:
    """Counts of the splits of `load_corpus`; no photo is opened."""
    items = {name: Counter(rows["item_id"]) for name, rows in splits.items() if len(rows)}
    texts = Counter(text for rows in splits.values() for text in rows["text"])
    lengths = {text: len(split_words(text)) for text in texts}
    kinds = Counter(
        str(kind)  # a column of class numbers, 0 among them, is one of categories too
        for rows in splits.values()
        if "category" in rows.column_names
        for kind in rows["category"]
        if kind not in (None, "")
    )
    return Glance(
        splits={name: (sum(count.values()), len(count)) for name, count in items.items()},
        photos_an_item=np.array([number for count in items.values() for number in count.values()]),
        words_a_text=np.repeat([lengths[text] for text in texts], list(texts.values())),
        texts=len(texts),
        categories=dict(kinds.most_common()),
    )


def glance_part(found: Glance, samples: Sequence[tuple[Image.Image, str]], triplets: bool = False) -> Part:
    """Counts, distributions, and samples with photos and texts."""
    rows = [(name, f"{photos:,}", f"{items:,}") for name, (photos, items) in found.splits.items()]
    photos = sum(count for count, _ in found.splits.values())
    rows.append(("all", f"{photos:,}", f"{sum(count for _, count in found.splits.values()):,}"))
    what = (
        "triplets (a photo, a text of what should differ, the photo wanted)" if triplets else "photos with their texts"
    )
    note = (
        f"{photos:,} {what}, {found.texts:,} different texts. All photos of an item are in one split, so the items of "
        "validation and test were never seen in training."
    )
    counted = "triplets" if triplets else "photos"
    drawn = [
        (histogram(f"{counted.capitalize()} an item", found.photos_an_item, counted, "items"), f"{counted} an item"),
        (histogram("Words a text", found.words_a_text, "words", counted), "words a text"),
    ]
    if found.categories:
        shown = dict(list(found.categories.items())[:CATEGORIES])
        rest = len(found.categories) - len(shown)
        title = "Categories" + (f" (the commonest, {rest} more not shown)" if rest else "")
        told = ", ".join(f"{name} {count}" for name, count in shown.items())
        drawn.append((bars(title, shown, counted, "{:,.0f}".format), f"{counted} by category: {told}"))
    body = fragments.table(rows, ("split", counted, "items"))
    body += fragments.pictures(fragments.image(picture, alt) for picture, alt in drawn) + fragments.sample_rows(samples)
    return Part(TITLE, note, body, {"corpus": sample_sheet(samples)} if samples else {})


def sample_sheet(samples: Sequence[tuple[Image.Image, str]], size: int = 200, columns: int = 3) -> Image.Image:
    """Photos over their texts, for a slide."""
    cells = [over([enlarge(photo, size), paragraph([(text, "plain")], size, font(12))], 6) for photo, text in samples]
    return framed(over([beside(cells[start : start + columns], 20) for start in range(0, len(cells), columns)], 20))
