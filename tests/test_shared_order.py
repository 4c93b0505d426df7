"""The parts of an epoch's order, shared out to the processes of a run.

As a script (`torchrun --nproc_per_node 2 tests/test_shared_order.py FOLDER [STEP]`) this is what the processes run.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

from syncmask.training import grouping, processes
from syncmask.training.faults import RunStopped


def plan(together=True):
    """Rows never seen, every rule on, many parts of unequal size."""
    rng = np.random.default_rng(0)
    items, seen = np.arange(1_000) % 400, np.arange(1_000) >= 50
    image_feats, text_feats = (
        torch.nn.functional.normalize(
            torch.from_numpy(rng.normal(size=(400, 16))[items] + rng.normal(size=(1_000, 16)))
        )
        for _ in range(2)
    )
    texts = rng.random((400, 60)) * (rng.random((400, 60)) < 0.1) + 0.01
    texts = sparse.csr_matrix(texts / np.linalg.norm(texts, axis=1, keepdims=True), dtype=np.float32)
    settings = {"seed": 3, "epoch": 2, "batch_size": 8, "tau": 0.4, "part_size": 64, "margin": 0.0, "share": 0.9}
    return grouping.plan_epoch(image_feats, text_feats, seen, items, items, texts, **settings, together=together)


def figures(made):
    return [made.order.tolist(), made.fallbacks, made.forced, made.conflicts, made.grouped]


class Gathering(Exception):
    """Raised where processes would wait for one another."""


def take_turns(monkeypatch, count, action):
    """Run an action as each of `count` processes would, one after the other; return what each gets."""
    sent, first = [], []

    def broadcast(values):
        if not first:
            first.extend(values)
        return first

    def gather(mine):
        if len(sent) < count:
            sent.extend(mine)
            raise Gathering
        return sent

    monkeypatch.setattr(processes, "num_processes", lambda: count)
    monkeypatch.setattr(processes, "broadcast_object_list", broadcast)
    monkeypatch.setattr(processes, "gather_object", gather)
    found = []
    for turn in range(2 * count):
        monkeypatch.setattr(processes.dist, "get_rank", lambda rank=turn % count: rank)
        try:
            found.append(action())
        except Gathering:
            assert turn < count
    return found, sent


@pytest.mark.parametrize("count", [2, 3, 7])
def test_results_come_back_in_order_and_each_item_is_done_once(monkeypatch, count):
    found, sent = take_turns(monkeypatch, count, lambda: processes.shared_out(lambda item: -item, range(5)))
    assert found == [[0, -1, -2, -3, -4]] * count
    assert sorted(result for mine, _ in sent for result in mine) == [-4, -3, -2, -1, 0]
    assert max(len(mine) for mine, _ in sent) == -(-5 // count)


def test_alone_what_an_action_raises_passes():
    with pytest.raises(ZeroDivisionError):
        processes.shared_out(lambda item: 1 // item, [1, 0])


def test_one_failure_ends_all(monkeypatch, capsys):
    with pytest.raises(RunStopped, match="division") as stopped:
        take_turns(monkeypatch, 2, lambda: processes.shared_out(lambda item: 1 // item, [1, 0]))
    assert stopped.value.said and capsys.readouterr().err.count("ZeroDivisionError") == 1


def test_the_order_is_the_same_for_any_number_of_processes(monkeypatch):
    alone = plan(together=False)
    assert alone.grouped == 896 and alone.fallbacks and alone.forced
    assert figures(plan()) == figures(alone)
    for count in (2, 3):
        with monkeypatch.context() as patch:
            found, sent = take_turns(patch, count, plan)
        assert [figures(made) for made in found] == [figures(alone)] * count
        walked = [sum(len(part.order) for part in mine) for mine, _ in sent]
        assert sum(walked) == 896 and max(walked) < 1.3 * 896 / count


def two_processes(*arguments):
    """Run this file as two processes that know of each other; return their exit codes and what they said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command, options = [sys.executable, __file__, *arguments], {"stderr": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen(command, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **options)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    return [process.returncode for process in started], said


@pytest.mark.slow
def test_two_real_processes_make_the_order_of_one(tmp_path):
    codes, said = two_processes(str(tmp_path))
    assert codes == [0, 0], said
    for rank in range(2):
        found = json.loads((tmp_path / f"order_{rank}.json").read_text())
        assert found["world_size"] == 2 and found["figures"] == figures(plan(together=False))


@pytest.mark.slow
@pytest.mark.parametrize(("step", "rank"), [("greedy_walk", 1), ("split_into_parts", 0)])
def test_a_failure_on_one_real_process_is_said_there_and_ends_both(tmp_path, step, rank):
    codes, said = two_processes(str(tmp_path), step, str(rank))
    assert codes == [1, 1]
    assert said[rank].count("ValueError: spoilt") == 1 and "spoilt" not in said[1 - rank]
    assert all((tmp_path / f"stopped_{each}").read_text() == "ValueError: spoilt" for each in range(2))


def spoilt(*_):
    raise ValueError("spoilt")


def main(folder, step=None, failing=None):
    from accelerate import Accelerator

    rank = Accelerator(cpu=True).process_index
    torch.set_num_threads(1)
    if str(rank) == failing:
        setattr(grouping, step, spoilt)
    try:
        made = {"world_size": torch.distributed.get_world_size(), "figures": figures(plan())}
        (folder / f"order_{rank}.json").write_text(json.dumps(made))
    except RunStopped as stopped:
        (folder / f"stopped_{rank}").write_text(str(stopped))
        # Both are to end for the same reason, none because the other is gone.
        torch.distributed.barrier()
        raise
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
