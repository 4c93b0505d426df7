"""Every row of the table of targets: `python -m benchmarks.all [--quick] [--json]`.

Each benchmark runs in a process of its own, one after the other, since what one leaves in memory would slow the next.
"""

from __future__ import annotations

import json
import subprocess
import sys

from .measure import Row, arguments, print_table

MODULES = ("training_step", "memory", "grouping", "retrieval", "inference", "decoding")


def run(module: str, quick: bool) -> tuple[list[dict], dict]:
    """The rows of one benchmark and the machine they were measured on.

    Raises:
        RuntimeError: when it broke; a missed floor is no such thing.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", "--json", *(["--quick"] if quick else [])]
    print(f"benchmarks.{module} ...", file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        found = json.loads(done.stdout)
    except ValueError as problem:
        raise RuntimeError(f"benchmarks.{module} broke; its last words:\n{done.stderr[-2000:]}") from problem
    return found["rows"], found["machine"]


def main(argv: list[str] | None = None) -> int:
    """Run and print; returns the exit code, 1 where a floor was missed."""
    given = arguments(__doc__).parse_args(argv)
    rows, about = [], {}
    for module in MODULES:
        found, about = run(module, given.quick)
        rows += found
    if given.json:
        print(json.dumps({"machine": about, "rows": rows}, indent=2))
    else:
        print_table([Row.from_content(row) for row in rows], about)
    return int(not all(row["holds"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
