"""Image-text retrieval over a whole gallery: the protocols `items` and `fashiongen-full`.

The pure half (`retrieval_outcomes`) takes features and ids; `items` and `fashiongen_full` feed it from a model and a
corpus. Scores: `itc`, the cosine of the two towers, and `itm`, the top k of itc re-ranked by the matching head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from syncmask.processing.corpus import CorpusIndex, fingerprint, source_kind
from syncmask.processing.garments import GarmentTruth

from .candidates import Candidates
from .embedding import Embedder
from .metrics import Metric, chance_recall, exact
from .outcomes import Measure, Outcomes
from .ranking import Direction, Matching, Relevance, every_rank, rerank
from .result import Result

KS = (1, 5, 10)
BOTH = ("image_to_text", "text_to_image")
ALL = (*BOTH, "photo_to_photo")


# --------------------------------------------------------------------------------------------------------- pure


def retrieval_metrics(*args, seed: int = 0, **kwargs) -> dict[str, Metric]:
    """The metrics of `retrieval_outcomes` with their intervals."""
    return retrieval_outcomes(*args, seed=seed, **kwargs).metrics(seed)


def retrieval_outcomes(
    image_feats: np.ndarray,
    text_feats: np.ndarray,
    image_items: np.ndarray,
    text_items: np.ndarray,
    *,
    text_ids: np.ndarray | None = None,
    true_pairs: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    matching: Matching | None = None,
    rerank_k: int = 16,
    rerank_queries: int | None = None,
    ks: Sequence[int] = KS,
    directions: Sequence[str] = ALL,
    photo_names: Sequence[str] | None = None,
    item_names: Sequence[str] | None = None,
    seed: int = 0,
) -> Outcomes:
    """Ranks of every query in the three directions, by score and by reading, with chance beside.

    Args:
        image_feats: (I, D) unit length, one a photo.
        text_feats: (T, D) unit length, one an item: the gallery of image->text.
        image_items: (I,) item of each photo; every one has a text.
        text_items: (T,) item of each text, all different.
        text_ids: (T,) equal for equal texts; adds the reading `duplicates`: another item's equal text is a hit.
        true_pairs: (image positions, text positions) -> bool, broadcasting; adds the reading `tolerant`: a text of
            another item that is true of the photo is a hit.
        matching: scores of pairs by the matching head; adds the score `itm`.
        rerank_k: how many of itc's best are re-ranked.
        rerank_queries: re-rank for a seeded sample of at most this many queries a direction; None = all.
        ks: the k of recall@k.
        directions: which of `image_to_text`, `text_to_image` and `photo_to_photo` are scored.
        photo_names: (I,) what the photos are called in the file of queries; their positions by default.
        item_names: (T,) the same for the texts.
        seed: of the sample.

    Returns:
        Outcomes with the metrics `image_to_text/recall@1/itc` ..., `both_ways/mean_recall/itc` (mean over `ks` and the
        two directions).

    Raises:
        ValueError: an item has two texts in the gallery, or a photo's item has none.
    """
    _check_ids(image_items, text_items)
    every = _directions(image_feats, text_feats, image_items, text_items, text_ids, true_pairs)
    ways = {name: way for name, way in every.items() if name in directions and len(way.queries)}
    photos = _names(photo_names, len(image_items))
    names = {
        "image_to_text": photos,
        "text_to_image": _names(item_names, len(text_items)),
        "photo_to_photo": photos[_several(image_items)],
    }
    outcomes = Outcomes(ids={name: names[name] for name in ways})
    for name, way in ways.items():
        _add_ranks(outcomes, name, "itc", every_rank(way, np.arange(len(way.queries))))
        if matching is not None and name in BOTH:
            pairs = matching if name == "image_to_text" else lambda text, image: matching(image, text)
            sample = _sample(len(way.queries), rerank_queries, seed)
            _add_ranks(outcomes, name, "itm", rerank(way, sample, pairs, rerank_k), sample)
    _define(outcomes, ways, ks)
    return outcomes


def _add_ranks(outcomes: Outcomes, way: str, score: str, by_reading: dict, rows: np.ndarray | None = None) -> None:
    for reading, rank in by_reading.items():
        outcomes.add(f"{way}/{score}_{reading}".rstrip("_"), rank, rows)


def _directions(
    image_feats: np.ndarray,
    text_feats: np.ndarray,
    image_items: np.ndarray,
    text_items: np.ndarray,
    text_ids: np.ndarray | None,
    true_pairs: Callable | None,
) -> dict[str, Direction]:
    """The three directions; readings that need what was not given are absent."""
    images, texts = np.arange(len(image_items)), np.arange(len(text_items))
    image_items, text_items = _small_ids(image_items, text_items)
    to_text: dict[str, Relevance] = {"": lambda rows: image_items[rows, None] == text_items}
    to_image: dict[str, Relevance] = {"": lambda rows: text_items[rows, None] == image_items}
    if text_ids is not None:
        (text_ids,), order = _small_ids(text_ids), np.argsort(text_items)
        image_texts = text_ids[order[np.searchsorted(text_items, image_items, sorter=order)]]
        to_text["duplicates"] = lambda rows: image_texts[rows, None] == text_ids
        to_image["duplicates"] = lambda rows: text_ids[rows, None] == image_texts
    if true_pairs is not None:
        # An item's own text always counts, even where the truth table would call it contradicted.
        to_text["tolerant"] = lambda rows: true_pairs(rows[:, None], texts[None]) | to_text[""](rows)
        to_image["tolerant"] = lambda rows: true_pairs(images[None], rows[:, None]) | to_image[""](rows)
    several = _several(image_items)
    to_photo: dict[str, Relevance] = {"": lambda rows: image_items[several[rows], None] == image_items}
    return {
        "image_to_text": Direction(image_feats, text_feats, to_text),
        "text_to_image": Direction(text_feats, image_feats, to_image),
        "photo_to_photo": Direction(image_feats[several], image_feats, to_photo, itself=several),
    }


def _define(outcomes: Outcomes, ways: dict[str, Direction], ks: Sequence[int]) -> None:
    """The table: recalls of each direction with chance beside, then the mean of both."""
    levels = []
    for name, way in ways.items():
        scores, (positives, candidates) = _scores(outcomes, name), way.sizes()
        for k in ks:
            outcomes.recalls(name, scores, [k])
            level = chance_recall(positives, candidates, k)
            outcomes.define(f"{name}/recall@{k}/chance", exact(level, len(positives)))
            levels += [level] if name in BOTH else []
    if all(name in ways for name in BOTH):
        for score in _scores(outcomes, "image_to_text"):
            both = tuple(f"{name}/{score}" for name in BOTH)
            outcomes.define(f"both_ways/mean_recall/{score}", Measure(both, tuple(ks)))
        asked = sum(len(outcomes.ids[name]) for name in BOTH)
        outcomes.define("both_ways/mean_recall/chance", exact(np.mean(levels), asked))


def _scores(outcomes: Outcomes, way: str) -> list[str]:
    return [name.removeprefix(f"{way}/") for name in outcomes.values if name.startswith(f"{way}/")]


def _check_ids(image_items: np.ndarray, text_items: np.ndarray) -> None:
    repeated = _repeated(text_items)
    if len(repeated):
        raise ValueError(
            f"{len(repeated)} items have two texts in the gallery (first: item {repeated[0]}); give one each"
        )
    lost = ~np.isin(image_items, text_items)
    if lost.any():
        raise ValueError(f"{int(lost.sum())} photos are of items without a text in the gallery; leave them out")


def _repeated(ids: np.ndarray) -> np.ndarray:
    values, counts = np.unique(ids, return_counts=True)
    return values[counts > 1]


def _small_ids(*ids: np.ndarray) -> list[np.ndarray]:
    """The same ids numbered anew from 0 as int32: comparing them takes half as long."""
    numbers = np.unique(np.concatenate(ids), return_inverse=True)[1].astype(np.int32)
    return np.split(numbers, np.cumsum([len(part) for part in ids])[:-1])


def _several(image_items: np.ndarray) -> np.ndarray:
    """Positions of the photos whose item has another one."""
    return np.flatnonzero(np.isin(image_items, _repeated(image_items)))


def _names(names: Sequence[str] | None, count: int) -> np.ndarray:
    return np.arange(count).astype(str) if names is None else np.asarray(names, dtype=str)


def _sample(n: int, limit: int | None, seed: int) -> np.ndarray:
    if limit is None or limit >= n:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, size=limit, replace=False))


# --------------------------------------------------------------------------------------------- with a model


def items(model, processor, dataset, **options) -> Result:
    """image->text, text->image and photo->photo of the same item, on any corpus with several photos an item.

    Where the corpus carries ground truth (the generated one), `tolerant` recalls are reported too. Arguments are those
    of `whole_gallery`.
    """
    truth = "claimed" in dataset.column_names
    return whole_gallery("items", model, processor, dataset, directions=ALL, tolerant=truth, **options)


def fashiongen_full(model, processor, dataset, **options) -> Result:
    """Every photo against all product texts (one is right), every text against all photos (any of the product is).

    FashionGen's validation split has 32,528 photos of about 7,500 products. Products with equal texts (colour
    variants) count as errors, and beside it, as `*_duplicates`, as hits. Arguments are those of `whole_gallery`.
    """
    return whole_gallery("fashiongen-full", model, processor, dataset, directions=BOTH, **options)


def whole_gallery(
    protocol: str,
    model,
    processor,
    dataset,
    *,
    directions: Sequence[str],
    tolerant: bool = False,
    corpus_name: str = "",
    split: str = "test",
    max_rows: int | None = None,
    batch_size: int = 128,
    rerank_k: int = 16,
    rerank_queries: int | None = None,
    seed: int = 0,
) -> Result:
    """Runs a protocol of whole galleries on one split of a corpus.

    Args:
        protocol: its name.
        model: with the two towers; without a matching head there is no `itm`.
        processor: its `SyncMaskProcessor`.
        dataset: rows of `load_corpus`, none of whose items was trained on.
        directions: see `retrieval_outcomes`.
        tolerant: with the reading `tolerant`; the corpus carries ground truth.
        corpus_name: for the result.
        split: for the result.
        max_rows: use whole items up to this many photos, a seeded sample; None = all.
        batch_size: of the forward passes.
        rerank_k: how many of the best by cosine the matching head re-ranks; 0 = no `itm`.
        rerank_queries: re-rank for at most this many queries a direction; None = all.
        seed: of samples and bootstrap.
    """
    dataset = in_canonical_order(dataset, max_rows, seed)
    index = CorpusIndex.from_dataset(dataset)
    firsts = np.unique(index.item_ids, return_index=True)[1]
    embedder = Embedder(model, processor, dataset, index, batch_size=batch_size)
    gallery, names = index.text_ids[firsts], photo_names(dataset)
    truth = GarmentTruth.from_dataset(dataset) if tolerant else None
    item_names = np.asarray(dataset["item_id"], dtype=str)[firsts]
    outcomes = retrieval_outcomes(
        embedder.image_feats(),
        embedder.text_feats()[gallery],
        index.item_ids,
        index.item_ids[firsts],
        text_ids=gallery,
        true_pairs=None if truth is None else lambda images, texts: truth.text_true_of_photo(images, firsts[texts]),
        matching=(lambda image, text: embedder.matching(image, gallery[text]))
        if rerank_k and embedder.can_match
        else None,
        rerank_k=rerank_k,
        rerank_queries=rerank_queries,
        directions=directions,
        photo_names=names,
        item_names=item_names,
        seed=seed,
    )
    asked = {"photos": names, "items": item_names, "texts": gallery}
    options = {"rerank": np.array([rerank_k, rerank_queries or 0, seed if rerank_queries else 0])}
    return Result(
        protocol=protocol,
        version=1,
        corpus=describe_corpus(dataset, corpus_name, split, len(firsts)),
        metrics=outcomes.metrics(seed),
        outcomes=outcomes,
        candidates=Candidates(asked | options),
    )


def in_canonical_order(dataset, max_rows: int | None = None, seed: int = 0):
    """The rows of a seeded sample of whole items, by item, view and place: the same whatever order they came in."""
    items, views = np.asarray(dataset["item_id"], dtype=str), _views(dataset)
    order = np.lexsort((views, items))
    sample = sample_items(np.unique(items[order], return_inverse=True)[1], max_rows, seed)
    rows = order[sample]
    return dataset if np.array_equal(rows, np.arange(len(dataset))) else dataset.select(rows)


def photo_names(dataset) -> np.ndarray:
    """A name for each photo, "item/view/number": the number tells photos of one item and view apart."""
    seen: Counter = Counter()
    names = []
    for item, view in zip(dataset["item_id"], _views(dataset)):
        names.append(f"{item}/{view}/{seen[item, view]}")
        seen[item, view] += 1
    return np.asarray(names, dtype=str)


def _views(dataset) -> np.ndarray:
    if "view" not in dataset.column_names:
        return np.full(len(dataset), "")
    return np.asarray([view or "" for view in dataset["view"]], dtype=str)


def sample_items(item_ids: np.ndarray, max_rows: int | None, seed: int) -> np.ndarray:
    """Rows of a seeded sample of whole items, at most `max_rows` photos (but one item at least), in order."""
    if max_rows is None or max_rows >= len(item_ids):
        return np.arange(len(item_ids))
    values, counts = np.unique(item_ids, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(values))
    taken = max(1, int((np.cumsum(counts[order]) <= max_rows).sum()))
    return np.flatnonzero(np.isin(item_ids, values[order[:taken]]))


def describe_corpus(dataset, name: str, split: str, num_items: int) -> dict:
    """The `corpus` entry of a result."""
    return {
        "name": name,
        "source": source_kind(name),
        "fingerprint": fingerprint(dataset),
        "split": split,
        "rows": len(dataset),
        "items": int(num_items),
    }
