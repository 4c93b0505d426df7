"""Running what is not finished yet: a process a run, several at a time, killed and taken up again without loss.

A run's folder holds `identity.json` (what it is), `settings.yaml`, `training.log`, `lock` and `run`, the run folder
that training writes. Training holds the lock as long as it lives, so that a harness
that was killed and is started again waits for what it left behind, and two of them do not train the same run.
"""

from __future__ import annotations

import fcntl
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import yaml

from syncmask.evaluation.history import TIMES, read_history
from syncmask.evaluation.result import Result
from syncmask.training.run_folder import RunFolder

from .ablation_plan import Run, code_sha256

PULSE = 30.0  # seconds between two lines of progress
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}

Train = Callable[[Run, int], int]
"""Trains a run to its end, or goes on with it: (run, descriptor of the held lock) -> exit code."""


def is_complete(run: Run) -> bool:
    """Tell whether a run ended with all its results, under the identity that it has now."""
    try:
        same = json.loads((run.folder / "identity.json").read_text(encoding="utf-8")) == run.identity
        results = [Result.load(run.path / "results" / f"{name}.json") for name in run.protocols]
    except (OSError, ValueError):
        return False
    # The summary is the last that a run writes.
    return same and len(results) == len(run.protocols) and (run.path / "summary.txt").is_file()


def run_all(
    runs: Sequence[Run],
    jobs: int = 1,
    *,
    train: Train | None = None,
    say: Callable[[str], None] = print,
    code: Callable[[], str] = code_sha256,
) -> dict[Run, str]:
    """Train what is not finished; a run that fails does not stop the others.

    Args:
        runs: what is wanted, in order. jobs: how many at a time.
        train: trains one. say: takes lines of progress. code: names the code that runs.

    Returns:
        The runs that failed, each with the reason.
    """
    todo = [run for run in runs if not is_complete(run)]
    say(f"{len(runs) - len(todo)} of {len(runs)} runs are finished already")
    failed: dict[Run, str] = {}
    begun, before = time.monotonic(), {run: steps_done(run) for run in todo}
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        waiting: dict[Future, Run] = {pool.submit(run_one, run, train or start_training, code): run for run in todo}
        try:
            while waiting:
                for future in wait(waiting, timeout=PULSE, return_when=FIRST_COMPLETED).done:
                    run = waiting.pop(future)
                    reason = future.result()
                    failed |= {run: reason} if reason else {}
                    say(f"{run}: {f'FAILED: {reason}' if reason else 'finished'}")
                if waiting:
                    say(progress(todo, list(waiting.values()), before, time.monotonic() - begun))
        except KeyboardInterrupt:
            say("stopping: runs in progress save and end; the same command goes on from there")
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def run_one(run: Run, train: Train, code: Callable[[], str] = code_sha256) -> str:
    """Train one run unless somebody else just did; returns why it failed, or nothing."""
    with locked(run.folder / "lock") as descriptor:
        if is_complete(run):
            return ""
        if code() != run.identity["code"]:
            return "the code changed since this command started; start it again"
        prepare(run)
        status = train(run, descriptor)
        if code() != run.identity["code"]:
            (run.folder / "identity.json").unlink()  # nobody knows which code it ran
            return "the code changed while it ran; start the command again"
    if status:
        return f"exit code {status}: {last_line(run.folder / 'training.log')} ({run.folder / 'training.log'})"
    return "" if is_complete(run) else f"it ended without its results ({run.folder / 'training.log'})"


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold a file's lock, waiting for whoever holds it; gives its descriptor."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def prepare(run: Run):
    """Write settings and identity, whole or not at all."""
    for name, text in (
        ("settings.yaml", yaml.safe_dump(_plain(run.settings), sort_keys=False)),
        ("identity.json", json.dumps(run.identity, indent=1)),
    ):
        partial = run.folder / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, run.folder / name)


def command(run: Run) -> list[str]:
    """The words that train a run; `--resume` starts anew where there is nothing to go on from."""
    settings = str(run.folder / "settings.yaml")
    return [sys.executable, "-m", "syncmask.training.pretrain", "--config", settings, "--resume"]


def start_training(run: Run, descriptor: int) -> int:
    """Train in a process of its own, which inherits the lock."""
    with (run.folder / "training.log").open("ab") as log:
        return subprocess.run(
            command(run),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | ONE_THREAD,
            pass_fds=[descriptor],
        ).returncode


# ----------------------------------------------------------------------------------------------------------- progress


def steps_done(run: Run) -> int:
    """The last step that training logged, 0 before."""
    lines = RunFolder(run.path, is_main=False).lines()
    return max((line["step"] for line in lines if line["split"] == "train"), default=0)


def cpu_seconds_a_step(run: Run) -> float | None:
    """CPU seconds of a step, planning of epochs included, start and evaluation not; None where none was timed."""
    times = read_history(run.path, TIMES)
    steps = sum(line["steps"] for line in times)
    return sum(line["cpu_s"] for line in times) / steps if steps else None


def cpu_by_arm(runs: Sequence[Run]) -> dict[str, float]:
    """Median over seeds of CPU seconds a step, by arm; arms of which none was measured are absent."""
    found: dict[str, list[float]] = {}
    for run in runs:
        seconds = cpu_seconds_a_step(run)
        if seconds is not None:
            found.setdefault(run.arm, []).append(seconds)
    return {arm: statistics.median(seconds) for arm, seconds in found.items()}


def progress(todo: Sequence[Run], open_runs: Sequence[Run], before: Mapping[Run, int], elapsed: float) -> str:
    """One line: how many are done, where the running ones are, how long it takes at this pace.

    Args:
        todo: what this command began with. open_runs: what is left of it. before: steps done at the start.
        elapsed: seconds since then.
    """
    steps = {run: steps_done(run) for run in open_runs}
    running = [f"{run.arm}/{run.seed} at {steps[run]}" for run in open_runs if steps[run] > before[run]]
    total = sum(run.steps - before[run] for run in todo)
    left = sum(run.steps - steps[run] for run in open_runs)
    done = total - left
    eta = f"about {max(1, round(elapsed * left / done / 60))} min left" if done > 0 else "no pace known yet"
    return f"  {len(todo) - len(open_runs)} of {len(todo)} done; {', '.join(running) or 'starting'}; {eta}"


def last_line(path: Path) -> str:
    """The last line of a log that says something."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1] if lines else "nothing was said"


def _plain(settings: Mapping) -> dict:
    return json.loads(json.dumps(settings))
