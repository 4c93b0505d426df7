"""Pictures of the finetuned heads at work: composed searches, and which labels are taken for which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from . import fragments
from .composed import distinct_photos, query_encoder
from .embedding import Embedder, photos
from .figures import Hit, Search, beside, enlarge, framed, over, retrieval_sheet
from .metrics import ranks
from .parts import Part
from .plots import heat_table
from .recognition import head_scorers
from .typeset import font, paragraph

COMMON = 10  # labels of a table, the others together
MISTAKES = 8
SIDES = {"fused": "photo and text", "image_only": "photo alone"}
REST = "all others"


# -------------------------------------------------------------------------------------------------------- composed


def composed_searches(
    model,
    processor,
    triplets,
    *,
    count: int = 6,
    hits: int = 5,
    max_rows: int = 1500,
    batch_size: int = 128,
    seed: int = 0,
) -> tuple[list[Search], int]:
    """A seeded sample of triplets, each with the photos nearest to photo and text together, and the gallery's size.

    Args:
        model: a `SyncMaskForComposedImageRetrieval` in eval mode.
        processor: its `SyncMaskProcessor`.
        triplets: rows with image, item_id, candidate, candidate_id, text.
        count: how many.
        hits: how many photos each.
        max_rows: triplets whose photos are the gallery, at most (the first ones).
        batch_size: of the passes.
        seed: of the sample.
    """
    triplets = triplets.select(range(min(max_rows, len(triplets))))
    gallery, reference_at = distinct_photos(triplets)
    items = np.asarray(gallery["item_id"], dtype=str)
    feats = Embedder(model, processor, gallery, batch_size=batch_size).image_feats()
    asked = np.random.default_rng(seed).choice(len(triplets), size=min(count, len(triplets)), replace=False)
    references, chosen = photos(gallery, reference_at[asked]), triplets.select(asked.tolist())
    scores = query_encoder(model, processor)(references, list(chosen["text"])) @ feats.T
    right = np.asarray(chosen["item_id"], dtype=str)[:, None] == items
    best = np.argsort(-scores, axis=1, kind="stable")[:, :hits]
    searches = [
        Search(
            text=text,
            photo=reference,
            rank=int(rank),
            hits=[
                Hit(float(scores[place, row]), bool(right[place, row]), photo)
                for row, photo in zip(best[place], photos(gallery, best[place]))
            ],
        )
        for place, (text, reference, rank) in enumerate(zip(chosen["text"], references, ranks(scores, right)))
    ]
    return searches, len(gallery)


def composed_part(searches: Sequence[Search], gallery: int) -> Part:
    """Reference photo and text, then what was found; the wanted photo is framed."""
    note = (
        f"The photo and the words together search {gallery:,} photos that were not trained on, the reference photo "
        "among them. The wanted one is framed green; numbers are cosines. By chance it would stand at rank "
        f"{gallery / 2:,.0f}."
    )
    body = fragments.search_rows(searches)
    return Part("Finding a photo by a photo and words", note, body, {"composed": retrieval_sheet(searches, note)})


# -------------------------------------------------------------------------------------------------- classification


@dataclass(frozen=True)
class Mistake:
    """A photo that was given a wrong label, and how sure the model was of it."""

    photo: Image.Image
    text: str
    true: str
    predicted: str
    sure: float


@dataclass(frozen=True)
class Recognised:
    """One label column: true and predicted labels (rows,) by side, and the most confident mistakes of one side."""

    column: str
    true: Sequence[str]
    predicted: Mapping[str, Sequence[str]]
    mistakes: Sequence[Mistake]
    mistaken_side: str


def recognise(
    model, processor, dataset, column: str, *, max_rows: int = 1500, count: int = MISTAKES
) -> Recognised | None:
    """Labels of unseen rows by a classification head; None where no row has one.

    Mistakes are those by photo and text, or by the photo alone where that makes none.

    Args:
        model: a `SyncMaskForImageTextClassification` in eval mode.
        processor: its `SyncMaskProcessor`.
        dataset: rows with the column.
        column: of `config.label_sets`.
        max_rows: labelled rows, at most (the first ones).
        count: mistakes, at most.
    """
    labels = list(model.config.label_sets[column])
    known = column in dataset.column_names
    labelled = [row for row, label in enumerate(dataset[column]) if label][:max_rows] if known else []
    if not labelled:
        return None
    rows = dataset.select(labelled)
    true, scorers = rows[column], head_scorers(model, processor, column)
    shares = {side: _softmax(scorers[side](rows)) for side in SIDES}
    predicted = {side: [labels[place] for place in share.argmax(axis=1)] for side, share in shares.items()}
    side = "fused" if predicted["fused"] != list(true) else "image_only"
    wrong = [row for row in range(len(rows)) if predicted[side][row] != true[row]]
    sure = shares[side].max(axis=1)
    wrong = sorted(wrong, key=lambda row: -sure[row])[:count]
    pictures = photos(rows, np.array(wrong)) if wrong else []
    mistakes = [
        Mistake(photo, rows[row]["text"], true[row], predicted[side][row], float(sure[row]))
        for row, photo in zip(wrong, pictures)
    ]
    return Recognised(column, true, predicted, mistakes, side)


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def confusion_table(true: Sequence[str], predicted: Sequence[str], most: int = COMMON) -> tuple[np.ndarray, list[str]]:
    """Counts (L, L) of predicted (columns) by true labels (rows): the commonest true ones, the others together.

    Example: `confusion_table(["a", "a", "b"], ["a", "b", "b"])[0].tolist()` is `[[1, 1], [0, 1]]`.
    """
    common = [label for label, _ in Counter(true).most_common(most)]
    rest = set(true) | set(predicted)
    names = common + ([REST] if rest - set(common) else [])
    number = {name: place for place, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)), dtype=int)
    for one, other in zip(true, predicted):
        counts[number.get(one, len(names) - 1), number.get(other, len(names) - 1)] += 1
    return counts, names


def recognition_part(found: Recognised) -> Part:
    """Tables of true against predicted labels by both sides, then the most confident mistakes."""
    commonest, times = Counter(found.true).most_common(1)[0]
    total, tables = len(found.true), []
    shares = {side: np.mean([a == b for a, b in zip(found.true, found.predicted[side])]) for side in SIDES}
    for side, name in SIDES.items():
        counts, names = confusion_table(found.true, found.predicted[side])
        title = f"{found.column} by {name}: {shares[side]:.1%} right"
        tables.append((heat_table(title, counts, names, names, ("predicted", "true")), title))
    note = (
        f"{total:,} photos that were not trained on; rows are true labels, shades are shares of a row, so a model "
        f"without mistakes has a dark diagonal. Always saying {commonest!r} would be right in {times / total:.1%}."
    )
    body = fragments.pictures(fragments.image(picture, alt) for picture, alt in tables)
    if found.mistakes:
        body += f"<h3>The most confident mistakes by {SIDES[found.mistaken_side]}</h3>" + _mistakes(found.mistakes)
    pictures = {f"labels_{found.column}": beside([picture for picture, _ in tables], 20)}
    if found.mistakes:
        pictures[f"mistakes_{found.column}"] = _mistake_sheet(found.mistakes)
    return Part(f"Recognising the {found.column}", note, body, pictures)


def _mistakes(mistakes: Sequence[Mistake]) -> str:
    figures = [
        f"<figure>{fragments.image(enlarge(one.photo, 200), f'{one.true} taken for {one.predicted}', photo=True)}"
        f"<figcaption><b>{escape(one.predicted)}</b>true: {escape(one.true)}; {one.sure:.0%} sure"
        f'<br><span class="note">{escape(one.text)}</span></figcaption></figure>'
        for one in mistakes
    ]
    return f'<div class="samples">{"".join(figures)}</div>'


def _mistake_sheet(mistakes: Sequence[Mistake], size: int = 180) -> Image.Image:
    cells = []
    for one in mistakes:
        words = [(one.predicted, "hidden"), (f" true: {one.true}; {one.sure:.0%} sure", "plain")]
        cells.append(over([enlarge(one.photo, size), paragraph(words, size, font(13))], 6))
    return framed(over([beside(cells[start : start + 4], 20) for start in range(0, len(cells), 4)], 20))
