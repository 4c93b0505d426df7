"""What the benchmarks share: two sides timed in turns, and a row of the table of targets.

CPU seconds of one thread decide, since they are the same on a busy machine; seconds by the clock stand beside them, for
one thread and for all (`--threads`).
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

ROUNDS = 5


@dataclass
class Row:
    """One figure beside the peer's, with the least that must hold and what we are after.

    Attributes:
        name: of the row. unit: of both figures.
        ours, peer: medians, or exact counts.
        floor, goal: of `ratio`; None for a peer that is measured for the record.
        at_most: the ratio is ours / peer and must stay below (work, memory); else it is how many times better ours is.
        rate: both figures are better when larger (queries a second); else when smaller (seconds).
        spread: lowest and highest of each side over the rounds.
        times: by number of threads, what `both_times` returns; empty where nothing was timed.
        notes: what was compared, and under which conditions.
    """

    name: str
    unit: str
    ours: float
    peer: float
    floor: float | None = None
    goal: float | None = None
    at_most: bool = False
    rate: bool = False
    spread: dict[str, tuple[float, float]] = field(default_factory=dict)
    times: dict[str, dict] = field(default_factory=dict)
    notes: str = ""

    @property
    def ratio(self) -> float:
        """Ours / peer where less is better by definition, else the gain: larger is better."""
        return self.ours / self.peer if self.at_most or self.rate else self.peer / self.ours

    def reaches(self, target: float | None) -> bool:
        """Tell whether the ratio is as good as `target`; anything is as good as none."""
        if target is None:
            return True
        return self.ratio <= target if self.at_most else self.ratio >= target

    def content(self) -> dict:
        """What is printed as JSON."""
        about = {"ratio": self.ratio, "holds": self.reaches(self.floor), "reached_goal": self.reaches(self.goal)}
        return asdict(self) | about

    @classmethod
    def from_content(cls, content: dict) -> Row:
        """What `content` was made from."""
        return cls(**{name: content[name] for name in cls.__dataclass_fields__})


@dataclass
class Times:
    """Seconds of one side, a number a round: of the CPU, all threads together, and by the clock."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The one that counts, of the CPU."""
        return statistics.median(self.cpu)

    @property
    def spread(self) -> tuple[float, float]:
        """Lowest and highest, of the CPU."""
        return min(self.cpu), max(self.cpu)

    def content(self) -> dict:
        """Medians and spreads of both."""
        about = {"cpu": self.median, "cpu_spread": self.spread}
        return about | {"wall": statistics.median(self.wall), "wall_spread": (min(self.wall), max(self.wall))}


def in_turns(*actions: Callable[[], object], rounds: int = ROUNDS) -> list[Times]:
    """Time each action once a round, in turns, so that a busy machine is busy for all; a first round does not count."""
    times = [Times() for _ in actions]
    for turn in range(rounds + 1):
        for action, found in zip(actions, times):
            gc.collect()
            begun, by_clock = time.process_time(), time.perf_counter()
            action()
            if turn:
                found.cpu.append(time.process_time() - begun)
                found.wall.append(time.perf_counter() - by_clock)
    return times


def both_times(ours: Times, peer: Times | None = None) -> dict[str, dict]:
    """For `Row.times`: both sides by the number of threads that torch has, and how many times faster by the clock."""
    found = {"ours": ours.content()}
    if peer is not None:
        found["peer"] = peer.content()
        found["wall_ratio"] = found["peer"]["wall"] / found["ours"]["wall"]
    return {str(torch.get_num_threads()): found}


def timed_row(
    name: str,
    ours: Times,
    peer: Times,
    floor: float | None = None,
    goal: float | None = None,
    *,
    a_second: tuple[float, str] | None = None,
    notes: str = "",
) -> Row:
    """A row of two sides that did the same work; `a_second` (how much of what) gives rates in place of seconds."""
    about = {"floor": floor, "goal": goal, "times": both_times(ours, peer), "notes": notes}
    sides = {"ours": ours, "peer": peer}
    if a_second is None:
        spread = {side: times.spread for side, times in sides.items()}
        return Row(name, "CPU s", ours.median, peer.median, spread=spread, **about)
    work, what = a_second
    spread = {side: (work / times.spread[1], work / times.spread[0]) for side, times in sides.items()}
    rates = (work / ours.median, work / peer.median)
    return Row(name, f"{what} a CPU s", *rates, rate=True, spread=spread, **about)


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table; where several numbers of threads were measured, the most of them by the clock."""
    threads = max((int(count) for row in rows for count in row.times), default=1)
    head = ["what", "ours", "peer", "ratio", "floor", "goal", ""]
    head[4:4] = [f"by the clock, {threads} threads"] if threads > 1 else []
    cells = [head, ["---"] * len(head)]
    for row in rows:
        figures = [f"{number(row.ours)} {row.unit}", f"{number(row.peer)} {row.unit}", f"{row.ratio:.2f}"]
        figures += [by_clock(row.times.get(str(threads)))] if threads > 1 else []
        cells.append([row.name, *figures, *verdict(row)])
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def verdict(row: Row) -> list[str]:
    """Floor, goal and which of them is reached, as cells."""
    if row.floor is None:
        return ["", "", "for the record"]
    sign = "<=" if row.at_most else ">="
    reached = "goal" if row.reaches(row.goal) else "holds" if row.reaches(row.floor) else "**missed**"
    return [f"{sign} {row.floor:g}", f"{sign} {row.goal:g}", reached]


def by_clock(times: dict | None) -> str:
    """Seconds of both sides and how many times faster ours is, of one number of threads, as a cell."""
    if times is None or "peer" not in times:
        return "" if times is None else f"{number(times['ours']['wall'])} s"
    return f"{number(times['ours']['wall'])} s, {number(times['peer']['wall'])} s: {times['wall_ratio']:.2f}"


def number(value: float) -> str:
    """Three digits that say something."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def machine() -> dict[str, str]:
    """What the figures depend on: processor, instruction set, versions."""
    found = {"processor": _processor(), "instructions": torch.backends.cpu.get_cpu_capability()}
    found |= {"python": platform.python_version(), "threads": str(torch.get_num_threads())}
    return found | {name: version(name) for name in ("torch", "transformers", "numpy", "pillow")}


def peak_memory() -> int:
    """Bytes that this process has held at most.

    Not `ru_maxrss`, in which a process that was started by a large one counts its parent as well.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    flags = next((line for line in lines if line.startswith("flags")), "")
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return name + (", avx512_bf16" if "avx512_bf16" in flags else "")


def arguments(about: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has; `about` is its docstring."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, nothing large")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="of torch; above 1, only what is timed is measured. Floors are of one. NumPy takes OPENBLAS_NUM_THREADS",
    )
    return parser


def print_rows(rows: Sequence[Row], as_json: bool, skipped: Sequence[str] = ()) -> int:
    """Print rows and what was not measured; the exit code is 1 where a floor was missed."""
    if as_json:
        found = {"machine": machine(), "rows": [row.content() for row in rows], "skipped": list(skipped)}
        print(json.dumps(found, indent=2))
    else:
        print_table(rows, machine(), skipped)
    return int(not all(row.reaches(row.floor) for row in rows))


def print_table(rows: Sequence[Row], about: dict[str, str], skipped: Sequence[str] = ()) -> None:
    """Print rows as Markdown, then their notes, what was not measured, and the machine."""
    print(table(rows), end="\n\n")
    print("".join(f"- {row.name}: {row.notes}\n" for row in rows if row.notes))
    print("".join(f"{line}\n\n" for line in skipped), end="")
    print(", ".join(f"{name} {value}" for name, value in about.items()) + ".")
