"""Every row of the table of targets: `python -m benchmarks.all [--quick] [--json] [--runs N]`.

Each benchmark runs in a process of its own, one after the other, since what one leaves in memory would slow the next:
on one thread, which the floors are of, and what is timed on all threads as well. The table is Markdown.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

from .measure import Row, arguments, print_table

TIMED = ("training_step", "grouping", "retrieval", "inference", "decoding", "peers")
MODULES = ("training_step", "memory", *TIMED[1:])


def run(module: str, quick: bool, threads: int) -> dict:
    """What one benchmark prints as JSON: "rows", "machine", and often "skipped".

    Raises:
        RuntimeError: when it broke; a missed floor is no such thing.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", "--json", *(["--quick"] if quick else [])]
    command += ["--threads", str(threads)] if module in TIMED else []
    print(f"benchmarks.{module}, {threads} thread{'s' * (threads > 1)} ...", file=sys.stderr, flush=True)
    counts = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "OPENBLAS", "MKL")}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | counts)
    try:
        return json.loads(done.stdout)
    except ValueError as problem:
        raise RuntimeError(f"benchmarks.{module} broke, code {done.returncode}:\n{done.stderr[-2000:]}") from problem


def whole_run(quick: bool, threads: int) -> dict:
    """All benchmarks on one thread, and the times on all threads put beside theirs, by the rows' names."""
    found = [run(module, quick, 1) for module in MODULES]
    rows = {row["name"]: row for part in found for row in part["rows"]}
    again = [run(module, quick, threads) for module in TIMED] if threads > 1 else []
    for row in (row for part in again for row in part["rows"]):
        rows[row["name"]]["times"] |= row["times"]
    about = found[0]["machine"] | {"threads": f"1 and {threads}" if threads > 1 else "1"}
    return {
        "machine": about,
        "rows": list(rows.values()),
        "skipped": [line for part in found for line in part.get("skipped", ())],
    }


def middle(found: list):
    """Medians of numbers that stand in the same place of equal contents; of all else, the first.

    Example:
        >>> middle([{"a": 1.0, "b": "x"}, {"a": 9.0, "b": "y"}, {"a": 2.0, "b": "z"}])
        {'a': 2.0, 'b': 'x'}
    """
    first = found[0]
    if isinstance(first, dict):
        return {name: middle([one[name] for one in found]) for name in first}
    if isinstance(first, list):
        return [middle(list(column)) for column in zip(*found)]
    return statistics.median(found) if isinstance(first, float) else first


def main(argv: list[str] | None = None) -> int:
    """Run and print; returns the exit code, 1 where a floor was missed."""
    parser = arguments(__doc__)
    parser.set_defaults(threads=os.cpu_count())
    parser.add_argument("--runs", type=int, default=1, help="whole runs, whose medians are printed")
    given = parser.parse_args(argv)
    if given.runs < 1 or given.threads < 1:
        parser.error(f"--runs {given.runs}, --threads {given.threads}; wanted 1 or more of each")
    runs = [whole_run(given.quick, given.threads) for _ in range(given.runs)]
    # Ratios and verdicts again, since they follow from the medians.
    rows = [Row.from_content(row) for row in middle([found["rows"] for found in runs])]
    about = runs[0]["machine"] | {"runs": str(given.runs)}
    if given.json:
        content = {"machine": about, "rows": [row.content() for row in rows], "skipped": runs[0]["skipped"]}
        print(json.dumps(content, indent=2))
    else:
        print_table(rows, about, runs[0]["skipped"])
    return int(not all(row.reaches(row.floor) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
