"""Is a difference between arms more than the luck of queries and of seeds? Pure functions on plain arrays.

Queries are resampled: the same items for every run, so that comparisons are paired. Seeds are not: with three of them a
bootstrap never leaves the span of the three, and its "95 %" intervals hold the truth in 75 % at most. Instead the
seeds' paired differences are taken to be normal, and their luck is drawn from Student's t with seeds - 1 degrees of
freedom (our choice; tests/test_ablations.py measures how often nothing is called something).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .ablation_readings import Table

DRAWS = 4000
INTERVAL = (2.5, 97.5)
LEVEL = 0.05
ROUNDING = 1e-9  # what is this near to nothing is nothing, however little it varies
HELPS, HURTS, SAME = "helps", "hurts", "not distinguishable"


@dataclass(frozen=True)
class Estimate:
    """A weighted sum (or product) of arms.

    Attributes:
        value: the mean over seeds. low, high: its 95 % interval; NaN with one seed.
        p: how often luck alone is as far from `level` as the value is; NaN with one seed.
        by_seed: (S,).
        level: what it is held against.
    """

    value: float
    low: float
    high: float
    p: float
    by_seed: tuple[float, ...]
    level: float = 0.0


def contrast(
    table: Table,
    of: Mapping[str, float],
    *,
    ratio: bool = False,
    level: float = 0.0,
    draws: int = DRAWS,
    seed: int = 0,
) -> Estimate:
    """A weighted sum of arms with its interval over queries and seeds.

    d[s] = sum_a w[a] m[a, s];  value = mean_s d[s];  luck = (queries', see `shared_luck`) + t[S-1] sd(d) / sqrt(S)

    Args:
        table: the metric. of: arm -> weight. level: what the sum is held against.
        ratio: sum logarithms instead: weights are powers, the value a ratio (a geometric mean over seeds), held
            against 1. NaN where a metric is not above 0.
        draws, seed: of the luck.

    Example: `contrast(table, {"masks": 1, "neither": -1})` is what masks add to the arm without.
    """
    level = 1.0 if ratio else level
    weights = np.array([of.get(arm, 0.0) for arm in table.arms])[:, None]
    rng = np.random.default_rng(seed)
    own = _sum_of_arms(values(table), weights, ratio)  # (S,)
    resampled = _sum_of_arms(resample(table, draws, rng), weights, ratio)  # (draws, S)
    mean, count, held = own.mean(), len(own), np.log(level) if ratio else level
    ends = np.exp if ratio else lambda numbers: numbers
    by_seed = tuple(float(one) for one in ends(own))
    if count < 2 or not np.isfinite(own).all() or not np.isfinite(resampled).all():
        return Estimate(float(ends(mean)), *[float("nan")] * 3, by_seed, level)
    luck = shared_luck(own, resampled) + rng.standard_t(count - 1, draws) * own.std(ddof=1) / np.sqrt(count)
    low, high = np.percentile(mean + luck, INTERVAL)
    away = abs(mean - held)
    p = (1 + (np.abs(luck) >= away).sum()) / (draws + 1) if away > ROUNDING else 1.0
    return Estimate(float(ends(mean)), float(ends(low)), float(ends(high)), float(p), by_seed, level)


def shared_luck(own: np.ndarray, resampled: np.ndarray) -> np.ndarray:
    """The part of the queries' luck (draws,) that all seeds share: how easy these items are for these arms.

    The bootstrap of the mean over seeds also holds each run's own noise on these items, var(own noise) / S. The spread
    of seeds holds that too, and it must not count twice: the bootstrap is scaled down by what it contains of it.

    Args:
        own: d (S,). resampled: d on resampled items (draws, S).
    """
    luck = resampled.mean(axis=1) - own.mean()
    apart = (resampled - own) - luck[:, None]
    noise = apart.var(axis=0).sum() / (len(own) - 1)
    whole = luck.var()
    return luck * np.sqrt(max(0.0, 1 - noise / len(own) / whole)) if whole > 0 else luck


def values(table: Table) -> np.ndarray:
    """The metric of every run (A, S): the mean over groups of sum(parts) / sum(weights)."""
    return _ratios(table.parts.sum(axis=-1), table.weights.sum(axis=-1))


def resample(table: Table, draws: int, rng: np.random.Generator) -> np.ndarray:
    """The metric of every run on the same resampled items (draws, A, S); a figure without items stays itself."""
    items = table.parts.shape[-1]
    times = rng.multinomial(items, np.full(items, 1 / items), size=draws).astype(np.float64)
    parts, weights = (np.tensordot(times, column, axes=([1], [3])) for column in (table.parts, table.weights))
    return _ratios(parts, weights)


def _ratios(parts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return (parts / weights).mean(axis=-1)


def _sum_of_arms(metric: np.ndarray, weights: np.ndarray, ratio: bool) -> np.ndarray:
    """(..., A, S) -> (..., S); arms of weight 0 cannot spoil it."""
    used = weights[:, 0] != 0
    with np.errstate(invalid="ignore", divide="ignore"):
        terms = np.log(metric[..., used, :]) if ratio else metric[..., used, :]
    return (terms * weights[used]).sum(axis=-2)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p by Holm over one family; NaN (nothing measured) stays NaN and counts for nobody.

    Example: `holm([0.01, 0.04, 0.03])` is `[0.03, 0.06, 0.06]`.
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    known = np.flatnonzero(~np.isnan(p_values))
    order = known[np.argsort(p_values[known], kind="stable")]
    adjusted = np.full(len(p_values), np.nan)
    steps = p_values[order] * (len(order) - np.arange(len(order)))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(steps)) if len(order) else steps
    return adjusted.tolist()


def verdict(estimate: Estimate, adjusted_p: float, better: str) -> str:
    """What may be said of a comparison: HELPS, HURTS or SAME.

    Args:
        estimate: of it. adjusted_p: see `holm`; NaN says nothing. better: "higher" or "lower".
    """
    if not adjusted_p < LEVEL:
        return SAME
    rises = estimate.value > estimate.level
    return HELPS if rises == (better != "lower") else HURTS
