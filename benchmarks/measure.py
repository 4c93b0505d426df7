"""What the benchmarks share: two sides timed in turns, and a row of the table of targets."""

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

ROUNDS = 5


@dataclass
class Row:
    """One figure beside the peer's, with the least that must hold and what we are after.

    Attributes:
        name: of the row. unit: of both figures.
        ours, peer: medians, or exact counts.
        floor, goal: of `ratio`.
        at_most: the ratio is ours / peer and must stay below (work, memory); else it is how many times better ours is.
        rate: both figures are better when larger (queries a second); else when smaller (seconds).
        spread: lowest and highest of each side over the rounds.
        notes: what was compared, and under which conditions.
    """

    name: str
    unit: str
    ours: float
    peer: float
    floor: float
    goal: float
    at_most: bool = False
    rate: bool = False
    spread: dict[str, tuple[float, float]] = field(default_factory=dict)
    notes: str = ""

    @property
    def ratio(self) -> float:
        """Ours / peer where less is better by definition, else the gain: larger is better."""
        return self.ours / self.peer if self.at_most or self.rate else self.peer / self.ours

    def reaches(self, target: float) -> bool:
        """Tell whether the ratio is as good as `target`."""
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
    """CPU seconds of one side, a number a round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """The one that counts."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """Lowest and highest."""
        return min(self.seconds), max(self.seconds)


def in_turns(*actions: Callable[[], object], rounds: int = ROUNDS) -> list[Times]:
    """Time each action once a round, in turns, so that a busy machine is busy for all; a first round does not count."""
    times = [Times([]) for _ in actions]
    for turn in range(rounds + 1):
        for action, found in zip(actions, times):
            gc.collect()
            begun = time.process_time()
            action()
            if turn:
                found.seconds.append(time.process_time() - begun)
    return times


def timed_row(name: str, unit: str, ours: Times, peer: Times, floor: float, goal: float, notes: str = "") -> Row:
    """A row of two sides that did the same work."""
    spread = {"ours": ours.spread, "peer": peer.spread}
    return Row(name, unit, ours.median, peer.median, floor, goal, spread=spread, notes=notes)


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    head = ["what", "ours", "peer", "ratio", "floor", "goal", ""]
    cells = [head, ["---"] * len(head)]
    for row in rows:
        sign = "<=" if row.at_most else ">="
        verdict = "goal" if row.reaches(row.goal) else "holds" if row.reaches(row.floor) else "MISSED"
        figures = [f"{number(row.ours)} {row.unit}", f"{number(row.peer)} {row.unit}", f"{row.ratio:.2f}"]
        cells.append([row.name, *figures, f"{sign} {row.floor:g}", f"{sign} {row.goal:g}", verdict])
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def number(value: float) -> str:
    """Three digits that say something."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def machine() -> dict[str, str]:
    """What the figures depend on: processor, instruction set, versions."""
    import torch

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
    return parser


def print_rows(rows: Sequence[Row], as_json: bool) -> int:
    """Print rows; the exit code is 1 where a floor was missed."""
    if as_json:
        print(json.dumps({"machine": machine(), "rows": [row.content() for row in rows]}, indent=2))
    else:
        print_table(rows, machine())
    return int(not all(row.reaches(row.floor) for row in rows))


def print_table(rows: Sequence[Row], about: dict[str, str]) -> None:
    """Print rows as Markdown, then their notes and the machine."""
    print(table(rows))
    print("".join(f"\n{row.name}: {row.notes}" for row in rows if row.notes))
    print("\n" + ", ".join(f"{name} {value}" for name, value in about.items()))
