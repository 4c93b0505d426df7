"""FashionGen's retrieval among 1 + 100 candidates, in its two readings: `fashiongen-sampled-item` and `-view`.

Published "sampled" figures come from at least four different tests; these are two of them, mended (the product that is
asked for is never its own negative, five seeded draws, ties against the model) and named. See docs/protocols.md.
Nothing here is peculiar to FashionGen but the names: any corpus with items and subcategories will do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from syncmask.processing.corpus import CorpusIndex

from .candidates import (
    WAYS,
    Candidates,
    Pool,
    check_candidates,
    draw_by_item,
    draw_by_view,
    same_subcategory_share,
)
from .embedding import Embedder
from .metrics import exact, ranks
from .outcomes import Measure, Outcomes
from .protocols import KS, describe_corpus, in_canonical_order, photo_names
from .ranking import TIE, Matching, reordered
from .result import Result

DRAWING = {"fashiongen-sampled-item": draw_by_item, "fashiongen-sampled-view": draw_by_view}
QUERIES_AT_ONCE = 200


# --------------------------------------------------------------------------------------------------------- pure


def sampled_outcomes(
    image_feats: np.ndarray,
    text_feats: np.ndarray,
    candidates: Candidates,
    *,
    item_of_photo: np.ndarray,
    text_ids: np.ndarray,
    matching: Matching | None = None,
    rerank_k: int = 16,
    ks: Sequence[int] = KS,
) -> Outcomes:
    """Ranks of every query of every draw among its own candidates.

    Args:
        image_feats: (I, D) unit length, in the order of the candidates' `photos`.
        text_feats: (P, D) unit length, one an item, in the order of `items`.
        candidates: see `Candidates`.
        item_of_photo: (I,) position in `items`.
        text_ids: (P,) equal for equal texts; under the reading `duplicates` such a candidate is no error.
        matching: scores of pairs of photos and items by the matching head; adds `itm`.
        rerank_k: how many of itc's best the matching head looks at.
        ks: the k of recall@k.

    Returns:
        Outcomes with `image_to_text/recall@1/itc` (mean over draws, its interval over distinct queries),
        `image_to_text/recall@1_sd/itc` (standard deviation over draws) and `both_ways/mean_recall/itc`.
    """
    outcomes = Outcomes()
    for way in WAYS:
        queries, listed = (candidates.arrays[f"{way}/{kind}"] for kind in ("queries", "candidates"))
        outcomes.ids[way] = candidates.arrays["photos" if way == "image_to_text" else "items"]
        feats = (image_feats, text_feats) if way == "image_to_text" else (text_feats, image_feats)
        texts = text_ids[listed if way == "image_to_text" else item_of_photo[listed]]
        pairs = matching if matching is None or way == "image_to_text" else lambda text, image: matching(image, text)
        for name, rank in _ranks(*feats, queries, listed, texts, pairs, rerank_k).items():
            outcomes.add(f"{way}/{name}", rank.reshape(-1), queries.reshape(-1))
    _define(outcomes, candidates, ks)
    return outcomes


def _ranks(query_feats, gallery_feats, queries, listed, texts, matching, rerank_k) -> dict[str, np.ndarray]:
    """Ranks (draws, Q) by score and reading; the right candidate is the first of each list."""
    draws, count, size = listed.shape
    flat, lists, equal = queries.reshape(-1), listed.reshape(-1, size), (texts == texts[:, :, :1]).reshape(-1, size)
    found: dict[str, list[np.ndarray]] = {}
    first = np.arange(size) == 0
    for start in range(0, len(flat), QUERIES_AT_ONCE):
        part = slice(start, start + QUERIES_AT_ONCE)
        relevant = np.broadcast_to(first, lists[part].shape)
        gallery = gallery_feats[lists[part]].astype(np.float64)
        scores = {"itc": np.einsum("qd,qcd->qc", query_feats[flat[part]].astype(np.float64), gallery)}
        if matching is not None:
            scores["itm"] = _matched(scores["itc"], relevant, flat[part], lists[part], matching, min(rerank_k, size))
        for name, values in scores.items():
            found.setdefault(name, []).append(ranks(values, relevant, tie=TIE))
            found.setdefault(f"{name}_duplicates", []).append(ranks(values, equal[part], tie=TIE))
    return {name: np.concatenate(parts).reshape(draws, count) for name, parts in found.items()}


def _matched(scores, relevant, queries, lists, matching, k: int) -> np.ndarray:
    def ask(best: np.ndarray) -> np.ndarray:
        chosen = np.take_along_axis(lists, best.reshape(-1, k), axis=1)
        return matching(np.repeat(queries, k), chosen.reshape(-1))

    return reordered(scores, relevant, k, ask)


def _define(outcomes: Outcomes, candidates: Candidates, ks: Sequence[int]) -> None:
    """The table: recalls with chance and the standard deviation over draws, then the mean of both directions."""
    levels = []
    for way in WAYS:
        draws, queries, size = candidates.arrays[f"{way}/candidates"].shape
        scores = [name.removeprefix(f"{way}/") for name in outcomes.values if name.startswith(f"{way}/")]
        for k in ks:
            outcomes.recalls(way, scores, [k])
            levels.append(min(k / size, 1))
            outcomes.define(f"{way}/recall@{k}/chance", exact(levels[-1], queries))
        for k in ks if draws > 1 else ():
            for score in scores:
                by_draw = (outcomes.values[f"{way}/{score}"].reshape(draws, queries) <= k).mean(axis=1)
                outcomes.define(f"{way}/recall@{k}_sd/{score}", exact(by_draw.std(ddof=1), draws))
    for score in scores:
        both = tuple(f"{way}/{score}" for way in WAYS)
        outcomes.define(f"both_ways/mean_recall/{score}", Measure(both, tuple(ks)))
    outcomes.define("both_ways/mean_recall/chance", exact(np.mean(levels), queries))


# --------------------------------------------------------------------------------------------- with a model


def pool_of(dataset) -> Pool:
    """The products and photos of a split in canonical order.

    Raises:
        ValueError: no column `subcategory`.
    """
    if "subcategory" not in dataset.column_names:
        raise ValueError(
            f"negatives are drawn by subcategory, but the corpus has no column of that name: it has "
            f"{', '.join(dataset.column_names)}; evaluate by the protocol `items`, or add the column"
        )
    names, items = photo_names(dataset), np.asarray(dataset["item_id"], dtype=str)
    distinct, firsts, of_photo = np.unique(items, return_index=True, return_inverse=True)
    kinds = np.asarray([kind or "" for kind in dataset["subcategory"]], dtype=str)
    order = np.argsort(names, kind="stable")
    return Pool(distinct, names[order], of_photo[order], kinds[firsts])


def fashiongen_sampled(
    protocol: str,
    model,
    processor,
    dataset,
    *,
    candidates: Candidates | None = None,
    corpus_name: str = "",
    split: str = "validation",
    max_rows: int | None = None,
    batch_size: int = 128,
    rerank_k: int = 16,
    seed: int = 0,
) -> Result:
    """Runs `fashiongen-sampled-item` or `fashiongen-sampled-view`.

    Args:
        protocol: which of the two.
        model: with the two towers; without a matching head there is no `itm`.
        processor: its `SyncMaskProcessor`.
        dataset: rows of `load_corpus` with `subcategory`.
        candidates: frozen lists of an earlier evaluation; drawn by `seed` when None.
        corpus_name: for the result.
        split: for the result.
        max_rows: use whole items up to this many photos, a seeded sample; None = all.
        batch_size: of the forward passes.
        rerank_k: how many of the best by cosine the matching head re-ranks; 0 = no `itm`.
        seed: of draws, samples and bootstrap.
    """
    dataset = in_canonical_order(dataset, max_rows, seed)
    pool = pool_of(dataset)
    candidates = candidates or DRAWING[protocol](pool, seed=seed)
    check_candidates(candidates, pool)
    index = CorpusIndex.from_dataset(dataset)
    # Rows are sorted by item and view, photos by their names: nearly the same, but not where one id begins another.
    order = np.argsort(photo_names(dataset), kind="stable")
    firsts = np.unique(np.asarray(dataset["item_id"], dtype=str), return_index=True)[1]
    texts = index.text_ids[firsts]
    embedder = Embedder(model, processor, dataset, index, batch_size=batch_size)
    outcomes = sampled_outcomes(
        embedder.image_feats()[order],
        embedder.text_feats()[texts],
        candidates,
        item_of_photo=pool.item_of_photo,
        text_ids=texts,
        matching=(lambda photo, item: embedder.matching(order[photo], texts[item]))
        if rerank_k and embedder.can_match
        else None,
        rerank_k=rerank_k,
    )
    size = candidates.arrays["image_to_text/candidates"].shape
    drawn = {"draws": size[0], "queries": size[1], "candidates": size[2]}
    drawn["same_subcategory"] = round(same_subcategory_share(candidates, pool), 4)
    return Result(
        protocol=protocol,
        version=1,
        corpus=describe_corpus(dataset, corpus_name, split, len(pool.items)) | drawn,
        metrics=outcomes.metrics(seed),
        outcomes=outcomes,
        candidates=Candidates(candidates.arrays | {"rerank": np.array([rerank_k])}),
    )
