"""The run folder's running records: metrics and batches as lines of JSON."""

import json
import math
import shutil
import time
from pathlib import Path

import torch

RECORDS = ("metrics.jsonl", "batches.jsonl")


class RunFolder:
    """Appends what happens to `metrics.jsonl` and `batches.jsonl`; only the main process writes.

    Args:
        path: the run's folder. is_main: whether this process writes. log_batches: whether rows of batches are kept.
    """

    def __init__(self, path: Path, is_main: bool = True, log_batches: bool = False):
        self.path, self.is_main, self.log_batches = path, is_main, log_batches
        self.started = time.monotonic()

    def prepare(self, resume: bool, overwrite: bool):
        """Make the folder, or refuse one that holds another run.

        Raises:
            SystemExit: when the folder holds a run and neither `resume` nor `overwrite` is set.
        """
        if not self.is_main:
            return
        holds_run = (self.path / "config.yaml").exists()
        if holds_run and overwrite:
            shutil.rmtree(self.path)
        elif holds_run and not resume:
            raise SystemExit(
                f"{self.path} holds a run already. Add --resume to go on with it, --overwrite to replace it, or "
                "--run_name NAME for another folder."
            )
        self.path.mkdir(parents=True, exist_ok=True)

    def log(self, step: int, epoch: int, split: str, figures: dict):
        """Append a line to metrics.jsonl: split is "train", "validation" or "batches"."""
        if self.is_main:
            seconds = round(time.monotonic() - self.started, 3)
            self._append("metrics.jsonl", {"step": step, "epoch": epoch, "split": split, "time_s": seconds, **figures})

    def log_rows(self, step: int, epoch: int, rows: torch.Tensor):
        """Append the rows of a global batch to batches.jsonl, where that is asked for."""
        if self.is_main and self.log_batches:
            self._append("batches.jsonl", {"step": step, "epoch": epoch, "rows": rows.tolist()})

    def lines(self, name: str = "metrics.jsonl") -> list[dict]:
        """Read a record back; a line that a kill cut short is left out."""
        path = self.path / name
        if not path.exists():
            return []
        complete = path.read_text(encoding="utf-8").rpartition("\n")[0]
        return [json.loads(line) for line in complete.splitlines() if line]

    def counts(self) -> dict[str, int]:
        """Count the lines of each record, for a checkpoint."""
        return {name: len(self.lines(name)) for name in RECORDS}

    def rewind(self, counts: dict[str, int]):
        """Keep the lines that a checkpoint counted, so that a resumed run writes none of them twice."""
        for name in RECORDS:
            path = self.path / name
            if self.is_main and path.exists():
                kept = self.lines(name)[: counts.get(name, 0)]
                partial = path.with_suffix(".partial")
                partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
                partial.replace(path)

    def _append(self, name: str, line: dict):
        tidy = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
        }
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(tidy) + "\n")
