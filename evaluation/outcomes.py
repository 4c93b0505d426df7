"""What each query got, and how every metric follows from it: intervals and paired comparisons come from one place.

Kept beside a result as PROTOCOL.queries.npz, which is also where to look for the queries that failed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from .archive import read_arrays, write_arrays
from .classification import bootstrap_f1, cell_draws, cells_of, macro_f1, macro_f1_union
from .metrics import INTERVAL, Metric, Tally, binomial_ends, bootstrap_mean_of_ratios, bootstrap_ratio

MEAN, RATIO, F1, F1_UNION = "mean", "ratio", "macro_f1", "macro_f1_union"
F1_MEASURES = {F1: macro_f1, F1_UNION: macro_f1_union}


@dataclass(frozen=True)
class Measure:
    """How a metric follows from kept values.

    Attributes:
        of: names of values; the metric is the mean over them.
        at: where the values are ranks, the k of recall@k, averaged; empty = the values' own mean.
        how: MEAN; of one name, RATIO of values (n, 2) of parts and weights, one a unit, or F1 or F1_UNION of values
            (n, 2) of truth and prediction.
        labels: of F1 and F1_UNION, how many labels there are.
    """

    of: tuple[str, ...]
    at: tuple[int, ...] = ()
    how: str = MEAN
    labels: int = 0


@dataclass
class Outcomes:
    """Values of queries by name (QUANTITY/SCORE) and the metrics that follow from them, in the order of a table.

    Attributes:
        ids: by quantity, (Q,) str, who was asked.
        values: by name, (n,) ranks or hits, or (n, 2) as its measure has it.
        units: by name, (n,) positions in the quantity's ids. A query that was asked in several draws is several
            entries of one unit; intervals resample units.
        measures: by metric.
        known: by metric, numbers that no query can change, such as chance.
    """

    ids: dict[str, np.ndarray] = field(default_factory=dict)
    values: dict[str, np.ndarray] = field(default_factory=dict)
    units: dict[str, np.ndarray] = field(default_factory=dict)
    measures: dict[str, Measure] = field(default_factory=dict)
    known: dict[str, Metric] = field(default_factory=dict)
    _order: list[str] = field(default_factory=list)

    def add(self, name: str, values: np.ndarray, units: np.ndarray | None = None) -> None:
        """Keep values (n,) or (n, 2) as QUANTITY/SCORE; `units` (n,) are positions in the quantity's ids, 0 ... n-1."""
        ids = self.ids[quantity_of(name)]
        units = np.arange(len(values)) if units is None else np.asarray(units)
        if len(units) != len(values) or (len(units) and units.max() >= len(ids)):
            raise ValueError(f"{name}: {len(values)} values and {len(units)} units do not fit {len(ids)} ids")
        self.values[name], self.units[name] = np.asarray(values), units.astype(np.int32)

    def define(self, metric: str, measured: Measure | Metric) -> None:
        """The next line of the table: how a metric follows from the values, or a number that is known."""
        (self.measures if isinstance(measured, Measure) else self.known)[metric] = measured
        self._order.append(metric)

    def recalls(self, quantity: str, scores: Sequence[str], ks: Sequence[int]) -> None:
        """Define QUANTITY/recall@K/SCORE for each."""
        for k in ks:
            for score in scores:
                self.define(f"{quantity}/recall@{k}/{score}", Measure((f"{quantity}/{score}",), (k,)))

    def ratio(self, metric: str, tally: Tally, ids: np.ndarray) -> None:
        """Keep a tally and define its metric; `ids` (n,) str name the units of its quantity, in the tally's order."""
        if len(ids) != len(tally[0]):
            raise ValueError(f"{metric}: {len(tally[0])} units do not fit {len(ids)} ids")
        self.ids[quantity_of(metric)] = np.asarray(ids, dtype=str)
        self.add(metric, np.stack(tally, axis=1))
        self.define(metric, Measure((metric,), how=RATIO))

    def metrics(self, seed: int = 0) -> dict[str, Metric]:
        """All metrics with their intervals, in the order in which they were defined."""
        return {
            name: self.known[name] if name in self.known else self._metric(self.measures[name], seed)
            for name in self._order
        }

    def _metric(self, measure: Measure, seed: int) -> Metric:
        if measure.how in F1_MEASURES:
            truth, predicted = self.values[measure.of[0]].T
            return bootstrap_f1(F1_MEASURES[measure.how], truth, predicted, measure.labels, seed=seed)
        if measure.how == RATIO:
            return bootstrap_ratio(*self.values[measure.of[0]].T, seed=seed)
        tallies = [self.tally(name, measure.at) for name in measure.of]
        return binomial_ends(bootstrap_mean_of_ratios(tallies, seeds=seeds_of(measure.of, seed)))

    def tally(self, name: str, at: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Sum of the values (or of the hits at `at`) of each unit (U,), and how many entries it has (U,), never 0."""
        values = self.values[name].astype(np.float64)
        if at:
            values = np.mean([values <= k for k in at], axis=0)
        counts = np.bincount(self.units[name])
        kept = counts > 0
        return np.bincount(self.units[name], weights=values)[kept], counts[kept]

    def arrays(self) -> dict[str, np.ndarray]:
        """As plain arrays, for a file."""
        measures = {name: asdict(self.measures[name]) for name in self._order if name in self.measures}
        return (
            {f"ids/{name}": np.asarray(ids, dtype=str) for name, ids in self.ids.items()}
            | {f"values/{name}": values for name, values in self.values.items()}
            | {f"units/{name}": units for name, units in self.units.items()}
            | {"measures": np.array(json.dumps(measures))}
        )

    def save(self, path: str | Path) -> str:
        """Write the file; returns the sha256 of its contents."""
        return write_arrays(path, self.arrays())

    @classmethod
    def load(cls, path: str | Path, sha256: str = "") -> Outcomes:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another file, or contents with another hash than `sha256` (where that is given).
        """
        arrays = read_arrays(path, sha256)
        if "measures" not in arrays:
            raise ValueError(f"{path} holds no queries of a protocol: it lacks 'measures'")
        parts = {kind: _under(arrays, kind) for kind in ("ids", "values", "units")}
        measures = {
            name: Measure(**kept | {"of": tuple(kept["of"]), "at": tuple(kept["at"])})
            for name, kept in json.loads(str(arrays["measures"])).items()
        }
        return cls(**parts, measures=measures, _order=list(measures))


def difference(first: Outcomes, second: Outcomes, metric: str, *, seed: int = 0) -> tuple[Metric, int]:
    """Change (second - first) of a metric, both on the same resamples (a paired bootstrap), and how many units differ.

    Raises:
        ValueError: the two asked other queries or defined the metric in another way.
    """
    measure = first.measures[metric]
    if second.measures[metric] != measure:
        raise ValueError(f"{metric} is not measured alike: {measure} and {second.measures[metric]}")
    for name in measure.of:
        same = first.units[name].shape == second.units[name].shape and (first.units[name] == second.units[name]).all()
        if not same or not np.array_equal(first.ids[quantity_of(name)], second.ids[quantity_of(name)]):
            raise ValueError(f"{metric}: the two results asked other queries; evaluate both on the same candidates")
    if measure.how in F1_MEASURES:
        return _f1_difference(first, second, measure, seed)
    if measure.how == RATIO:
        return _ratio_difference(first, second, measure, seed)
    tallies, differ = [], 0
    for name in measure.of:
        one, weights = first.tally(name, measure.at)
        other, _ = second.tally(name, measure.at)
        tallies.append((other - one, weights))
        differ += int((other != one).sum())
    return bootstrap_mean_of_ratios(tallies, seeds=seeds_of(measure.of, seed)), differ


def _f1_difference(first: Outcomes, second: Outcomes, measure: Measure, seed: int) -> tuple[Metric, int]:
    name, by = measure.of[0], F1_MEASURES[measure.how]
    rows = np.column_stack([first.values[name], second.values[name][:, 1]])
    (truth, one, other), counts = cells_of(rows)
    differ = int(counts[one != other].sum())

    def gain(weights: np.ndarray) -> float:
        return by(truth, other, measure.labels, weights) - by(truth, one, measure.labels, weights)

    low, high = np.percentile([gain(drawn) for drawn in cell_draws(counts, seed=seed)], INTERVAL)
    return Metric(value=gain(counts), low=float(low), high=float(high), n=int(counts.sum())), differ


def _ratio_difference(first: Outcomes, second: Outcomes, measure: Measure, seed: int) -> tuple[Metric, int]:
    both = np.concatenate([first.values[measure.of[0]], second.values[measure.of[0]]], axis=1)
    parts, weights, other_parts, other_weights = both[(both[:, 1] > 0) | (both[:, 3] > 0)].T
    if not len(parts):
        return bootstrap_ratio(parts, weights), 0
    # Twice the mean of the second's ratio and the first's negative one, on the same resamples.
    doubled = [(2 * other_parts, other_weights), (-2 * parts, weights)]
    change = bootstrap_mean_of_ratios(doubled, seeds=[seed, seed])
    differ = int((parts * other_weights != other_parts * weights).sum())
    return Metric(value=change["value"], low=change["low"], high=change["high"], n=len(parts)), differ


def quantity_of(name: str) -> str:
    """The quantity of QUANTITY/SCORE."""
    return name.rsplit("/", 1)[0]


def seeds_of(names: Sequence[str], seed: int) -> list[int]:
    """One seed a quantity: values of the same queries are resampled together, those of others apart."""
    order = list(dict.fromkeys(quantity_of(name) for name in names))
    return [seed + order.index(quantity_of(name)) for name in names]


def _under(arrays: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(f"{kind}/"): array for name, array in arrays.items() if name.startswith(f"{kind}/")}
