"""What can go wrong while training: how it is noticed, and what is said."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

import torch

from syncmask.processing.collator import UnreadablePhoto

NO_ROOM = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "the file is too large"}
NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}
NO_MEMORY = ("can't allocate memory", "out of memory", "bad allocation")


class RunStopped(SystemExit):
    """The end of a run for a known reason; `code` is the process's exit code, `said` whether stderr has the reason."""

    def __init__(self, message: str, code: int = 1, said: bool = False):
        super().__init__(message)
        self.code, self.said = code, said

    def __str__(self) -> str:
        return str(self.args[0])


class StopSignals:
    """Notes SIGINT and SIGTERM instead of dying of them, so that the running step can end; a context.

    `number` is the first signal that came, 0 before. Outside the main thread, where Python allows no handlers, signals
    keep their usual effect.
    """

    def __init__(self):
        self.number = 0
        self._before = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _):
        # Launchers pass a terminal's Ctrl-C on, so it comes twice: later ones change nothing.
        self.number = self.number or number


def outlive_signals(_worker: int):
    """Let a DataLoader worker ignore what stops the run: the step it works for is still finished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def report(problem: BaseException) -> str:
    """Say on stderr what ended the run, once, and return it; a traceback only where there is no explanation."""
    message = explain(problem)
    if message is None:
        message = f"{type(problem).__name__}: {problem}"
        traceback.print_exception(problem)
    else:
        rank = os.environ.get("RANK")
        print(f"\nerror{'' if rank is None else f' (process {rank})'}: {message}", file=sys.stderr, flush=True)
    return message


def explain(problem: BaseException) -> str | None:
    """Return what a problem means to someone who trains, or None where nothing is known of it.

    Example:
        >>> explain(ValueError("?")) is None
        True
    """
    if isinstance(problem, SystemExit):
        return str(problem)
    if is_out_of_memory(problem):
        return (
            f"out of memory ({str(problem).splitlines()[0] if str(problem) else type(problem).__name__}). Lower "
            "--per_device_batch_size (and raise --gradient_accumulation_steps, with --full_contrast for the same "
            "contrast), --image_size or --max_text_length, or "
            "set --mixed_precision bf16 or --activation_checkpointing (--estimate tells what fits); then go on from "
            "the last checkpoint with --resume (a new global batch size needs a new run)."
        )
    if isinstance(problem, UnreadablePhoto):
        return f"{problem} Then go on with --resume."
    if isinstance(problem, OSError) and problem.errno in NO_ROOM:
        return f"{NO_ROOM[problem.errno]}: {problem}. What was saved before is whole: free some room, then --resume."
    if isinstance(problem, OSError) and problem.errno in NOT_WRITABLE:
        return f"{problem}. The run's folder must be writable: mend its rights, or choose another --output_dir."
    return None


def is_out_of_memory(problem: BaseException) -> bool:
    """Tell whether memory ran out, on a device or on the host."""
    if isinstance(problem, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(problem, RuntimeError) and any(words in str(problem).lower() for words in NO_MEMORY)


def check_writable(folder: Path, setting: str = "--output_dir"):
    """Write and delete a file in a folder, which is made if absent; `setting` is what names it.

    Raises:
        RunStopped: saying why nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("yes", encoding="utf-8")
        probe.unlink()
    except OSError as problem:
        raise RunStopped(
            f"nothing can be written to {folder}: {problem.strerror}. Choose another {setting}, or mend the "
            "folder's rights or the disk."
        ) from problem
