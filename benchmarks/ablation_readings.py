"""What finished runs measured, as tallies by item: the same items in every run, so that arms can be compared by pairs.

A metric of one run is the mean over groups (such as the two directions of retrieval) of sum(parts) / sum(weights) over
items. Photos count for their item: photos of one item share its text, so they are no queries of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import yaml

from syncmask.evaluation.outcomes import Outcomes, quantity_of
from syncmask.evaluation.result import Result, beside
from syncmask.training.run_folder import RunFolder

# Of what the protocols keep, these are asked item by item and all others photo by photo.
BY_ITEM = ("text_to_image", "words/item_auc")
BOTH_WAYS = ("image_to_text", "text_to_image")

Group = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Names of units (U,), parts (U,) and weights (U,)."""


@dataclass(frozen=True)
class Metric:
    """A figure of a run.

    Attributes:
        label: for tables. read: finished run -> groups; KeyError or NaN where it was not measured.
        better: "higher", "lower" or "" where neither is.
        kind: "share" (shown in %) or "number".
    """

    label: str
    read: Callable[[Finished], list[Group]]
    better: str = "higher"
    kind: str = "share"


@dataclass(frozen=True)
class Table:
    """One metric of every arm and seed.

    Attributes:
        arms: (A,). seeds: (S,), those that every arm has.
        parts, weights: (A, S, G, I), of G groups and I items.
    """

    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    parts: np.ndarray
    weights: np.ndarray


class Finished:
    """A finished run's results and records, read once."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def items(self) -> Outcomes:
        """What each query of the protocol `items` got."""
        return self._outcomes("items")

    @cached_property
    def truth(self) -> Outcomes:
        """What each photo and item of the protocol `co-occurrence` adds; KeyError where it was not run."""
        return self._outcomes("co-occurrence")

    @cached_property
    def lines(self) -> list[dict]:
        """metrics.jsonl."""
        return RunFolder(self.path, is_main=False).lines()

    @cached_property
    def steps(self) -> int:
        """Steps trained, as far as they were logged."""
        return max((line["step"] for line in self.lines if line["split"] == "train"), default=0)

    @cached_property
    def strategy(self) -> str:
        """The strategy that its masks were made by."""
        return yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))["objective"]["mask_strategy"]

    def value(self, protocol: str, metric: str) -> float:
        """A figure of a result; KeyError where it was not measured."""
        return self._result(protocol).metrics[metric]["value"]

    def _result(self, protocol: str) -> Result:
        path = self.path / "results" / f"{protocol}.json"
        if not path.is_file():
            raise KeyError(f"{self.path} has no result of {protocol}")
        return Result.load(path)

    def _outcomes(self, protocol: str) -> Outcomes:
        result = self._result(protocol)
        path = self.path / "results" / f"{protocol}.json"
        return Outcomes.load(beside(path, "queries"), result.queries_sha256)

    def epochs(self) -> list[tuple[int, dict]]:
        """(steps trained in it, what was known of its batches) for each epoch."""
        plans = [line for line in self.lines if line["split"] == "batches"]
        ends = [*(line["step"] for line in plans[1:]), self.steps]
        return [(max(0, end - line["step"]), line) for line, end in zip(plans, ends)]


# ----------------------------------------------------------------------------------------------------------- metrics


def recall(*directions: str, reading: str = "itc", k: int = 10) -> Callable[[Finished], list[Group]]:
    """Recall@k of the protocol `items`, the mean over directions."""
    return lambda run: [_of_items(run.items, f"{way}/{reading}", (k,)) for way in directions]


def kept(metric: str) -> Callable[[Finished], list[Group]]:
    """A ratio that `co-occurrence` keeps."""
    return lambda run: [_of_items(run.truth, metric)]


def kept_of_masks(metric: str) -> Callable[[Finished], list[Group]]:
    """The same of the strategy that the run's own masks were made by; KeyError where they were random."""
    return lambda run: [_of_items(run.truth, f"{metric}/{run.strategy}")]


def mim_error(run: Finished) -> list[Group]:
    """Mean squared error on the fixed, truly co-occurring masks, each photo with its own text.

    The text gap is kept as (rise, error) of each photo.
    """
    name = "text_gap/relative_rise/truth_masks"
    units, errors = run.truth.ids[quantity_of(name)], run.truth.values[name][:, 1]
    return [(item_names(quantity_of(name), units), errors, np.ones(len(errors)))]


def figure(*terms: tuple[str, float]) -> Callable[[Finished], list[Group]]:
    """A weighted sum of figures of `co-occurrence` that are known a run at a time, not by item."""
    return lambda run: _alone(sum(weight * run.value("co-occurrence", name) for name, weight in terms))


def of_batches(name: str) -> Callable[[Finished], list[Group]]:
    """Mean over steps of what was known of the batches when their epoch was planned; KeyError where it was not."""

    def read(run: Finished) -> list[Group]:
        steps, plans = zip(*run.epochs())
        return _alone(float(np.average([plan[name] for plan in plans], weights=np.maximum(steps, 1))))

    return read


def of_steps(name: str) -> Callable[[Finished], list[Group]]:
    """Mean over logged steps of a figure."""
    return lambda run: _alone(float(np.mean([line[name] for line in run.lines if line["split"] == "train"])))


PAIRS, ITM = "false_negatives/pairs/", "false_negatives/itm/"
METRICS: dict[str, Metric] = {
    "recall_at_10": Metric("recall@10, both ways", recall(*BOTH_WAYS)),
    "recall_at_10_photo": Metric("recall@10, photo to text", recall("image_to_text")),
    "recall_at_10_text": Metric("recall@10, text to photo", recall("text_to_image")),
    "recall_at_10_tolerant": Metric("tolerant recall@10, both ways", recall(*BOTH_WAYS, reading="itc_tolerant")),
    "recall_at_10_matching": Metric("recall@10 re-ranked by ITM", recall(*BOTH_WAYS, reading="itm")),
    "text_gap": Metric("MIM text gap", kept("text_gap/relative_rise/truth_masks")),
    "mim_error": Metric("MIM error, fixed masks", mim_error, better="lower", kind="number"),
    "word_gain_attention": Metric("words over random, attention", kept("words/precision_gain/attention")),
    "word_gain_evidence": Metric("words over random, evidence", kept("words/precision_gain/evidence")),
    "item_auc_attention": Metric("itemAUC, attention", kept("words/item_auc/attention")),
    "item_auc_evidence": Metric("itemAUC, evidence", kept("words/item_auc/evidence")),
    "word_gain_masks": Metric("words over random, by the arm's masks", kept_of_masks("words/precision_gain")),
    "item_auc_masks": Metric("itemAUC, by the arm's masks", kept_of_masks("words/item_auc")),
    "patch_gain_attention": Metric("patches over random, attention", kept("patches/precision_gain/attention")),
    "fn_rule_1": Metric("pair FN, rule 1", figure((f"{PAIRS}rule_1", 1)), better="lower"),
    "fn_rules_1_2": Metric("pair FN, rules 1-2", figure((f"{PAIRS}rules_1_2", 1)), better="lower"),
    "fn_rule_2": Metric(
        "pair FN, rules 1-2 less rule 1", figure((f"{PAIRS}rules_1_2", 1), (f"{PAIRS}rule_1", -1)), better="lower"
    ),
    "itm_fn_rule_1": Metric("ITM FN, rule 1", figure((f"{ITM}rule_1", 1)), better="lower"),
    "itm_fn_rules_1_2": Metric("ITM FN, rules 1-2", figure((f"{ITM}rules_1_2", 1)), better="lower"),
    "fn_trained": Metric("pair FN, as trained", of_batches("false_negative_rate"), better="lower"),
    "grouped_steps": Metric("steps in grouped epochs", of_batches("grouped"), better=""),
    "scored_masks": Metric("strength of scored masks", of_steps("mask_strength"), better=""),
}
"""Figures by the name that benchmarks/ablations.yaml calls them by."""


def table_of(metric: str, runs: Mapping[str, Mapping[int, Finished]]) -> Table | None:
    """One metric of all arms, over the seeds that every arm has; None where a run did not measure it.

    Args:
        metric: a key of METRICS. runs: arm -> seed -> finished run.

    Raises:
        ValueError: two runs were asked other queries.
    """
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in runs.values()))) if runs else []
    if not seeds:
        return None
    try:
        found = [[METRICS[metric].read(by_seed[seed]) for seed in seeds] for by_seed in runs.values()]
    except KeyError:
        return None
    names = np.unique(np.concatenate([units for units, _, _ in found[0][0]]))
    for groups in (groups for arm in found for groups in arm):
        if any(not np.array_equal(one[0], first[0]) for one, first in zip(groups, found[0][0], strict=True)):
            raise ValueError(f"{metric}: two runs were asked other queries; train them on the same corpus")
    parts, weights = (
        np.array([[[_sums(group[0], group[place], names) for group in groups] for groups in arm] for arm in found])
        for place in (1, 2)
    )
    return Table(tuple(runs), tuple(seeds), parts, weights)


def _sums(units: np.ndarray, values: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Values summed by item (I,)."""
    return np.bincount(np.searchsorted(names, units), weights=values, minlength=len(names))


def item_names(quantity: str, units: np.ndarray) -> np.ndarray:
    """The items of kept units; a photo is called "item/view/number"."""
    if quantity in BY_ITEM:
        return np.asarray(units, dtype=str)
    return np.array([unit.rsplit("/", 2)[0] for unit in units], dtype=str)


def _of_items(outcomes: Outcomes, name: str, at: Sequence[int] = ()) -> Group:
    """Kept values as a group: ranks by whether they reach `at`, ratios as they are."""
    quantity, values = quantity_of(name), outcomes.values[name]
    items = item_names(quantity, outcomes.ids[quantity])[outcomes.units[name]]
    if at:
        return items, np.mean([values <= k for k in at], axis=0), np.ones(len(values))
    return items, values[:, 0].astype(float), values[:, 1].astype(float)


def _alone(value: float) -> list[Group]:
    """A figure of a whole run: no queries to resample."""
    return [(np.array([""]), np.array([value]), np.ones(1))]
