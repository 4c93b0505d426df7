"""The run folder's running records: metrics, batches and substituted photos as lines of JSON."""

import json
import logging
import math
import os
import shutil
import time
from pathlib import Path

import torch

from syncmask.evaluation.history import TIMES
from syncmask.evaluation.masks_over_time import RECORD as MASKS
from syncmask.evaluation.masks_over_time import MaskState

from .checkpoint import flush
from .faults import RunStopped, check_writable
from .usage import Usage

logger = logging.getLogger(__name__)

RECORDS = ("metrics.jsonl", "batches.jsonl", "substitutes.jsonl", TIMES, MASKS)


class RunFolder:
    """Appends what happens to the records; only the main process writes.

    Args:
        path: the run's folder. is_main: whether this process writes. log_batches: whether rows of batches are kept.
    """

    def __init__(self, path: Path, is_main: bool = True, log_batches: bool = False):
        self.path, self.is_main, self.log_batches = path, is_main, log_batches
        self.started, self.usage = time.monotonic(), Usage(path)

    def prepare(self, resume: bool, overwrite: bool):
        """Make the folder, or refuse one that holds another run or cannot be written; on the main process.

        Raises:
            RunStopped: when the folder holds a run and neither `resume` nor `overwrite` is set, or is read-only.
        """
        holds_run = (self.path / "config.yaml").exists()
        if holds_run and not resume and not overwrite:
            raise RunStopped(
                f"{self.path} holds a run already. Add --resume to go on with it, --overwrite to replace it, or "
                "--run_name NAME for another folder."
            )
        check_writable(self.path)
        if holds_run and overwrite:
            shutil.rmtree(self.path)
            self.path.mkdir(parents=True)

    def log(self, step: int, epoch: int, split: str, figures: dict):
        """Append a line to metrics.jsonl: split is "train", "validation" or "batches"."""
        if self.is_main:
            seconds = round(time.monotonic() - self.started, 3)
            self._append("metrics.jsonl", {"step": step, "epoch": epoch, "split": split, "time_s": seconds, **figures})

    def log_rows(self, step: int, epoch: int, rows: torch.Tensor):
        """Append the rows of a global batch to batches.jsonl, where that is asked for."""
        if self.is_main and self.log_batches:
            self._append("batches.jsonl", {"step": step, "epoch": epoch, "rows": rows.tolist()})

    def log_times(self, step: int, epoch: int, figures: dict):
        """Append to times.jsonl where the time went: kept apart from metrics.jsonl, whose bits can be compared."""
        if self.is_main:
            self._append(TIMES, {"step": step, "epoch": epoch, **figures})

    def log_masks(self, state: MaskState | None):
        """Append to masks_over_time.jsonl what the teacher would hide now in the photos that are followed."""
        if self.is_main and state is not None:
            self._append(MASKS, state.line())

    def log_substitute(self, step: int, epoch: int, row: int, substitute: int, reason: str):
        """Append to substitutes.jsonl that a photo could not be read, and which row stood in for it."""
        if self.is_main:
            line = {"step": step, "epoch": epoch, "row": row, "substitute": substitute, "reason": reason}
            self._append("substitutes.jsonl", line)

    def lines(self, name: str = "metrics.jsonl") -> list[dict]:
        """Read a record back; a line that a kill cut short is left out."""
        path = self.path / name
        if not path.exists():
            return []
        complete = path.read_text(encoding="utf-8").rpartition("\n")[0]
        return [json.loads(line) for line in complete.splitlines() if line]

    def sizes(self) -> dict[str, int]:
        """Bring the records to the disk and return their sizes in bytes, for a checkpoint."""
        paths = [path for path in map(self.path.joinpath, RECORDS) if path.exists()]
        for path in paths:
            flush(path)
        return {path.name: path.stat().st_size for path in paths}

    def rewind(self, sizes: dict[str, int]):
        """Cut the records back to a checkpoint's sizes, so that a resumed run writes no line twice."""
        for path in map(self.path.joinpath, RECORDS if self.is_main else ()):
            size, wanted = path.stat().st_size if path.exists() else 0, sizes.get(path.name, 0)
            if size < wanted:
                logger.warning("%s has lost %d bytes since the checkpoint: lines are missing", path, wanted - size)
            elif size > wanted:
                os.truncate(path, wanted)

    def _append(self, name: str, line: dict):
        tidy = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
        }
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(tidy) + "\n")
