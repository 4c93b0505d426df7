"""Ranks, recalls, average precision and paired AUCs with bootstrap intervals. Pure numpy.

Two rules about ties, and why they differ. Retrieval is pessimistic: a wrong candidate with an equal score stands above
the right one, so a collapsed model (all scores equal) gets recall 0 and not luck. Rankings of words and patches take
the mean over all orders of the tied ones: there the baselines are full of ties (a table by word, a distance from the
centre), and "random" is simply a constant score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

DRAWS = 1000
INTERVAL = (2.5, 97.5)


Tally = tuple[np.ndarray, np.ndarray]
"""Parts and weights, both (n,), of the n units that an interval resamples; the metric is sum(parts) / sum(weights)."""


class Metric(TypedDict):
    """A number, its 95 % bootstrap interval, and how many queries (rows, pairs, batches) it was measured on."""

    value: float
    low: float
    high: float
    n: int


def exact(value: float, n: int) -> Metric:
    """A number that is known and not estimated, such as a chance level: the interval is the number itself."""
    return Metric(value=float(value), low=float(value), high=float(value), n=int(n))


# ------------------------------------------------------------------------------------------------------ intervals


def bootstrap_mean(values: np.ndarray, *, seed: int = 0, draws: int = DRAWS) -> Metric:
    """Mean of `values` (n,) with the percentile bootstrap interval over its entries; NaN entries are left out.

    Example: `bootstrap_mean([1, 0, 1, 1])["value"] == 0.75`.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    return bootstrap_ratio(values, np.ones_like(values), seed=seed, draws=draws)


def bootstrap_ratio(parts: np.ndarray, weights: np.ndarray, *, seed: int = 0, draws: int = DRAWS) -> Metric:
    """sum(parts) / sum(weights), both (n,), resampling the n units (items, batches) that they belong to together.

    `n` of the result counts the units. Nothing to measure gives NaN with n = 0.
    """
    parts, weights = np.asarray(parts, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if parts.shape != weights.shape or parts.ndim != 1:
        raise ValueError(f"parts {parts.shape} and weights {weights.shape} must be one-dimensional and alike")
    keep = weights > 0
    parts, weights = parts[keep], weights[keep]
    if not len(parts):
        return Metric(value=float("nan"), low=float("nan"), high=float("nan"), n=0)
    resampled = [top / bottom for top, bottom in _resample([parts, weights], seed=seed, draws=draws)]
    low, high = np.percentile(resampled, INTERVAL)
    return Metric(value=float(parts.sum() / weights.sum()), low=float(low), high=float(high), n=len(parts))


def bootstrap_mean_of_ratios(
    tallies: Sequence[tuple[np.ndarray, np.ndarray]], *, seeds: Sequence[int] | None = None, draws: int = DRAWS
) -> Metric:
    """Mean over several groups (such as the two directions of retrieval) of sum(parts) / sum(weights) of each.

    Args:
        tallies: (parts, weights), both (units,), a group each; no group is empty.
        seeds: of the resamples, one a group. Groups with one seed have the same units, which are resampled together;
            all are apart by default.
        draws: how many resamples.
    """
    tallies = [tuple(np.asarray(column, dtype=np.float64) for column in tally) for tally in tallies]
    together: dict[int, list[tuple]] = {}
    for seed, tally in zip(range(len(tallies)) if seeds is None else seeds, tallies, strict=True):
        together.setdefault(seed, []).append(tally)
    drawn = []
    for seed, group in together.items():
        sums = _resample([column for tally in group for column in tally], seed=seed, draws=draws)
        drawn += [sums[:, place] / sums[:, place + 1] for place in range(0, 2 * len(group), 2)]
    low, high = np.percentile(np.mean(drawn, axis=0), INTERVAL)
    value = float(np.mean([parts.sum() / weights.sum() for parts, weights in tallies]))
    return Metric(value=value, low=float(low), high=float(high), n=sum(len(parts) for parts, _ in tallies))


def binomial_ends(metric: Metric) -> Metric:
    """The same share, with the exact binomial end where nothing or everything hits and a bootstrap has no width.

    Example: of 50 queries none hits: the interval is [0, 0.071].
    """
    widest = 0.025 ** (1 / max(metric["n"], 1))
    low = min(metric["low"], widest) if metric["value"] == 1 else metric["low"]
    high = max(metric["high"], 1 - widest) if metric["value"] == 0 else metric["high"]
    return Metric(value=metric["value"], low=low, high=high, n=metric["n"])


def _resample(columns: list[np.ndarray], *, seed: int, draws: int, chunk: int = 4_000_000) -> np.ndarray:
    """Sums (draws, columns) of `draws` resamples with replacement; drawn in chunks to bound the memory.

    Hits take few values, so it is enough to draw how often each value comes (multinomial): the same distribution.
    """
    rng, n = np.random.default_rng(seed), len(columns[0])
    table = np.stack(columns, axis=1)
    values, counts = np.unique(table, axis=0, return_counts=True)
    if 4 * len(values) <= n:
        return rng.multinomial(n, counts / n, size=draws) @ values
    sums, step = np.empty((draws, len(columns))), max(1, chunk // n)
    for start in range(0, draws, step):
        stop = min(start + step, draws)
        index = rng.integers(0, n, size=(stop - start, n))
        for column, values in enumerate(columns):
            sums[start:stop, column] = values[index].sum(axis=1)
    return sums


# ------------------------------------------------------------------------------------------------------ retrieval


def ranks(
    scores: np.ndarray, positives: np.ndarray, ignored: np.ndarray | None = None, *, tie: float = 0.0
) -> np.ndarray:
    """Rank (Q,) int64, from 1, of each query's best positive: 1 + the negatives that score at least as much.

    Args:
        scores: (Q, G), larger is better.
        positives: (Q, G) bool, at least one a query.
        ignored: (Q, G) bool, candidates that are no part of the gallery of this query (such as the query itself).
        tie: scores that differ by no more than this are equal: rounding decides nothing.

    Raises:
        ValueError: shapes differ, a score is NaN (it would look like a perfect rank), a query has no positive.

    Example: `ranks([[.9, .5, .9]], [[True, False, False]])` is `[2]`, since the tie counts against the model.
    """
    scores, positives = np.asarray(scores), np.asarray(positives, dtype=bool)
    if scores.shape != positives.shape or scores.ndim != 2:
        raise ValueError(f"scores {scores.shape} and positives {positives.shape} must both be (queries, gallery)")
    if np.isnan(scores.sum()) and np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of {scores.size} scores are NaN: the model diverged")
    outside = None if ignored is None else np.nonzero(ignored)
    rows, columns = np.nonzero(positives if ignored is None else positives & ~np.asarray(ignored, dtype=bool))
    found = np.bincount(rows, minlength=len(scores))
    if not found.all():
        missing = np.flatnonzero(found == 0)
        raise ValueError(
            f"{len(missing)} queries have no positive in the gallery (first: {missing[0]}): leave them out"
        )
    if not len(rows):
        return np.empty(0, dtype=np.int64)
    values = scores[rows, columns]
    border = np.maximum.reduceat(values, np.cumsum(found) - found) - tie
    # Few are positive or ignored, so one pass counts all that reach the border, and these are taken out again.
    above = np.count_nonzero(scores >= border[:, None], axis=1)
    above -= np.bincount(rows[values >= border[rows]], minlength=len(scores))
    if outside is not None:
        above -= np.bincount(outside[0][scores[outside] >= border[outside[0]]], minlength=len(scores))
    return 1 + above


def recall_at_k(rank: np.ndarray, k: int, *, seed: int = 0) -> Metric:
    """Share of queries whose rank is at most `k`, with its interval over queries (see `binomial_ends`)."""
    return binomial_ends(bootstrap_mean(np.asarray(rank) <= k, seed=seed))


def mean_recall(rank_lists: Sequence[np.ndarray], ks: Sequence[int] = (1, 5, 10), *, seed: int = 0) -> Metric:
    """Mean over directions and over `ks` of the recall: the single figure of a retrieval table."""
    hits = [np.mean([np.asarray(rank) <= k for k in ks], axis=0) for rank in rank_lists]
    return bootstrap_mean_of_ratios([(hit, np.ones(len(hit))) for hit in hits], seeds=range(seed, seed + len(hits)))


def chance_recall(num_positives: np.ndarray, num_candidates: np.ndarray, k: int) -> float:
    """Recall@k of a random order: mean over queries of 1 - C(G-P, k) / C(G, k), hypergeometric and exact.

    Example: one positive in a gallery of 100 at k = 10 gives .1.
    """
    positives, gallery = np.broadcast_arrays(np.asarray(num_positives, float), np.asarray(num_candidates, float))
    drawn = np.arange(k).reshape(-1, *([1] * positives.ndim))
    # The j-th draw misses with (G-P-j)/(G-j); the clip covers galleries smaller than k, which always hit.
    misses = np.clip(gallery - positives - drawn, 0, None) / np.clip(gallery - drawn, 1, None)
    return float((1 - misses.prod(axis=0)).mean())


# ------------------------------------------------------------------------------- rankings of the words of one text


def count_at_rate(n: int, rate: float) -> int:
    """How many of n are masked: round(rate n), at least 1, never all; nothing where n < 2."""
    if n < 2:
        return 0
    return min(max(round(rate * n), 1), n - 1)


def average_precision(scores: np.ndarray, relevant: np.ndarray) -> float:
    """AP of the ranking of n candidates, the mean over all orders of tied ones; NaN where nothing is relevant.

    In a run of t ties with r relevant, after N candidates with P relevant, place j holds a relevant one with
    probability r/t, and then (j-1)(r-1)/(t-1) more stand before it on average, so it adds
    r/t (P + 1 + (j-1)(r-1)/(t-1)) / (N + j).

    Example: `average_precision([3, 2, 1], [True, False, True])` is (1/1 + 2/3) / 2.
    """
    starts, sizes, hits = _tie_runs(scores, relevant)
    total = hits.sum()
    if total == 0:
        return float("nan")
    run = np.repeat(np.arange(len(sizes)), sizes)
    place = np.arange(len(run)) - starts[run]
    before = np.cumsum(hits) - hits
    inside = place * (hits[run] - 1) / np.maximum(sizes[run] - 1, 1)
    gains = hits[run] / sizes[run] * (before[run] + 1 + inside) / (np.arange(len(run)) + 1)
    return float(gains.sum() / total)


def precision_at_rate(scores: np.ndarray, relevant: np.ndarray, rate: float) -> float:
    """Share of relevant ones among the hard top `count_at_rate(n, rate)`, ties at the cut shared out; NaN if n < 2."""
    k = count_at_rate(len(scores), rate)
    if k == 0:
        return float("nan")
    starts, sizes, hits = _tie_runs(scores, relevant)
    taken = np.clip(k - starts, 0, sizes)
    return float((hits * taken / sizes).sum() / k)


def _tie_runs(scores: np.ndarray, relevant: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs of equal scores, best first: where each starts, its size, and how many of it are relevant."""
    scores, relevant = np.asarray(scores, dtype=np.float64), np.asarray(relevant, dtype=bool)
    if scores.shape != relevant.shape or scores.ndim != 1:
        raise ValueError(f"scores {scores.shape} and relevant {relevant.shape} must be one-dimensional and alike")
    if np.isnan(scores).any():
        raise ValueError("a score is NaN: leave out what was not measured before ranking")
    _, run, sizes = np.unique(-scores, return_inverse=True, return_counts=True)
    hits = np.bincount(run, weights=relevant, minlength=len(sizes))
    return np.cumsum(sizes) - sizes, sizes, hits


# ---------------------------------------------------------------------------------------------------- paired AUCs


def auc_pairs(
    scores: np.ndarray, shown: np.ndarray, groups: np.ndarray, units: np.ndarray | None = None, *, seed: int = 0
) -> Metric:
    """`auc_tally` with its interval over units.

    Example: `auc_pairs([2, 1], [True, False], [7, 7])["value"] == 1`.
    """
    return bootstrap_ratio(*auc_tally(scores, shown, groups, units), seed=seed)


def auc_tally(scores: np.ndarray, shown: np.ndarray, groups: np.ndarray, units: np.ndarray | None = None) -> Tally:
    """How often a measurement that is shown scores above one of the same group that is not; ties count a half.

    itemAUC: groups = (item, word), units = items: does a view that shows the word score higher than one that does not?
    viewAUC: groups = the vocabulary word, over all items. A table by word, blind to the photo, gets exactly .5 in both.

    Args:
        scores: (n,) one a (row, word) measurement.
        shown: (n,) bool, is the word visible in this row's view.
        groups: (n,) int, pairs are made inside a group only; groups with one kind alone make none.
        units: (n,) int, what the interval resamples (a group lies in one unit); the groups themselves by default.

    Returns:
        Pairs won and pairs, by unit, in ascending order of units.
    """
    scores, shown = np.asarray(scores, dtype=np.float64), np.asarray(shown, dtype=bool)
    if np.isnan(scores).any():
        raise ValueError("a score is NaN: leave out what was not measured before comparing")
    first, group, sizes = np.unique(np.asarray(groups), return_index=True, return_inverse=True, return_counts=True)[1:]
    num = len(sizes)
    positives = np.bincount(group, weights=shown, minlength=num)
    pairs = positives * (sizes - positives)
    # Mann-Whitney: wins = the sum of the shown ones' mid-ranks less what they score among themselves.
    wins = np.bincount(group, weights=_mid_ranks(scores, group, sizes) * shown, minlength=num)
    wins = np.where(pairs > 0, wins - positives * (positives + 1) / 2, 0)
    unit = group[first] if units is None else np.unique(np.asarray(units)[first], return_inverse=True)[1]
    return np.bincount(unit, weights=wins), np.bincount(unit, weights=pairs)


def _mid_ranks(scores: np.ndarray, group: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Rank (n,) from 1 of each score inside its group, equal scores sharing the mean of their ranks."""
    order = np.lexsort((scores, group))
    place = np.arange(len(order)) - (np.cumsum(sizes) - sizes)[group[order]] + 1
    new_run = np.ones(len(order), dtype=bool)
    new_run[1:] = (np.diff(scores[order]) != 0) | (np.diff(group[order]) != 0)
    run = np.cumsum(new_run) - 1
    mean_place = np.bincount(run, weights=place) / np.bincount(run)
    result = np.empty(len(order))
    result[order] = mean_place[run]
    return result
