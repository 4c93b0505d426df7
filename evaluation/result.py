"""A protocol's result: what was measured, on what, by which model; saved as results/PROTOCOL.json of a run folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from .archive import write_text
from .candidates import Candidates
from .metrics import Metric
from .outcomes import Outcomes

SCHEMA = ("protocol", "version", "corpus", "model", "metrics", "candidates_sha256", "command", "versions")
SEAL = "seal"
NOTE = "In %, with 95 % bootstrap intervals over the n queries, rows, items or batches that were measured."


@dataclass
class Result:
    """Metrics of one protocol with everything that is needed to compare them honestly.

    A metric's name is QUANTITY/FIGURE/SCORE, as in `image_to_text/recall@10/itc`. What a figure must be read against
    is a score of its own beside it: `.../chance`, `.../random`, `.../oracle`. What each query got and the candidate
    lists, where the protocol keeps them, are saved beside the result and named in it by their hashes.
    """

    protocol: str
    version: int
    corpus: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)
    metrics: dict[str, Metric] = field(default_factory=dict)
    candidates_sha256: str = ""
    queries_sha256: str = ""
    command: str = field(default_factory=lambda: " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    versions: dict[str, str] = field(default_factory=lambda: library_versions())
    outcomes: Outcomes | None = field(default=None, repr=False, compare=False)
    candidates: Candidates | None = field(default=None, repr=False, compare=False)

    def __post_init__(self):
        if self.candidates is not None and not self.candidates_sha256:
            self.candidates_sha256 = self.candidates.sha256

    def value(self, name: str) -> float:
        """The value of one metric; an unknown name raises a KeyError that lists those of the same quantity."""
        if name not in self.metrics:
            near = [known for known in self.metrics if known.split("/")[0] == name.split("/")[0]]
            raise KeyError(f"{self.protocol} has no metric {name!r}; it has {near or sorted(self.metrics)}")
        return self.metrics[name]["value"]

    def content(self) -> dict:
        """What the JSON file holds, sealed; a metric that could not be measured has null for a value."""
        content = {name: getattr(self, name) for name in SCHEMA}
        content["metrics"] = {name: _jsonable(metric) for name, metric in self.metrics.items()}
        content |= {"queries_sha256": self.queries_sha256} if self.queries_sha256 else {}
        return content | {SEAL: seal_of(content)}

    def save(self, path: str | Path) -> Path:
        """Writes JSON to `path` (a file, or a folder that gets PROTOCOL.json), whole or not at all.

        Beside it go PROTOCOL.queries.npz and PROTOCOL.candidates.npz, where the result has them.
        """
        path = Path(path)
        path = path / f"{self.protocol}.json" if path.suffix != ".json" else path
        if self.outcomes is not None:
            self.queries_sha256 = self.outcomes.save(beside(path, "queries"))
        if self.candidates is not None:
            self.candidates.save(beside(path, "candidates"))
        return write_text(path, json.dumps(self.content(), indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Reads what `save` wrote; a file of another schema raises a ValueError that says what is missing.

        The seal is not looked at: `check_seal` does that for those who publish what they read.
        """
        content = read_content(path)
        known = {name: value for name, value in content.items() if name in (*SCHEMA, "queries_sha256")}
        known["metrics"] = {name: _measured(metric) for name, metric in known["metrics"].items()}
        return cls(**known)

    def table(self) -> str:
        """A plain-text table: a line a score, its figures side by side with their intervals, all in %."""
        lines = [f"{self.protocol} (version {self.version}){self._subject()}"]
        for quantity, rows, figures in pivot(self.metrics):
            cells = [[quantity.replace("_", " "), *figures, "n"]]
            cells += [[name, *(cell(row.get(figure)) for figure in figures), counts(row)] for name, row in rows.items()]
            lines += ["", *aligned(cells)]
        return "\n".join([*lines, "", NOTE])

    def _subject(self) -> str:
        parts = [f"{key} {self.corpus[key]}" for key in ("name", "split", "rows", "items") if key in self.corpus]
        return (": " if parts else "") + ", ".join(parts)


def check_writable(path: str | Path) -> None:
    """Raises an OSError where `Result.save` could not write to this path: better told before hours of measuring."""
    path = Path(path)
    folder = path.parent if path.suffix == ".json" else path
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written to; name another place by --out")


def read_content(path: str | Path) -> dict:
    """The JSON of a result's file; ValueError where it is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; give a results/PROTOCOL.json") from error
    missing = {"protocol", "version", "metrics"} - set(content if isinstance(content, dict) else ())
    if missing:
        raise ValueError(f"{path} is no result of a protocol: it lacks {sorted(missing)}")
    return content


def seal_of(content: dict) -> str:
    """The sha256 of all that a result's file says but its seal, whatever the order of keys and the white space.

    It shows that figures were written by a protocol and not by hand; it is no signature, and stops no forger.
    """
    plain = {name: value for name, value in content.items() if name != SEAL}
    plain = json.loads(json.dumps(plain, allow_nan=False))  # Keys and tuples as a file would give them back.
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_seal(path: str | Path) -> None:
    """Raises a ValueError unless the file says what a protocol wrote into it."""
    content = read_content(path)
    seen, wanted = content.get(SEAL), seal_of(content)
    again = f"measure again: `syncmask evaluate RUN --protocol {content['protocol']}`"
    if seen is None:
        raise ValueError(f"{path} has no seal (an earlier version of syncmask wrote it); {again}")
    if seen != wanted:
        raise ValueError(
            f"{path} was changed after it was measured: its seal is {str(seen)[:12]}..., its content gives "
            f"{wanted[:12]}...; {again}"
        )


def beside(path: str | Path, what: str) -> Path:
    """The file of queries or candidates that belongs to a result's file.

    Example: `beside("results/items.json", "queries")` is `results/items.queries.npz`.
    """
    return Path(path).with_name(f"{Path(path).stem}.{what}.npz")


def comparable(first: Result, second: Result) -> None:
    """Raises a ValueError unless the two were measured by the same protocol on the same corpus and candidates."""
    pairs = [(what, getattr(first, what), getattr(second, what)) for what in ("protocol", "version")]
    pairs += [
        (f"corpus {what}", first.corpus.get(what), second.corpus.get(what)) for what in ("split", "rows", "items")
    ]
    pairs += [("corpus contents", corpus_contents(first), corpus_contents(second))]
    pairs += [("candidates_sha256", first.candidates_sha256, second.candidates_sha256)]
    for what, one, other in pairs:
        if one != other:
            raise ValueError(
                f"these results are not comparable: {what} is {one!r} in one and {other!r} in the other; "
                "evaluate both models by the same protocol, options, seed and corpus"
            )


def corpus_contents(result: Result) -> str:
    """The part of the fingerprint that is of rows, items and texts alone, and so survives a move of the photos."""
    return "-".join(result.corpus.get("fingerprint", "").split("-")[1:])


def pivot(metrics: dict[str, Metric]) -> list[tuple[str, dict[str, dict[str, Metric]], list[str]]]:
    """Metrics by name -> [(quantity, {score: {figure: metric}}, figures)], in order of appearance, for tables."""
    sections: dict[str, dict[str, dict[str, Metric]]] = {}
    for name, metric in metrics.items():
        quantity, figure, score = name.split("/")
        sections.setdefault(quantity, {}).setdefault(score, {})[figure] = metric
    return [
        (quantity, rows, list(dict.fromkeys(figure for row in rows.values() for figure in row)))
        for quantity, rows in sections.items()
    ]


def candidates_sha256(*parts: np.ndarray | list) -> str:
    """A hash of what was ranked against what (ids of queries and gallery), equal only for equal candidate lists."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(np.asarray(part).tolist()).encode() + b"\n")
    return digest.hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that can change a figure."""
    found = {"python": platform.python_version()}
    for name in ("syncmask", "torch", "transformers", "datasets", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _jsonable(metric: Metric) -> dict:
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in metric.items()}


def _measured(metric: dict) -> Metric:
    return Metric(**{key: float("nan") if value is None else value for key, value in metric.items()})


def cell(metric: Metric | None) -> str:
    """One metric as text: "55.2 [53.1, 57.3]" in %, without the interval where it is known exactly."""
    if metric is None:
        return ""
    if math.isnan(metric["value"]):
        return "none"
    if metric["low"] == metric["high"] == metric["value"]:
        return percent(metric["value"])
    return f"{percent(metric['value'])} [{percent(metric['low'])}, {percent(metric['high'])}]"


def percent(value: float) -> str:
    """One decimal, two under 1 % (false negatives are rare), without the minus sign of a rounded zero."""
    places = 2 if 0.0005 <= abs(value) < 0.01 else 1
    return f"{round(100 * value, places) + 0.0:.{places}f}"


def counts(row: dict[str, Metric]) -> str:
    """The numbers of units a score was measured on: one, or several where its figures differ."""
    return "/".join(dict.fromkeys(str(metric["n"]) for metric in row.values() if metric["n"]))


def aligned(cells: list[list[str]]) -> list[str]:
    """Lines of a plain-text table, columns aligned, a rule under the head."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
    return [lines[0], "-" * max(len(line) for line in lines), *lines[1:]]
