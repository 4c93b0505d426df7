"""The hardest mistakes of retrieval, and whether they are mistakes: another item's text can be true of a photo.

The pure half takes features and ids; verdicts need a corpus with ground truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from syncmask.processing.corpus import CorpusIndex
from syncmask.processing.garments import ATTRIBUTES, GarmentTruth

from . import fragments
from .embedding import photos
from .figures import beside, enlarge, framed, over
from .parts import Part
from .ranking import Direction
from .typeset import GREEN, INK, ORANGE, PAPER, font, paragraph

TITLE = "The hardest mistakes"
WAYS = {"text_to_image": "text finds a photo", "image_to_text": "photo finds its text"}
SHOWN = 4
VERDICTS = {
    True: "false negative: the text is true of this photo too",
    False: "true mistake",
    None: "no ground truth here",
}


@dataclass(frozen=True)
class Confusion:
    """A query whose first hit is another item.

    Attributes:
        query: position of the query.
        hit: gallery position of the first hit.
        own: gallery position of the best right one.
        margin: cosine of the hit less that of the own one; above 0.
    """

    query: int
    hit: int
    own: int
    margin: float


@dataclass(frozen=True)
class Shown:
    """A confusion as it is drawn: the text, the photo that was confused with it, the photo that is its own.

    `why`: what text and photo say of the same attribute, where they contradict each other.
    """

    way: str
    text: str
    photo: Image.Image
    own: Image.Image
    margin: float
    verdict: bool | None
    why: Sequence[str] = ()


@dataclass(frozen=True)
class Counts:
    """Of one way of searching: queries, mistakes among them, false negatives among the mistakes (None = unknown)."""

    queries: int
    mistakes: int
    false_negatives: int | None


def confusions(way: Direction) -> list[Confusion]:
    """All queries whose first hit is wrong, by the largest margin first; a tie is no mistake."""
    found = []
    for rows, scores in way.chunks(np.arange(len(way.queries))):
        right = way.relevant[""](rows)
        wrong_scores, right_scores = np.where(right, -np.inf, scores), np.where(right, scores, -np.inf)
        hits, owns = wrong_scores.argmax(axis=1), right_scores.argmax(axis=1)
        margins = wrong_scores.max(axis=1) - right_scores.max(axis=1)
        found += [
            Confusion(int(rows[place]), int(hits[place]), int(owns[place]), float(margins[place]))
            for place in np.flatnonzero(margins > 0)
        ]
    return sorted(found, key=lambda one: (-one.margin, one.query))


def contradictions(truth: GarmentTruth, photo_row: int, text_row: int) -> list[str]:
    """What a photo shows against what a text claims, such as "sleeve: the text says puff, the photo shows long"."""
    found = []
    for place, (name, values) in enumerate(ATTRIBUTES.items()):
        shown, said = (list(values)[truth.values[row, place]] for row in (photo_row, text_row))
        if truth.revealed[photo_row, place] and truth.claimed[text_row, place] and shown != said:
            found.append(f"{name.replace('_', ' ')}: the text says {said}, the photo shows {shown}")
    return found


def find_confusions(
    image_feats: np.ndarray, text_feats: np.ndarray, dataset, index: CorpusIndex, count: int = SHOWN
) -> tuple[list[Shown], dict[str, Counts]]:
    """The hardest confusions of both ways, and how often there is one.

    Args:
        image_feats: (rows, D) unit length.
        text_feats: (texts, D) unit length, by text id.
        dataset: the gallery's rows.
        index: its `CorpusIndex`.
        count: how many of each way are shown, of different items.
    """
    truth = GarmentTruth.from_dataset(dataset) if "claimed" in dataset.column_names else None
    first_row = np.unique(index.text_ids, return_index=True)[1]
    # Own = of the same item or with an equal text, as `items` reads duplicates.
    own = (index.text_ids[:, None] == np.arange(len(index.texts))) | (
        index.item_ids[:, None] == index.item_of_text[None, :]
    )
    ways = {
        "text_to_image": Direction(text_feats, image_feats, {"": lambda rows: own.T[rows]}),
        "image_to_text": Direction(image_feats, text_feats, {"": lambda rows: own[rows]}),
    }
    shown, counts = [], {}
    for name, way in ways.items():
        found = confusions(way)
        # (photo, text, its own photo) of each: a photo's first hit is a text, whose own photo is its item's first.
        if name == "text_to_image":
            parts = [(one.hit, first_row[one.query], one.own) for one in found]
        else:
            parts = [(one.query, first_row[one.hit], first_row[one.hit]) for one in found]
        verdicts = [None if truth is None else bool(truth.text_true_of_photo(p, t)) for p, t, _ in parts]
        counts[name] = Counts(len(way.queries), len(found), None if truth is None else sum(verdicts))
        for place in _of_different_items(parts, index.item_ids, count):
            photo, text, other = map(int, parts[place])
            pictures = photos(dataset, np.array([photo, other]))
            why = [] if truth is None else contradictions(truth, photo, text)
            words = index.texts[index.text_ids[text]]
            shown.append(Shown(name, words, *pictures, found[place].margin, verdicts[place], why))
    return shown, counts


def _of_different_items(parts: Sequence[tuple[int, int, int]], item_ids: np.ndarray, count: int) -> list[int]:
    """The first places whose photo and text are of items that were not shown yet."""
    taken, places = set(), []
    for place, (photo, text, _) in enumerate(parts):
        items = {int(item_ids[photo]), int(item_ids[text])}
        if len(places) < count and not items & taken:
            taken |= items
            places.append(place)
    return places


# --------------------------------------------------------------------------------------------------------- the part


def confusion_part(shown: Sequence[Shown], counts: dict[str, Counts]) -> Part:
    """Queries whose first hit is another item, by the largest margin, with a verdict where the truth is known."""
    note = " ".join(_sentence(WAYS[name], of) for name, of in counts.items() if of.queries)
    if not shown:
        return Part(TITLE, missing=f"no query finds another item first ({note})")
    note += " Below those in which the wrong one leads by the most; margin = how much higher its cosine is."
    rows = []
    for name, words in WAYS.items():
        cases = [case for case in shown if case.way == name]
        if cases:
            rows.append(f"<h3>{escape(words.capitalize())}</h3>" + "".join(map(_case, cases)))
    return Part(TITLE, note, "\n".join(rows), {"confusions": confusion_sheet(shown)})


def _sentence(way: str, of: Counts) -> str:
    share = f"{of.mistakes} of {of.queries} queries ({of.mistakes / of.queries:.0%})"
    wrong = f"{way.capitalize()}: {share} find another item first"
    if of.false_negatives is None:
        return f"{wrong}; how many of these are no mistakes cannot be told, as this corpus has no ground truth."
    if not of.mistakes:
        return f"{wrong}."
    false = of.false_negatives / of.mistakes
    known = f"{1 - false:.0%} of these are true mistakes, {false:.0%} false negatives"
    return f"{wrong}; {known} (the text is true of that photo too)."


def labels(way: str) -> tuple[str, str]:
    """What the two photos of a confusion are."""
    if way == "text_to_image":
        return "found first", "its own photo"
    return "this photo found the text", "a photo of the text's item"


def _case(case: Shown) -> str:
    colour = " good" if case.verdict else ""
    why = "".join(f"<br>{escape(line)}" for line in case.why)
    verdict = f'<p><span class="verdict{colour}">{VERDICTS[case.verdict]}</span>{why}</p>'
    words = f'<div><p>{escape(case.text)}</p>{verdict}<p class="note">margin {case.margin:.2f}</p></div>'
    figures = [
        f"<figure>{fragments.image(enlarge(photo, 200), name, photo=True)}<figcaption>{name}</figcaption></figure>"
        for photo, name in zip((case.photo, case.own), labels(case.way))
    ]
    return f'<div class="case">{words}{"".join(figures)}</div>'


def confusion_sheet(shown: Sequence[Shown], size: int = 150, most: int = 2) -> Image.Image:
    """A row a confusion, at most `most` of each way: the text and the verdict, the two photos."""
    rows = []
    for case in [case for way in WAYS for case in [one for one in shown if one.way == way][:most]]:
        colour = INK if case.verdict is None else GREEN if case.verdict else ORANGE
        words = over(
            [
                paragraph([(case.text, "plain")], 520, font(14)),
                paragraph([(VERDICTS[case.verdict], (None, colour))], 520, font(15, bold=True)),
                *(paragraph([(line, "plain")], 520, font(13)) for line in case.why),
                paragraph([(f"margin {case.margin:.2f}", "unseen")], 520, font(13)),
            ],
            6,
        )
        pictures = [
            over([paragraph([(name, "plain")], size, font(12)), enlarge(photo, size)], 4)
            for photo, name in zip((case.photo, case.own), labels(case.way))
        ]
        rows.append(beside([words, *pictures, Image.new("RGB", (1, 1), PAPER)], 20))
    return framed(over(rows, 24))
