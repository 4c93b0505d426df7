"""Checkpoints that are complete or absent, and are read without unpickling code.

A checkpoint is a folder `step_00000120`: safetensors for tensors, JSON for plain values, and COMPLETE, which holds the
sha256 of every other file. It is written under another name and renamed once all of it is on the disk. Files are
written, brought to the disk and hashed in threads; the optimiser's state is safetensors too, which is 8 times as fast
as torch.save and cannot hold code.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from syncmask.evaluation.loading import sha256

COMPLETE = "COMPLETE"
STATE = "state.json"
OPTIMIZER = "optimizer"
STEP_NAME = re.compile(r"step_(\d{8,})")
UNFINISHED = ".unfinished"
THREADS = 4


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint held: tensors by file stem and name, plain values, and the optimiser's state_dict."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    optimizer_state: dict[str, Any] | None


def save_checkpoint(
    folder: str | Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    optimizer_state: Mapping[str, Any] | None = None,
    keep_last: int = 2,
    best: int | None = None,
) -> Path:
    """Write `folder/step_XXXXXXXX`, then delete the checkpoints that are neither new nor best.

    Call it on one process only. Where writing fails, what was there before is untouched. A whole checkpoint of that
    step is kept as it is: replacing it would need two renames, and a kill between them would lose it.

    Args:
        folder: the run's `checkpoints`; made if absent.
        tensors: {file stem: {name: tensor}}, such as {"model": ..., "teacher": ...}; any device.
        state: plain values for JSON, with an int "step"; tuples come back as lists.
        optimizer_state: an optimiser's `state_dict()`.
        keep_last: how many of the newest complete checkpoints are kept, this one included.
        best: the step of the best checkpoint, which is kept too.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: where `state` has no step, a stem is no file name, or `keep_last` is below 1.
        OSError: where the disk is full or not writable, naming the bytes that are needed.
    """
    check_request(tensors, state, keep_last)
    folder = Path(folder)
    final = folder / f"step_{state['step']:08d}"
    partial = folder / (final.name + UNFINISHED)
    if optimizer_state is not None:
        moments, rest = split_optimizer(optimizer_state)
        tensors, state = {**tensors, OPTIMIZER: moments}, {**state, OPTIMIZER: rest}
    for stale in folder.glob(f"step_*{UNFINISHED}"):
        shutil.rmtree(stale, ignore_errors=True)
    if what_is_wrong(final) is not None:
        try:
            partial.mkdir(parents=True)
            check_room(folder, bytes_of(tensors))
            write_files(partial, tensors, state)
            put_in_place(partial, final)
        except (OSError, SafetensorError) as problem:
            shutil.rmtree(partial, ignore_errors=True)
            raise tell_room(problem, final, bytes_of(tensors)) from problem
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    prune(folder, final, keep_last, best)
    return final


def check_request(tensors: Mapping, state: Mapping[str, Any], keep_last: int) -> None:
    """Raise ValueError before anything is written."""
    if not isinstance(state.get("step"), int) or state["step"] < 0:
        raise ValueError(f"state['step'] is {state.get('step')!r}, but must be the number of steps done")
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}, but must be at least 1")
    for stem in tensors:
        if not re.fullmatch(r"\w+", stem):
            raise ValueError(f"{stem!r} is no file stem: use letters, digits and _")


def bytes_of(tensors: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Return the size of a checkpoint's tensors on the disk."""
    return sum(tensor.numel() * tensor.element_size() for named in tensors.values() for tensor in named.values())


def check_room(folder: Path, needed: int) -> None:
    """Raise OSError (ENOSPC) before anything is written where the disk has too little room."""
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def tell_room(problem: Exception, final: Path, needed: int) -> OSError:
    """Return an OSError that tells what could not be written, why, and the bytes needed and free."""
    # Safetensors tells the system's error in its message alone.
    told = re.search(r"os error (\d+)", str(problem))
    number = problem.errno if isinstance(problem, OSError) else int(told.group(1)) if told else errno.EIO
    where = next(path for path in final.parents if path.exists())
    free = shutil.disk_usage(where).free
    reason = os.strerror(number) if number else str(problem)
    return OSError(
        number or errno.EIO,
        f"{reason}: checkpoint {final} could not be written; it needs {needed:,} bytes and {free:,} are free "
        "(the checkpoints before it are untouched)",
    )


def write_files(partial: Path, tensors: Mapping, state: Mapping[str, Any]) -> None:
    """Write all files of a checkpoint and bring them to the disk, COMPLETE last."""

    def write(stem: str) -> tuple[str, str]:
        path = partial / f"{stem}.safetensors"
        save_file(without_shared_memory(tensors[stem]), path, metadata={"format": "pt"})
        flush(path)
        return path.name, sha256(path)

    # The largest first, so that the threads end together.
    stems = sorted(tensors, key=lambda stem: bytes_of({stem: tensors[stem]}), reverse=True)
    with ThreadPoolExecutor(THREADS) as threads:
        digests = dict(threads.map(write, stems))
    (partial / STATE).write_text(json.dumps(dict(state), indent=1), encoding="utf-8")
    flush(partial / STATE)
    digests[STATE] = sha256(partial / STATE)
    (partial / COMPLETE).write_text(json.dumps(digests, indent=1, sort_keys=True), encoding="utf-8")
    flush(partial / COMPLETE)
    flush(partial)


def split_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimiser's `state_dict()` into tensors, named "0.exp_avg", and plain values for JSON."""
    tensors, plain = {}, {}
    for number, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = value
            else:
                plain.setdefault(str(number), {})[name] = value
    return tensors, {"param_groups": state["param_groups"], "plain": plain}


def join_optimizer(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    """Make a `state_dict` of what `split_optimizer` returned."""
    state = {int(number): dict(values) for number, values in rest["plain"].items()}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = tensor
    return {"state": state, "param_groups": rest["param_groups"]}


def without_shared_memory(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous CPU tensors; tied ones are copied, since safetensors refuses shared memory."""
    result, storages = {}, set()
    for name, tensor in named.items():
        tensor = tensor.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if pointer in storages else tensor
        storages.add(pointer)
    return result


def flush(path: Path) -> None:
    """Bring a file or a folder's list of names to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def put_in_place(partial: Path, final: Path) -> None:
    """Give a finished checkpoint its name; a broken one of that name is kept as `.broken`."""
    if final.exists():
        aside = final.with_name(final.name + ".broken")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(final, aside)
    os.rename(partial, final)
    flush(final.parent)


def prune(folder: Path, saved: Path, keep_last: int, best: int | None) -> None:
    """Delete complete checkpoints other than the one just saved, the newest and the best; leave broken ones alone."""
    complete = [path for path in step_folders(folder) if (path / COMPLETE).is_file()]
    # A run that went back to an older checkpoint may have newer ones beside it: what was just saved always stays.
    others = [path for path in complete if path != saved and step_of(path) != best]
    for path in others[: max(0, len(others) - (keep_last - 1))]:
        doomed = path.with_name(path.name + UNFINISHED)
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def step_folders(folder: str | Path) -> list[Path]:
    """Return the folders named like checkpoints, oldest first; [] where there is no such folder."""
    folder = Path(folder)
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if STEP_NAME.fullmatch(path.name) and path.is_dir()), key=step_of)


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(STEP_NAME.fullmatch(path.name).group(1))


def what_is_wrong(path: Path) -> str | None:
    """Say why a checkpoint cannot be used, or None where each file has the sha256 that COMPLETE tells."""
    try:
        digests = json.loads((path / COMPLETE).read_text(encoding="utf-8"))
        if STATE not in digests:
            return f"{COMPLETE} does not list {STATE}"
        for name, digest in digests.items():
            if sha256(path / name) != digest:
                return f"{name} has changed since it was written"
    except FileNotFoundError as problem:
        return f"{Path(problem.filename).name} is missing"
    except (OSError, ValueError, AttributeError, TypeError) as problem:
        return f"{COMPLETE} cannot be read ({problem})"
    return None


def newest_complete(folder: str | Path) -> Path | None:
    """Return the newest checkpoint that is whole, or None; broken ones are warned of and left in place.

    Example:
        >>> newest_complete("/no/such/folder") is None
        True
    """
    for path in reversed(step_folders(folder)):
        problem = what_is_wrong(path)
        if problem is None:
            return path
        warnings.warn(f"checkpoint {path} is skipped and left in place: {problem}", stacklevel=2)
    return None


def load_checkpoint(path: str | Path, check: bool = True) -> Checkpoint:
    """Read a checkpoint to the CPU; `check=False` where its hashes were compared just now.

    Raises:
        ValueError: where it is incomplete or a file has changed.
    """
    path = Path(path)
    problem = what_is_wrong(path) if check else None
    if problem is not None:
        raise ValueError(f"checkpoint {path} cannot be used: {problem}; take an older one")
    tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    moments, rest = tensors.pop(OPTIMIZER, None), state.pop(OPTIMIZER, None)
    return Checkpoint(tensors, state, join_optimizer(moments, rest) if rest is not None else None)
