"""Composed retrieval: a reference photo and a text of what should differ find the target photo. `fashioniq-*`.

The pure half (`composed_outcomes`) takes features and ids; `fashioniq` feeds it from a reader's triplets and galleries.
The reference photo stays in the gallery, as in all published figures: a model that just returns it gains nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from syncmask.processing.corpus import CorpusIndex
from syncmask.processing.readers_fashioniq import join_captions

from .candidates import Candidates
from .embedding import Embedder, photos
from .metrics import exact
from .outcomes import Measure, Outcomes
from .ranking import Direction, Relevance, every_rank
from .result import Result

KS = (10, 50)
SWAPPED, BOTH_ORDERS = "_swapped", "_both_orders"
GALLERIES = {"fashioniq-original": "original", "fashioniq-val": "val"}

# Photos and texts -> (B, D) unit-length query features, of the space that the photos' features are in.
QueryEncoder = Callable[[list[Image.Image], list[str]], np.ndarray]


@dataclass(frozen=True)
class Queries:
    """Who is asked: reference and target photo by id, the category whose gallery is searched, each (Q,) str."""

    references: np.ndarray
    targets: np.ndarray
    categories: np.ndarray

    @property
    def names(self) -> np.ndarray:
        """(Q,) str, one a query."""
        return np.array([f"{one}>{other}" for one, other in zip(self.references, self.targets)], dtype=str)


@dataclass(frozen=True)
class Gallery:
    """The photos of one category: ids (G,) str, all different, and unit-length features (G, D)."""

    ids: np.ndarray
    feats: np.ndarray


# --------------------------------------------------------------------------------------------------------- pure


def composed_outcomes(
    query_feats: Mapping[str, np.ndarray], queries: Queries, galleries: Mapping[str, Gallery], *, ks: Sequence[int] = KS
) -> Outcomes:
    """Ranks of every query's target in its category's gallery, by score.

    Args:
        query_feats: by score, (Q, D) unit length. A score `X_swapped` (the captions in the other order) beside `X` adds
            `X_both_orders`, the mean of the two.
        queries: Q of them, in any order.
        galleries: by category.
        ks: the k of recall@k.

    Returns:
        Outcomes with `dress/recall@10/composed` ..., `all/recall@10/composed` (mean over categories) and
        `all/mean_recall/composed` (mean over categories and `ks`: FashionIQ's mean of six), with chance beside.

    Raises:
        ValueError: a target is not in its gallery, an id stands twice in a gallery, or a category has no gallery.
    """
    outcomes, sizes = Outcomes(), {}
    for category in sorted(set(queries.categories.tolist())):
        gallery = _gallery(galleries, category)
        rows = np.flatnonzero(queries.categories == category)
        rows = rows[np.argsort(queries.names[rows], kind="stable")]
        place = _places(gallery.ids, queries.targets[rows], category)
        outcomes.ids[category], sizes[category] = queries.names[rows], len(gallery.ids)
        for score, feats in query_feats.items():
            way = Direction(feats[rows], gallery.feats, {"": _at(place, len(gallery.ids))})
            outcomes.add(f"{category}/{score}", every_rank(way, np.arange(len(rows)))[""])
    _define(outcomes, list(query_feats), sizes, ks)
    return outcomes


def _gallery(galleries: Mapping[str, Gallery], category: str) -> Gallery:
    if category not in galleries:
        raise ValueError(f"there are queries of {category!r}, but only galleries of {sorted(galleries)}; add it")
    gallery = galleries[category]
    if len(np.unique(gallery.ids)) < len(gallery.ids):
        raise ValueError(f"the gallery of {category!r} holds an id twice; list each photo once")
    return gallery


def _places(ids: np.ndarray, targets: np.ndarray, category: str) -> np.ndarray:
    """Positions of the targets in the gallery."""
    number = {one: place for place, one in enumerate(ids.tolist())}
    lost = sorted({target for target in targets.tolist() if target not in number})
    if lost:
        raise ValueError(f"{len(lost)} targets are not in the gallery of {category!r} ({lost[:3]}); leave them out")
    return np.array([number[target] for target in targets.tolist()], dtype=np.int64)


def _at(place: np.ndarray, size: int) -> Relevance:
    """One right candidate a query: the one at its place."""
    return lambda rows: place[rows, None] == np.arange(size)


def _define(outcomes: Outcomes, scores: list[str], sizes: Mapping[str, int], ks: Sequence[int]) -> None:
    orders = {score: (score,) for score in scores}
    for score in scores:
        if score + SWAPPED in scores:
            orders[score + BOTH_ORDERS] = (score, score + SWAPPED)

    def line(quantity: str, figure: str, categories: Sequence[str], at: Sequence[int]) -> None:
        for score, parts in orders.items():
            of = tuple(f"{category}/{part}" for category in categories for part in parts)
            outcomes.define(f"{quantity}/{figure}/{score}", Measure(of, tuple(at)))
        level = np.mean([min(k / sizes[category], 1) for category in categories for k in at])
        asked = sum(len(outcomes.ids[category]) for category in categories)
        outcomes.define(f"{quantity}/{figure}/chance", exact(level, asked))

    for category in sizes:
        for k in ks:
            line(category, f"recall@{k}", [category], [k])
    for k in ks:
        line("all", f"recall@{k}", list(sizes), [k])
    line("all", "mean_recall", list(sizes), ks)


# --------------------------------------------------------------------------------------------- with a model


def fashioniq(
    protocol: str,
    model,
    processor,
    data,
    *,
    encode_query: QueryEncoder | None = None,
    corpus_name: str = "fashioniq",
    batch_size: int = 128,
    seed: int = 0,
) -> Result:
    """Runs `fashioniq-original` or `fashioniq-val` on the validation triplets.

    Scores: `composed` by `encode_query`, where one is given, with the captions joined "c0 and c1", the other way round
    (`composed_swapped`) and both; beside it what the two towers do without any composing: `image_only` (the reference
    photo), `text_only` and `sum` (the two added).

    Args:
        protocol: which of the two; the gallery is the split file, or the union of candidates and targets.
        model: with the two towers, such as `SyncMaskForPreTraining`.
        processor: its `SyncMaskProcessor`.
        data: a `processing.readers_fashioniq.FashionIQ`, or anything with `triplets`, `gallery(name, category)` and
            `missing` like it.
        encode_query: photos and texts -> query features, by a model for composed retrieval.
        corpus_name: for the result.
        batch_size: of the forward passes.
        seed: of the bootstrap.
    """
    triplets = data.triplets["validation"]
    queries = Queries(*(np.asarray(triplets[name], dtype=str) for name in ("candidate_id", "item_id", "category")))
    tables = {kind: data.gallery(GALLERIES[protocol], kind) for kind in sorted(set(queries.categories.tolist()))}
    galleries = {kind: _embedded(model, processor, table, batch_size) for kind, table in tables.items()}
    references = triplets.select_columns(["candidate"]).rename_column("candidate", "image")
    query_feats = two_tower_queries(model, processor, references, triplets["captions"], batch_size)
    if encode_query is not None:
        for suffix, texts in joined_captions(triplets["captions"]).items():
            query_feats["composed" + suffix] = _encoded(encode_query, references, texts, batch_size)
    outcomes = composed_outcomes(query_feats, queries, galleries)
    missing = sum(len(ids) for name, ids in data.missing.items() if name.endswith("/val"))
    texts = joined_captions(triplets["captions"])[""]
    asked = {"queries": np.sort([f"{name} {text}" for name, text in zip(queries.names, texts)])}
    ranked = {f"gallery/{kind}": gallery.ids for kind, gallery in galleries.items()}
    return Result(
        protocol=protocol,
        version=1,
        corpus={
            "name": corpus_name,
            "split": "validation",
            "rows": len(triplets),
            "items": len(set(triplets["item_id"])),
            "gallery": {kind: len(gallery.ids) for kind, gallery in galleries.items()},
            "missing_photos": missing,
            "comparable": missing == 0,
        },
        metrics=outcomes.metrics(seed),
        outcomes=outcomes,
        candidates=Candidates(asked | ranked),
    )


def joined_captions(captions: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """The captions of each query joined by " and ": under "" as they stand, under "_swapped" the last one first.

    Example: `joined_captions([["red", "longer"]])` is `{"": ["red and longer"], "_swapped": ["longer and red"]}`.
    """
    return {suffix: [join_captions(some, swapped=bool(suffix)) for some in captions] for suffix in ("", SWAPPED)}


def two_tower_queries(
    model, processor, references, captions: Sequence[Sequence[str]], batch_size: int = 128
) -> dict[str, np.ndarray]:
    """The baselines' query features by score: `image_only`, `text_only`, `sum`, the last two in both orders."""
    image_feats = Embedder(model, processor, references, batch_size=batch_size).image_feats()
    found = {"image_only": image_feats}
    for suffix, texts in joined_captions(captions).items():
        index = CorpusIndex(np.arange(len(texts)), np.arange(len(texts)), texts)
        text_feats = Embedder(model, processor, references, index, batch_size=batch_size).text_feats()
        both = image_feats + text_feats
        found["text_only" + suffix] = text_feats
        found["sum" + suffix] = both / np.maximum(np.linalg.norm(both, axis=1, keepdims=True), 1e-12)
    return found


def _embedded(model, processor, table, batch_size: int) -> Gallery:
    """A category's photos in the order of their ids."""
    ids = np.asarray(table["item_id"], dtype=str)
    order = np.argsort(ids, kind="stable")
    feats = Embedder(model, processor, table, batch_size=batch_size).image_feats()
    return Gallery(ids[order], feats[order])


def _encoded(encode: QueryEncoder, references, texts: list[str], batch_size: int) -> np.ndarray:
    parts = []
    for start in range(0, len(texts), batch_size):
        rows = np.arange(start, min(start + batch_size, len(texts)))
        parts.append(np.asarray(encode(photos(references, rows), [texts[row] for row in rows])))
    return np.concatenate(parts)
