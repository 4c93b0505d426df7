"""`--profile N`: what the time of a few steps goes into, by torch's profiler."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

logger = logging.getLogger(__name__)

FOLDER, TRACE, TABLE = "profile", "trace.json", "operators.txt"
# The first steps fill caches and make AdamW's moments; the profiler's own start is slow too.
WAIT, WARM_UP = 2, 1
TOP = 40


class StepProfile:
    """Records some steps and then nothing more; a context around the loop, which tells it of each step.

    Writes profile/trace.json (for chrome://tracing or ui.perfetto.dev) and profile/operators.txt, the operators that
    took most time themselves.

    Args:
        steps: to record, None = none at all. path: the run's folder.
    """

    def __init__(self, steps: int | None, path: Path):
        self.steps, self.folder = steps, path / FOLDER
        self._profiler: profile | None = None

    def __enter__(self) -> StepProfile:
        if self.steps is not None:
            on_gpu = torch.cuda.is_available()
            self._profiler = profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])],
                schedule=schedule(wait=WAIT, warmup=WARM_UP, active=self.steps, repeat=1),
                on_trace_ready=self._write,
                acc_events=True,
            )
            self._profiler.start()
        return self

    def __exit__(self, *_):
        if self._profiler is None:
            return
        self._profiler.stop()
        if not (self.folder / TRACE).exists():
            logger.warning("nothing was profiled: that begins after %d steps, and this run had fewer", WAIT + WARM_UP)

    def step(self):
        """One step of the optimiser is done."""
        if self._profiler is not None:
            self._profiler.step()

    def _write(self, profiler: profile):
        self.folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / TRACE))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=TOP, max_name_column_width=60)
        (self.folder / TABLE).write_text(table + "\n", encoding="utf-8")
        logger.info("profile of up to %d steps: %s", self.steps, self.folder)
