"""Two results side by side: is the difference more than the luck of these queries? A paired bootstrap tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .metrics import Metric
from .outcomes import Outcomes, difference
from .result import Result, aligned, beside, cell, comparable, percent

# A sign test over fewer queries that differ cannot reach 5 %, whatever the bootstrap says: 2 x 0.5^5 = 6.25 %.
FEWEST = 6
BETTER, WORSE, SAME = "higher", "lower", "not distinguishable"
NOTE = (
    "In %. The difference is second less first, with a 95 % interval of a paired bootstrap over the same queries. "
    "'not distinguishable': the interval holds 0, or fewer than 6 queries differ. Of twenty lines one is called "
    "different by luck alone; seeds of training are another luck that this does not measure."
)


@dataclass(frozen=True)
class Line:
    """One metric of two results: their own figures, second - first, and what may be said of it."""

    name: str
    first: Metric
    second: Metric
    change: Metric
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """All metrics that both results keep queries of; `left_out` those that only one of them has.

    `remarks`: what differs though it makes them no less comparable.
    """

    protocol: str
    lines: list[Line]
    left_out: list[str]
    remarks: list[str]

    def table(self) -> str:
        """A plain-text table with a line a metric."""
        cells = [["", "first", "second", "difference", ""]]
        for line in self.lines:
            cells.append([line.name, cell(line.first), cell(line.second), _signed(line.change), line.verdict])
        tail = [*self.remarks, *([f"in one of them only: {', '.join(self.left_out)}"] if self.left_out else [])]
        return "\n".join([self.protocol, "", *aligned(cells), "", *tail, NOTE])

    def content(self) -> dict:
        """As plain data, for JSON."""
        lines = {
            line.name: {"first": line.first, "second": line.second, "change": line.change, "verdict": line.verdict}
            for line in self.lines
        }
        return {"protocol": self.protocol, "metrics": lines, "left_out": self.left_out, "remarks": self.remarks}


def compare(first: str | Path, second: str | Path, *, seed: int = 0) -> Comparison:
    """Compares two results by the queries that are kept beside them.

    Args:
        first: a results/PROTOCOL.json.
        second: the same of another model.
        seed: of the bootstrap.

    Raises:
        ValueError: unlike protocols, versions, corpora or candidates; a file of queries that belongs to another result.
        FileNotFoundError: a result, or the queries beside it, is not there.
    """
    results = [Result.load(path) for path in (first, second)]
    comparable(*results)
    outcomes = [_outcomes(path, result) for path, result in zip((first, second), results)]
    lines = compare_outcomes(*outcomes, *(result.metrics for result in results), seed=seed)
    measured = [set(part.measures) for part in outcomes]
    return Comparison(
        protocol=f"{results[0].protocol} (version {results[0].version})",
        lines=lines,
        left_out=sorted(measured[0] ^ measured[1]),
        remarks=_remarks(*results),
    )


def compare_outcomes(
    first: Outcomes,
    second: Outcomes,
    first_metrics: Mapping[str, Metric],
    second_metrics: Mapping[str, Metric],
    *,
    seed: int = 0,
) -> list[Line]:
    """One line for each metric that both have, in the first one's order."""
    lines = []
    for name in first.measures:
        if name in second.measures:
            change, differ = difference(first, second, name, seed=seed)
            lines.append(Line(name, first_metrics[name], second_metrics[name], change, verdict(change, differ)))
    return lines


def verdict(change: Metric, differ: int) -> str:
    """What an interval of a difference, with `differ` queries that differ at all, lets one say of the second result."""
    if differ < FEWEST or change["low"] <= 0 <= change["high"]:
        return SAME
    return BETTER if change["value"] > 0 else WORSE


def _outcomes(path: str | Path, result: Result) -> Outcomes:
    if not result.queries_sha256:
        raise ValueError(f"{path} keeps nothing of single queries, so it cannot be compared; evaluate the model again")
    return Outcomes.load(beside(path, "queries"), result.queries_sha256)


def _remarks(first: Result, second: Result) -> list[str]:
    """The same texts and items, but a corpus that was read from elsewhere or in another way."""
    remarks = []
    if first.corpus.get("fingerprint") != second.corpus.get("fingerprint"):
        remarks.append("the two corpora agree in items and texts; their fingerprints cannot tell whether in photos too")
    for name, one in first.versions.items():
        if second.versions.get(name) != one:
            remarks.append(f"{name} {one} in the first, {second.versions.get(name, 'none')} in the second")
    return remarks


def _signed(change: Metric) -> str:
    parts = [percent(change[end]) for end in ("value", "low", "high")]
    value, low, high = (f"+{part}" if float(part) > 0 else part for part in parts)
    return f"{value} [{low}, {high}]"
