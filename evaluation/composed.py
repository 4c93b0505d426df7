"""Composed retrieval: a reference photo and a text of what should differ find the target photo.

The pure half (`composed_outcomes`) takes features and ids; `fashioniq` (the protocols `fashioniq-*`) feeds it from a
reader's triplets and galleries, `retrieve_variants` (the protocol `colour-variants`) from any corpus of triplets.
The reference photo stays in the gallery, as in all published figures: a model that just returns it gains nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from PIL import Image

from syncmask.processing.corpus import CorpusIndex
from syncmask.processing.readers_fashioniq import join_captions
from syncmask.processing.variants import FAMILY

from .candidates import Candidates
from .embedding import Embedder, photos
from .metrics import chance_recall, exact
from .outcomes import Measure, Outcomes
from .protocols import describe_corpus, photo_names, sample_items
from .ranking import Direction, Relevance, every_rank
from .result import Result

KS, VARIANT_KS = (10, 50), (1, 5, 10)
ALL = "all"  # the mean over categories, and the one category of a corpus that is searched whole
SWAPPED, BOTH_ORDERS = "_swapped", "_both_orders"
GALLERIES = {"fashioniq-original": "original", "fashioniq-val": "val"}

# Photos and texts -> (B, D) unit-length query features, of the space that the photos' features are in.
QueryEncoder = Callable[[list[Image.Image], list[str]], np.ndarray]


@dataclass(frozen=True)
class Queries:
    """Who is asked: reference photo and what is wanted by id, the category whose gallery is searched, each (Q,) str.

    `families` (Q,): queries of one family are resampled together for the intervals; each on its own when None.
    """

    references: np.ndarray
    targets: np.ndarray
    categories: np.ndarray
    families: np.ndarray | None = None

    @property
    def names(self) -> np.ndarray:
        """(Q,) str, one a query."""
        return np.array([f"{one}>{other}" for one, other in zip(self.references, self.targets)], dtype=str)


@dataclass(frozen=True)
class Gallery:
    """The photos of one category: ids (G,) str, all different, and unit-length features (G, D).

    `items` (G,): what each photo shows, which targets name: any photo of the right item is a hit. The photos' own ids
    when None.
    """

    ids: np.ndarray
    feats: np.ndarray
    items: np.ndarray | None = None


# --------------------------------------------------------------------------------------------------------- pure


def composed_outcomes(
    query_feats: Mapping[str, np.ndarray], queries: Queries, galleries: Mapping[str, Gallery], *, ks: Sequence[int] = KS
) -> Outcomes:
    """Ranks of every query's target in its category's gallery, by score.

    Args:
        query_feats: by score, (Q, D) unit length. A score `X_swapped` (the captions in the other order) beside `X` adds
            `X_both_orders`, the mean of the two.
        queries: Q of them, in any order.
        galleries: by category; "all" may be the only one.
        ks: the k of recall@k.

    Returns:
        Outcomes with `dress/recall@10/composed` ..., `all/recall@10/composed` (mean over categories) and
        `all/mean_recall/composed` (mean over categories and `ks`: FashionIQ's mean of six), with chance beside.

    Raises:
        ValueError: a target is not in its gallery, an id stands twice in a gallery, or a category has no gallery.
    """
    outcomes, chances = Outcomes(), {}
    for category in sorted(set(queries.categories.tolist())):
        gallery = _gallery(galleries, category)
        rows = np.flatnonzero(queries.categories == category)
        rows = rows[np.argsort(queries.names[rows], kind="stable")]
        units = _name_units(outcomes, category, queries, rows)
        right = _right(gallery, queries.targets[rows], category)
        for score, feats in query_feats.items():
            way = Direction(feats[rows], gallery.feats, {"": right})
            outcomes.add(f"{category}/{score}", every_rank(way, np.arange(len(rows)))[""], units)
        chances[category] = {k: chance_recall(*way.sizes(), k) for k in ks}
    _define(outcomes, list(query_feats), chances)
    return outcomes


def _name_units(outcomes: Outcomes, category: str, queries: Queries, rows: np.ndarray) -> np.ndarray | None:
    """Put the ids of what is resampled into the outcomes; returns the queries' positions (q,) in them."""
    names = queries.names[rows]
    if queries.families is None:
        outcomes.ids[category] = names
        return None
    outcomes.ids[category], units = np.unique(queries.families[rows], return_inverse=True)
    outcomes.ids[f"{category}_queries"] = names
    return units


def _gallery(galleries: Mapping[str, Gallery], category: str) -> Gallery:
    if category not in galleries:
        raise ValueError(f"there are queries of {category!r}, but only galleries of {sorted(galleries)}; add it")
    gallery = galleries[category]
    if len(np.unique(gallery.ids)) < len(gallery.ids):
        raise ValueError(f"the gallery of {category!r} holds an id twice; list each photo once")
    return gallery


def _right(gallery: Gallery, targets: np.ndarray, category: str) -> Relevance:
    """The photos of what each query wants."""
    items = gallery.ids if gallery.items is None else gallery.items
    number = {item: place for place, item in enumerate(np.unique(items).tolist())}
    lost = sorted({target for target in targets.tolist() if target not in number})
    if lost:
        raise ValueError(f"{len(lost)} targets are not in the gallery of {category!r} ({lost[:3]}); leave them out")
    shown, wanted = (np.array([number[one] for one in some.tolist()], dtype=np.int32) for some in (items, targets))
    return lambda rows: wanted[rows, None] == shown


def _define(outcomes: Outcomes, scores: list[str], chances: Mapping[str, Mapping[int, float]]) -> None:
    """The table: recalls by category with chance beside, then means over categories, or the latter alone."""
    orders = {score: (score,) for score in scores}
    for score in scores:
        if score + SWAPPED in scores:
            orders[score + BOTH_ORDERS] = (score, score + SWAPPED)

    def line(quantity: str, figure: str, categories: Sequence[str], at: Sequence[int]) -> None:
        for score, parts in orders.items():
            of = tuple(f"{category}/{part}" for category in categories for part in parts)
            outcomes.define(f"{quantity}/{figure}/{score}", Measure(of, tuple(at)))
        level = np.mean([chances[category][k] for category in categories for k in at])
        asked = sum(len(outcomes.ids[category]) for category in categories)
        outcomes.define(f"{quantity}/{figure}/chance", exact(level, asked))

    ks = list(next(iter(chances.values())))
    for category in chances if list(chances) != [ALL] else ():
        for k in ks:
            line(category, f"recall@{k}", [category], [k])
    for k in ks:
        line(ALL, f"recall@{k}", list(chances), [k])
    line(ALL, "mean_recall", list(chances), ks)


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

    Scores: `composed` by `encode_query`, where there is one, with the captions joined "c0 and c1", the other way round
    (`composed_swapped`) and both; beside it what the two towers do without any composing: `image_only` (the reference
    photo), `text_only` and `sum` (the two added).

    Args:
        protocol: which of the two; the gallery is the split file, or the union of candidates and targets.
        model: with the two towers, such as `SyncMaskForPreTraining`.
        processor: its `SyncMaskProcessor`.
        data: a `processing.readers_fashioniq.FashionIQ`, or anything with `triplets`, `gallery(name, category)` and
            `missing` like it.
        encode_query: photos and texts -> query features; the model's own where it has a query head and this is None.
        corpus_name: for the result.
        batch_size: of the forward passes.
        seed: of the bootstrap.
    """
    triplets = data.triplets["validation"]
    encode_query = encode_query or query_encoder(model, processor)
    queries = Queries(*(np.asarray(triplets[name], dtype=str) for name in ("candidate_id", "item_id", "category")))
    tables = {kind: data.gallery(GALLERIES[protocol], kind) for kind in sorted(set(queries.categories.tolist()))}
    galleries = {kind: _embedded(model, processor, table, batch_size) for kind, table in tables.items()}
    references = triplets.select_columns(["candidate"]).rename_column("candidate", "image")
    joined = joined_captions(triplets["captions"])
    image_feats = Embedder(model, processor, references, batch_size=batch_size).image_feats()
    query_feats = two_tower_queries(model, processor, image_feats, joined, batch_size)
    if encode_query is not None:
        for suffix, texts in joined.items():
            query_feats["composed" + suffix] = _encoded(encode_query, references, texts, batch_size)
    outcomes = composed_outcomes(query_feats, queries, galleries)
    missing = sum(len(ids) for name, ids in data.missing.items() if name.endswith("/val"))
    asked = {"queries": np.sort([f"{name} {text}" for name, text in zip(queries.names, joined[""])])}
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


def query_encoder(model, processor) -> QueryEncoder | None:
    """How a model with a query head (`SyncMaskForComposedImageRetrieval`) composes; None for any other."""
    if not hasattr(model, "get_query_features"):
        return None

    @torch.no_grad()
    def encode(photos: list[Image.Image], texts: list[str]) -> np.ndarray:
        inputs = processor(images=photos, text=texts).to(model.device)
        return model.get_query_features(**inputs).pooler_output.float().cpu().numpy()

    return encode


def two_tower_queries(
    model, processor, image_feats: np.ndarray, texts: Mapping[str, list[str]], batch_size: int = 128
) -> dict[str, np.ndarray]:
    """The baselines' query features by score: `image_only`, `text_only`, `sum`, the last two by suffix of `texts`.

    Args:
        model: with a text tower.
        processor: its `SyncMaskProcessor`.
        image_feats: (Q, D) of the reference photos.
        texts: Q of them by suffix, "" among these.
        batch_size: of the forward passes.
    """
    found = {"image_only": image_feats}
    for suffix, some in texts.items():
        index = CorpusIndex(np.arange(len(some)), np.arange(len(some)), some)
        text_feats = Embedder(model, processor, None, index, batch_size=batch_size).text_feats()
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


# ----------------------------------------------------------------------------------------------- colour variants


def retrieve_variants(
    model,
    processor,
    dataset,
    *,
    encode_query: QueryEncoder | None = None,
    corpus_name: str = "",
    split: str = "test",
    max_rows: int | None = None,
    batch_size: int = 128,
    seed: int = 0,
) -> Result:
    """Runs `colour-variants`: a photo and "the same but in red" find the photo of the same product in red.

    The gallery is every distinct photo of the split, targets and references alike, so the product's other colours are
    in it, and so is the reference itself. Any photo of the wanted item (product and colour) is a hit. Scores:
    `composed` by `encode_query`, where there is one, and without any composing `image_only`, `text_only` and `sum`.
    Intervals resample products, each with all its queries.

    Args:
        model: with the two towers, such as `SyncMaskForComposedImageRetrieval`.
        processor: its `SyncMaskProcessor`.
        dataset: triplets of `load_corpus`: image, item_id, candidate, candidate_id, text; products by `family_id`.
        encode_query: photos and texts -> query features; the model's own where it has a query head and this is None.
        corpus_name: for the result.
        split: for the result.
        max_rows: use whole products up to this many triplets, a seeded sample; None = all.
        batch_size: of the forward passes.
        seed: of sample and bootstrap.

    Raises:
        ValueError: the split holds no triplets.
    """
    _check_triplets(dataset)
    encode_query = encode_query or query_encoder(model, processor)
    triplets = _in_order(dataset, max_rows, seed)
    gallery, reference_at = distinct_photos(triplets)
    ids, items = photo_names(gallery), np.asarray(gallery["item_id"], dtype=str)
    feats = Embedder(model, processor, gallery, batch_size=batch_size).image_feats()
    texts, asked = list(triplets["text"]), len(triplets)
    query_feats = two_tower_queries(model, processor, feats[reference_at], {"": texts}, batch_size)
    if encode_query is not None:
        query_feats["composed"] = _encoded(encode_query, gallery.select(reference_at), texts, batch_size)
    wanted = np.asarray(triplets["item_id"], dtype=str)
    queries = Queries(ids[reference_at], wanted, np.full(asked, ALL), _families(triplets))
    outcomes = composed_outcomes(query_feats, queries, {ALL: Gallery(ids, feats, items)}, ks=VARIANT_KS)
    about = describe_corpus(triplets, corpus_name, split, len(set(items.tolist())))
    names = np.sort([f"{name} {text}" for name, text in zip(queries.names, texts)])
    return Result(
        protocol="colour-variants",
        version=1,
        corpus=about | {"gallery": len(ids), "products": len(outcomes.ids[ALL])},
        metrics=outcomes.metrics(seed),
        outcomes=outcomes,
        candidates=Candidates({"queries": names, "gallery": ids}),
    )


def _check_triplets(dataset) -> None:
    if not {"candidate", "candidate_id"} <= set(dataset.column_names):
        raise ValueError(
            "colour-variants needs triplets, but the corpus has no columns candidate and candidate_id: it has "
            f"{', '.join(dataset.column_names)}. Evaluate on --corpus garment-variants, or make triplets of a corpus "
            "that knows product and colour: --variants PRODUCT_COLUMN,COLOUR_COLUMN"
        )
    if not len(dataset):
        raise ValueError("the split holds no triplets: no product of it has two colours; give another --split")


def _families(triplets) -> np.ndarray:
    """The product of each triplet (Q,); without such a column the item."""
    return np.asarray(triplets[FAMILY if FAMILY in triplets.column_names else "item_id"], dtype=str)


def _in_order(triplets, max_rows: int | None, seed: int):
    """Whole products, a seeded sample, the same whatever order the rows came in."""
    keys = [triplets[name][:] for name in ("text", "candidate_id", "item_id")]
    order = np.lexsort([np.asarray(key, dtype=str) for key in keys])
    families = np.unique(_families(triplets)[order], return_inverse=True)[1]
    return triplets.select(order[sample_items(families, max_rows, seed)])


def distinct_photos(triplets):
    """The photos of triplets, targets and references, each once, and where each reference is among them (Q,).

    Photos are the same where item and contents are (of photos that are files, the file). Sorted by item; columns
    image, item_id, and view where the triplets have it.
    """
    view = ["view"] if "view" in triplets.column_names else []
    targets = triplets.with_format(None).select_columns(["image", "item_id", *view])
    references = triplets.with_format(None).select_columns(["candidate", "candidate_id", *view])
    references = references.rename_columns({"candidate": "image", "candidate_id": "item_id"})
    every = datasets.concatenate_datasets([targets, references])
    keys = []
    for row in every.cast_column("image", datasets.Image(decode=False)):
        cell = row["image"] or {}
        content = hashlib.sha256(cell["bytes"]).hexdigest() if cell.get("bytes") else cell.get("path")
        keys.append(f"{row['item_id']}\n{content}")
    _, firsts, place = np.unique(keys, return_index=True, return_inverse=True)
    return every.select(firsts), place[len(triplets) :]
