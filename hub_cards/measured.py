"""The results of a run as a card shows them: checked, cleaned of what tells of a machine, as tables and as metadata."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, EvalResultEntry

from syncmask.evaluation.loading import MODEL, sha256
from syncmask.evaluation.protocol_names import Protocol
from syncmask.evaluation.result import Result, cell, check_seal, counts, pivot

from .headlines import HEADLINES, SCORES, Headline
from .public import public

# Second readings of a score, which the results' files keep.
FURTHER = ("_duplicates", "_swapped", "_both_orders", "_mean", "_own", "_sd")
NO_DATASET = "not-on-the-hub"  # The Hub takes a dataset's type for the name of one that it has.
OF_THE_TEACHER = ("co-occurrence",)  # So no figures of the model that is published.
TASKS = {"recognition": "image-classification"}
RETRIEVAL_TASK = "information-retrieval"  # Of retrieval the Hub knows no task by a photo and a text.


@dataclass(frozen=True)
class Measured:
    """A result that may be published: its file's stem, and what it says."""

    stem: str
    result: Result

    @property
    def title(self) -> str:
        """Protocol and version."""
        return f"`{self.result.protocol}` (version {self.result.version})"

    @property
    def dataset(self) -> str:
        """The corpus by its name, and whether that can be had."""
        about = self.result.corpus
        kinds = {"hub": "", "generated": " (drawn by syncmask)"}
        return f"{about['name']}{kinds.get(about.get('source'), ' (not published)')}"

    @property
    def corpus(self) -> str:
        """What it was measured on, in words."""
        about = self.result.corpus
        sizes = [f"{about[key]:,} {key}" for key in ("rows", "items") if isinstance(about.get(key), int)]
        return ", ".join([self.dataset, f"split {about.get('split', 'unknown')}", *sizes])

    @property
    def warning(self) -> str:
        """What makes its figures incomparable; "" where nothing does."""
        about = self.result.corpus
        if about.get("comparable", True):
            return ""
        return f"{about.get('missing_photos', 'Some')} photos were missing: figures not comparable with others'."

    def headlines(self) -> list[tuple[str, str, str]]:
        """(what, this model, what to read it against) of the figures that come first."""
        metrics = self.result.metrics
        return [
            (
                line.words,
                cell(metrics[line.metric]),
                "; ".join(f"{_score(name)} {cell(metrics[name])}" for name in line.against if name in metrics),
            )
            for line in HEADLINES.get(self.result.protocol, ())
            if line.metric in metrics
        ]

    def tables(self) -> list[tuple[list[str], list[list[str]]]]:
        """(head, rows) of each quantity's figures but second readings, values in %, ready for Markdown."""
        tables = []
        for quantity, rows, figures in pivot(self.result.metrics):
            kept = {score: row for score, row in rows.items() if not score.endswith(FURTHER)}
            shown = [
                name for name in figures if not name.endswith(FURTHER) and any(name in row for row in kept.values())
            ]
            head = [quantity.replace("_", " "), *(name.replace("_", " ") for name in shown), "n"]
            body = [
                [f"`{score}`", *(cell(row.get(name)) for name in shown), counts(row)] for score, row in kept.items()
            ]
            tables += [(head, body)] if shown else []
        return tables

    def scores(self) -> dict[str, str]:
        """What the scores of its tables mean."""
        names = {_score(name) for name in self.result.metrics}
        return {name: meaning for name, meaning in SCORES.items() if name in names}


def read_measured(run: Path) -> list[Measured]:
    """Read results/*.json of a run, each held to its seal and to the weights in final/; those of the teacher last.

    Raises:
        ValueError: a file that was changed, has no seal, or was measured on other weights.
    """
    files = sorted((run / "results").glob("*.json"))
    weights = sha256(run / "final" / MODEL) if files else ""
    found = []
    for file in files:
        check_seal(file)
        result = Result.load(file)
        check_weights(file, result, weights)
        found.append(Measured(file.stem, public(result)))
    return sorted(found, key=lambda one: one.result.protocol in OF_THE_TEACHER)


def check_weights(file: Path, result: Result, weights: str) -> None:
    """Raise a ValueError where a result is of other weights than those that are published.

    `co-occurrence` measures the teacher that a run kept, and names the weights in final/ that it belongs to.
    """
    seen = result.model.get("sha256", "")
    if seen != weights:
        raise ValueError(
            f"{file} was measured on other weights (sha256 {seen[:12] or 'unknown'}...) than those in final/ "
            f"({weights[:12]}...): on a checkpoint, or before training went on; measure the run itself again: "
            f"`syncmask evaluate RUN --protocol {result.protocol}`"
        )


def not_measured(measured: Sequence[Measured]) -> list[str]:
    """Names of the protocols that there is no result of."""
    done = {one.result.protocol for one in measured}
    return [protocol.value for protocol in Protocol if protocol.value not in done]


def published_lines(result: Result) -> list[Headline]:
    """The headlines that were measured, of the model that is published and not of its teacher."""
    lines = HEADLINES.get(result.protocol, ()) if result.protocol not in OF_THE_TEACHER else ()
    return [line for line in lines if not math.isnan(result.metrics.get(line.metric, {}).get("value", math.nan))]


def eval_results(measured: Sequence[Measured]) -> list[EvalResult]:
    """The headlines as entries of a card's `model-index`, values as shares of 1; each names its protocol."""
    found = []
    for one in measured:
        about, result = one.result.corpus, one.result
        for line in published_lines(result):
            metric = result.metrics[line.metric]
            found.append(
                EvalResult(
                    task_type=TASKS.get(result.protocol.partition("-")[0], RETRIEVAL_TASK),
                    task_name=None,
                    dataset_type=about["name"] if about.get("source") == "hub" else NO_DATASET,
                    dataset_name=one.dataset,
                    dataset_split=about.get("split"),
                    metric_type=line.metric.split("/")[1],
                    metric_value=round(metric["value"], 4),
                    metric_name=f"{result.protocol} (version {result.version}): {line.words}",
                    metric_args={
                        "score": line.metric,
                        "low": round(metric["low"], 4),
                        "high": round(metric["high"], 4),
                        "n": int(metric["n"]),
                    },
                )
            )
    return found


def eval_entries(one: Measured) -> list[EvalResultEntry]:
    """The first headline of a result as an entry of `.eval_results/`; [] unless its corpus is a dataset on the Hub.

    That form names a benchmark by its dataset, and asks for one value a task.
    """
    about, result = one.result.corpus, one.result
    lines = published_lines(result)
    if about.get("source") != "hub" or not lines:
        return []
    metric = result.metrics[lines[0].metric]
    notes = f"{lines[0].metric} by protocol {result.protocol} version {result.version}, split {about.get('split')}"
    return [
        EvalResultEntry(
            dataset_id=about["name"],
            task_id=result.protocol,
            value=round(100 * metric["value"], 2),
            notes=f"{notes}; 95 % interval {100 * metric['low']:.1f} to {100 * metric['high']:.1f}, n {metric['n']}",
        )
    ]


def _score(metric: str) -> str:
    return metric.rpartition("/")[2]
