"""The protocol `items`: image->text, text->image and photo->photo of the same item on a held-out split.

The pure half (`retrieval_metrics`) takes features and ids; `items` feeds it from a model and a corpus.
Scores: `itc`, the cosine of the two towers, and `itm`, the top k of itc re-ranked by the matching head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from syncmask.processing.corpus import CorpusIndex, fingerprint
from syncmask.processing.garments import GarmentTruth

from .embedding import Embedder
from .metrics import Metric, chance_recall, exact, mean_recall, ranks, recall_at_k
from .result import Result, candidates_sha256

KS = (1, 5, 10)
# Equal features give products that differ by this much with their place in the matrix; it still is a tie.
TIE = 1e-6

Relevance = Callable[[np.ndarray], np.ndarray]  # query positions (q,) -> (q, gallery) bool
Matching = Callable[[np.ndarray, np.ndarray], np.ndarray]  # image and text positions (n,), (n,) -> scores (n,)


@dataclass(frozen=True)
class Direction:
    """One way of searching: features of queries and gallery, and what counts as right.

    Attributes:
        queries: (Q, D) unit-length features.
        gallery: (G, D) unit-length features.
        relevant: by the name of a reading, "" the strict one, what is right for some queries.
        itself: (Q,) gallery position of the query photo, which is no candidate; None where it is not in the gallery.
    """

    queries: np.ndarray
    gallery: np.ndarray
    relevant: dict[str, Relevance]
    itself: np.ndarray | None = None

    def scores(self, rows: np.ndarray) -> np.ndarray:
        """Cosines (q, G) in fp32 (half precision would tie)."""
        return self.queries[rows].astype(np.float32) @ self.gallery.astype(np.float32).T

    def ignored(self, rows: np.ndarray) -> np.ndarray | None:
        """The query's own place (q, G), or None."""
        return None if self.itself is None else self.itself[rows, None] == np.arange(len(self.gallery))


# --------------------------------------------------------------------------------------------------------- pure


def retrieval_metrics(
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
    seed: int = 0,
) -> dict[str, Metric]:
    """Recalls of the three directions, by score and by reading, with chance beside.

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
        seed: of bootstrap and sample.

    Returns:
        `image_to_text/recall@1/itc` ..., `both_ways/mean_recall/itc` (mean over `ks` and the two directions).

    Raises:
        ValueError: an item has two texts in the gallery, or a photo's item has none.
    """
    _check_ids(image_items, text_items)
    ways = _directions(image_feats, text_feats, image_items, text_items, text_ids, true_pairs)
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, way in ways.items():
        every = np.arange(len(way.queries))
        if len(every):
            found[name] = {"itc": every_rank(way, every)}
            for reading in [reading for reading in way.relevant if reading]:
                found[name][f"itc_{reading}"] = every_rank(way, every, reading)
    if matching is not None:
        for name in ("image_to_text", "text_to_image"):
            pairs = matching if name == "image_to_text" else lambda text, image: matching(image, text)
            sample = _sample(len(ways[name].queries), rerank_queries, seed)
            found[name] |= rerank(ways[name], sample, pairs, rerank_k)
    return _summary(found, ways, ks, seed)


def every_rank(way: Direction, rows: np.ndarray, reading: str = "", chunk: int = 1024) -> np.ndarray:
    """Ranks (q,) of the queries `rows`, computed a chunk at a time so that a big gallery fits the memory."""
    parts = []
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        relevant = way.relevant[reading](part)
        parts.append(ranks(_generous(way.scores(part), relevant), relevant, way.ignored(part)))
    return np.concatenate(parts)


def rerank(way: Direction, rows: np.ndarray, matching: Matching, k: int, chunk: int = 512) -> dict[str, np.ndarray]:
    """Ranks by reading after the `k` best by cosine are put in the order of the matching head.

    Candidates outside the k best keep their order by cosine behind them. `matching` gets gallery positions second.
    """
    k, parts = min(k, len(way.gallery)), {f"itm_{name}".rstrip("_"): [] for name in way.relevant}
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        scores = way.scores(part).astype(np.float64)
        best = np.argsort(-_generous(scores, way.relevant[""](part)), axis=1, kind="stable")[:, :k]
        matched = matching(np.repeat(part, k), best.reshape(-1)).reshape(best.shape).astype(np.float64)
        # Above every cosine (at most 1), whatever the range of the head's logits.
        np.put_along_axis(scores, best, matched - matched.min() + 2, axis=1)
        for name, relevance in way.relevant.items():
            relevant = relevance(part)
            parts[f"itm_{name}".rstrip("_")].append(ranks(_generous(scores, relevant), relevant))
    return {name: np.concatenate(part) for name, part in parts.items()}


def _generous(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Scores with the right ones lowered by TIE, so that what differs by rounding alone is a tie and counts against."""
    return scores - TIE * relevant.astype(scores.dtype)


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
    to_text: dict[str, Relevance] = {"": lambda rows: image_items[rows, None] == text_items}
    to_image: dict[str, Relevance] = {"": lambda rows: text_items[rows, None] == image_items}
    if text_ids is not None:
        order = np.argsort(text_items)
        image_texts = text_ids[order[np.searchsorted(text_items, image_items, sorter=order)]]
        to_text["duplicates"] = lambda rows: image_texts[rows, None] == text_ids
        to_image["duplicates"] = lambda rows: text_ids[rows, None] == image_texts
    if true_pairs is not None:
        # An item's own text always counts, even where the truth table would call it contradicted.
        to_text["tolerant"] = lambda rows: true_pairs(rows[:, None], texts[None]) | to_text[""](rows)
        to_image["tolerant"] = lambda rows: true_pairs(images[None], rows[:, None]) | to_image[""](rows)
    several = np.flatnonzero(np.isin(image_items, _repeated(image_items)))
    to_photo: dict[str, Relevance] = {"": lambda rows: image_items[several[rows], None] == image_items}
    return {
        "image_to_text": Direction(image_feats, text_feats, to_text),
        "text_to_image": Direction(text_feats, image_feats, to_image),
        "photo_to_photo": Direction(image_feats[several], image_feats, to_photo, itself=several),
    }


def _summary(
    found: dict[str, dict[str, np.ndarray]], ways: dict[str, Direction], ks: Sequence[int], seed: int
) -> dict[str, Metric]:
    """Ranks by direction and score -> metrics by name."""
    metrics: dict[str, Metric] = {}
    for name, by_score in found.items():
        positives, candidates = _sizes(ways[name])
        for k in ks:
            for score, rank in by_score.items():
                metrics[f"{name}/recall@{k}/{score}"] = recall_at_k(rank, k, seed=seed)
            chance = chance_recall(positives, candidates, k)
            metrics[f"{name}/recall@{k}/chance"] = exact(chance, len(positives))
    for score in found["image_to_text"]:
        both = [found["image_to_text"][score], found["text_to_image"][score]]
        metrics[f"both_ways/mean_recall/{score}"] = mean_recall(both, ks, seed=seed)
    levels = [metrics[f"{way}/recall@{k}/chance"]["value"] for way in ("image_to_text", "text_to_image") for k in ks]
    metrics["both_ways/mean_recall/chance"] = exact(np.mean(levels), metrics["both_ways/mean_recall/itc"]["n"])
    return metrics


def _sizes(way: Direction, chunk: int = 1024) -> tuple[np.ndarray, int]:
    """Positives of each query (Q,) under the strict reading, and the size of its gallery."""
    queries, own = np.arange(len(way.queries)), 0 if way.itself is None else 1
    counts = [way.relevant[""](queries[s : s + chunk]).sum(axis=1) - own for s in range(0, len(queries), chunk)]
    return np.concatenate(counts), len(way.gallery) - own


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


def _sample(n: int, limit: int | None, seed: int) -> np.ndarray:
    if limit is None or limit >= n:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, size=limit, replace=False))


# --------------------------------------------------------------------------------------------- with a model


def items(
    model,
    processor,
    dataset,
    *,
    corpus_name: str = "",
    split: str = "test",
    max_rows: int | None = None,
    batch_size: int = 128,
    rerank_k: int = 16,
    rerank_queries: int | None = None,
    seed: int = 0,
) -> Result:
    """Runs the protocol on one split of a corpus with several photos an item.

    Args:
        model: a `SyncMaskForPreTraining`.
        processor: its `SyncMaskProcessor`.
        dataset: rows of `load_corpus`, none of whose items was trained on.
        corpus_name: for the result.
        split: for the result.
        max_rows: use whole items up to this many photos, a seeded sample; None = all.
        batch_size: of the forward passes.
        rerank_k: how many of the best by cosine the matching head re-ranks; 0 = no `itm`.
        rerank_queries: re-rank for at most this many queries a direction; None = all.
        seed: of samples and bootstrap.

    Where the corpus carries ground truth (the generated one), `tolerant` recalls are reported too.
    """
    rows = sample_items(CorpusIndex.from_dataset(dataset).item_ids, max_rows, seed)
    dataset = dataset.select(rows) if len(rows) < len(dataset) else dataset
    index = CorpusIndex.from_dataset(dataset)
    firsts = np.unique(index.item_ids, return_index=True)[1]
    embedder = Embedder(model, processor, dataset, index, batch_size=batch_size)
    image_feats, distinct_feats = embedder.image_feats(), embedder.text_feats()
    gallery = index.text_ids[firsts]
    truth = GarmentTruth.from_dataset(dataset) if "claimed" in dataset.column_names else None
    metrics = retrieval_metrics(
        image_feats,
        distinct_feats[gallery],
        index.item_ids,
        index.item_ids[firsts],
        text_ids=gallery,
        true_pairs=None if truth is None else lambda images, texts: truth.text_true_of_photo(images, firsts[texts]),
        matching=(lambda image, text: embedder.matching(image, gallery[text])) if rerank_k else None,
        rerank_k=rerank_k,
        rerank_queries=rerank_queries,
        seed=seed,
    )
    return Result(
        protocol="items",
        version=1,
        corpus=describe_corpus(dataset, corpus_name, split, len(firsts)),
        metrics=metrics,
        candidates_sha256=candidates_sha256(dataset["item_id"], gallery, [rerank_k, rerank_queries or 0, seed]),
    )


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
        "fingerprint": fingerprint(dataset),
        "split": split,
        "rows": len(dataset),
        "items": int(num_items),
    }
