"""Where a run's time goes: seconds by phase between two readings, and the memory at its highest."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from syncmask.evaluation.history import waiting_share

PHASES = ("waiting", "planning", "validating", "saving")
# Waiting that is worth a word: this share of the time, at so many logged steps in a row. Fewer would tell of every
# start, when the first photos are waited for and nothing is wrong.
MUCH_WAITING, IN_A_ROW = 0.2, 3


class Stopwatch:
    """Counts the seconds of the phases; what is left of the clock is training itself.

    waiting: for the next batch's photos. planning: the order of an epoch. validating: figures and masks of unseen
    items. saving: checkpoints.
    """

    def __init__(self):
        self.restart()

    def restart(self):
        """Forget what was counted."""
        self.since, self.cpu_since = time.monotonic(), time.process_time()
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.steps = self.pairs = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what is done inside."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] += time.monotonic() - begun

    def waits(self, batches: Iterable) -> Iterator:
        """Hand batches on, counting how long each was waited for."""
        batches = iter(batches)
        while True:
            with self.phase("waiting"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def read(self) -> dict[str, float | int | None]:
        """Return what was counted since the last reading, and begin anew.

        Seconds, those by phase, CPU seconds of all threads of this process, steps, pairs, memory.
        """
        seconds = {"seconds": time.monotonic() - self.since, "cpu_s": time.process_time() - self.cpu_since}
        seconds |= {f"{name}_s": spent for name, spent in self.seconds.items()}
        figures = {name: round(value, 4) for name, value in seconds.items()}
        figures |= {"steps": self.steps, "pairs": self.pairs} | memory()
        self.restart()
        return figures


class StallMeter:
    """The share of the time of training that goes by waiting for photos, from one logged step to the next."""

    def __init__(self):
        self.readings: list[dict] = []
        self.share: float | None = None
        self.high = 0  # logged steps in a row with much waiting

    def add(self, reading: dict):
        """Take in a reading of the stopwatch."""
        self.readings.append(reading)

    def close(self) -> bool:
        """Work out `share` over the readings since the last call; True once, where it has stayed high for long."""
        self.share, self.readings = waiting_share(self.readings), []
        still_high = self.share >= MUCH_WAITING or self.high >= IN_A_ROW  # said is said
        self.high = self.high + 1 if still_high else 0
        return self.high == IN_A_ROW


def memory() -> dict[str, int | None]:
    """Return the highest resident memory of this process in bytes (None where the system does not tell), and the GPU's.

    Read from /proc: `resource.getrusage` inherits the figure of the process that started this one.
    """
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    found = [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    device = {"peak_gpu_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}
    return {"peak_rss_bytes": found[0] if found else None} | device
