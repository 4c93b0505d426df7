"""What processes that train together agree on; alone, every function here is trivial."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from syncmask.gather import gather_rows, num_processes

from .faults import RunStopped, report

Item, Result = TypeVar("Item"), TypeVar("Result")


def is_main() -> bool:
    """Tell whether this is the process that writes."""
    return num_processes() == 1 or dist.get_rank() == 0


def on_main(action: Callable[[], Result]) -> Result:
    """Run an action on the main process and return its (picklable) result on all; where it fails, all end.

    Raises:
        RunStopped: on every process, after the main one has said what went wrong. Alone: what the action raises.

    Example:
        >>> on_main(lambda: 3)
        3
    """
    if num_processes() == 1:
        return action()
    outcome = [None, None]
    if is_main():
        try:
            outcome[0] = action()
        except (Exception, SystemExit) as problem:
            outcome[1] = report(problem)
    result, problem = broadcast_object_list(outcome)
    if problem is not None:
        raise RunStopped(problem, said=True)
    return result


def shared_out(action: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Run an action on each item, the items dealt out to the processes; return all (picklable) results on all of them.

    All processes call it with as many items; where one fails, all end.

    Raises:
        RunStopped: on every process, after the one that failed has said what went wrong. Alone: what the action raises.

    Example:
        >>> shared_out(abs, [-1, -2])
        [1, 2]
    """
    count = num_processes()
    if count == 1:
        return [action(item) for item in items]
    mine, problem = [], None
    try:
        mine = [action(item) for item in items[dist.get_rank() :: count]]
    except (Exception, SystemExit) as failure:
        problem = report(failure)
    shares, problems = zip(*gather_object([(mine, problem)]))
    for problem in problems:
        if problem is not None:
            raise RunStopped(problem, said=True)
    return [shares[number % count][number // count] for number in range(len(items))]


def stop_all(message: str, code: int = 1):
    """End the run for a reason that every process knows of: all call it, the main one says why.

    Raises:
        RunStopped: always.
    """
    if is_main():
        report(RunStopped(message))
    raise RunStopped(message, code, said=True)


def gather_padded(slice_: Tensor, fill: int) -> Tensor:
    """Concatenate (B, L) of every process in rank order as int64, padded with `fill` to the longest L."""
    slice_ = slice_.long()
    if num_processes() == 1:
        return slice_
    width = torch.tensor([slice_.shape[1]], device=slice_.device)
    dist.all_reduce(width, op=dist.ReduceOp.MAX)
    wide = slice_.new_full((slice_.shape[0], int(width)), fill)
    wide[:, : slice_.shape[1]] = slice_
    return gather_rows(wide)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of names and bits, in hex."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def check_equal(what: str, tensors: Mapping[str, Tensor]):
    """Stop the run where processes hold different bits of what must be the same on all.

    Raises:
        RunStopped: naming the processes that differ from the main one.
    """
    if num_processes() == 1:
        return
    digests = gather_object([digest(tensors)])
    different = [rank for rank, found in enumerate(digests) if found != digests[0]]
    if different:
        stop_all(
            f"{what} of process(es) {', '.join(map(str, different))} is not that of process 0, so their masks would be "
            "of another model. Go on from the last checkpoint (--resume); if it comes again, a device computes wrongly."
        )
