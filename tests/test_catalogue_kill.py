"""Kill -9 in the middle of add, update, delete and re-embed at twenty seeded moments, and two processes at once.

`python tests/test_catalogue_kill.py [--seed 0]` prints the table; the test runs the same. A process tells of each row
that the catalogue acknowledged before it is killed; what it told of must be there, whole, and once.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

TASKS = ("add", "update", "reembed", "add", "delete")
MOMENTS = 20
ITEMS = 60
# A child: argv = task, catalogue, number. It prints a line of JSON for what is acknowledged, at once.
CHILD = """
import json, sys, os, numpy as np
import torch
torch.set_num_threads(1)
sys.path.insert(0, {here!r})
from test_catalogue_kill import rows_of, load
from syncmask.retrieval import writing
from syncmask.retrieval.catalogue import Catalogue

writing.CHUNK, writing.COMMIT_ROWS = 4, 8
task, place, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
old, new = load(0), load(1)
catalogue = Catalogue.open(place, old if sys.argv[4] == "0" else new)

def tell(**what):
    os.write(1, (json.dumps(what) + "\\n").encode())

tell(ready=True)
sys.stdin.readline()
if task == "add":
    catalogue.add(rows_of(number, price=number), on_commit=lambda ids: tell(there=dict.fromkeys(ids, number)))
elif task == "update":
    for start in range(0, 48, 6):
        ids = [f"p{{n}}" for n in range(start, start + 6)]
        catalogue.update([dict(photo_id=name, price=number) for name in ids])
        tell(there=dict.fromkeys(ids, number))
elif task == "delete":
    for n in range(0, 40, 2):
        catalogue.delete(photo_ids=[f"gone{{number}}-{{n}}"])
        tell(gone=[f"gone{{number}}-{{n}}"])
else:
    catalogue.reembed(new if sys.argv[4] == "0" else old)
    tell(switched=True)
tell(done=True)
"""


def load(seed):
    """One of two models, the same in every process; its vectors are told from the other's by their length."""
    import torch

    from syncmask import SyncMaskConfig, SyncMaskForImageTextRetrieval, SyncMaskProcessor
    from syncmask.processing.processing_syncmask import SyncMaskImageProcessor
    from syncmask.processing.tokenizer import train_tokenizer
    from syncmask.retrieval.encoder import Encoder

    processor = SyncMaskProcessor(SyncMaskImageProcessor(size=32), train_tokenizer(["red hat", "blue shirt"] * 3))
    ids = {"vocab_size": len(processor.tokenizer), "mask_token_id": processor.tokenizer.mask_token_id}
    torch.manual_seed(seed)
    config = SyncMaskConfig.tiny(image_size=32, projection_dim=16 + 8 * seed, **ids)
    return Encoder(SyncMaskForImageTextRetrieval(config), processor, device="cpu")


def photo(number):
    from PIL import Image

    pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((32, 32))


def rows_of(number, price=0, prefix="p", count=ITEMS):
    """Photos with the same ids and pixels each time; half of an add's photos are new to the catalogue."""
    first = 0 if number % 2 else ITEMS // 2 * number
    for n in range(first, first + count):
        yield {
            "image": photo(n),
            "photo_id": f"{prefix}{n}",
            "item_id": f"i{n // 3}",
            "text": "red hat",
            "price": price,
        }


class Process:
    """A child that has imported everything and waits for the word."""

    def __init__(self, task, place, number, model):
        here = str(Path(__file__).parent)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RUST_LOG": "error"}
        self.child = subprocess.Popen(
            [sys.executable, "-c", CHILD.format(here=here), task, str(place), str(number), str(model)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        line = self.child.stdout.readline()
        assert "ready" in line, line + self.child.stderr.read()[-3000:]

    def go(self):
        self.child.stdin.write("\n")
        self.child.stdin.flush()

    def kill(self):
        self.child.send_signal(signal.SIGKILL)

    def told(self):
        """What it said until it ended; a last line cut by the kill counts for nothing."""
        output, errors = self.child.communicate(timeout=300)
        lines = [json.loads(line) for line in output.splitlines() if line.endswith("}")]
        if self.child.returncode not in (0, -signal.SIGKILL):
            raise AssertionError(f"a process failed by itself: {errors[-3000:]}")
        return lines


def state_of(place):
    """All rows of a catalogue by photo id, after it was opened anew."""
    from syncmask.retrieval.catalogue import Catalogue

    snapshot = Catalogue.open(place).snapshot()
    return snapshot, snapshot.table.to_arrow().to_pylist()


def faults(place, expected, gone, encoders):
    """What is wrong with a catalogue: [] = it opens, holds what was acknowledged, no half row, no row twice."""
    snapshot, rows = state_of(place)
    found = {row["photo_id"]: row for row in rows}
    model = next(encoder for encoder in encoders if encoder.revision == snapshot.state.revision)
    wrong = [f"{name} stands there {n} times" for name, n in Counter(row["photo_id"] for row in rows).items() if n > 1]
    for name, price in expected.items():
        if name not in found:
            wrong.append(f"{name} is lost")
        elif found[name]["price"] < price:
            wrong.append(f"{name} has price {found[name]['price']}, acknowledged was {price}")
    wrong += [f"{name} is back" for name in gone if name in found]
    pictures = model.encode_image([row["photo_bytes"] for row in rows], as_numpy=True) if rows else []
    for row, vector in zip(rows, pictures):
        whole = row["text"] and row["item_id"] and row["price"] is not None and row["revision"] == model.revision
        if not whole or not np.allclose(row["vector"], vector, atol=1e-5):
            wrong.append(f"{row['photo_id']} is a half row")
    return wrong


def kill_runs(folder, seed):
    """Kill tasks at seeded moments, all in one catalogue; a row of the table each, with what was wrong after it."""
    from syncmask.retrieval.catalogue import Catalogue

    random.seed(seed)
    encoders, place = [load(0), load(1)], folder / "shop"
    catalogue = Catalogue.open(place, encoders[0], create=True)
    catalogue.add(rows_of(1))
    expected, gone, table = {row["photo_id"]: 0 for row in rows_of(1)}, set(), []
    seconds = dict.fromkeys(TASKS, 1.0)
    number = kills = 0
    while kills < MOMENTS:
        number += 1
        task = TASKS[number % len(TASKS)]
        state = catalogue.snapshot().state
        model = [encoder.revision for encoder in encoders].index(state.revision)
        if task == "delete":
            dying = rows_of(1, prefix=f"gone{number}-", count=40)
            Catalogue.open(place, encoders[model]).add(dying)
            expected |= {f"gone{number}-{n}": 0 for n in range(1, 40, 2)}
        process = Process(task, place, number, model)
        begun, delay = time.monotonic(), random.uniform(0, 1) * seconds[task]
        process.go()
        while process.child.poll() is None and time.monotonic() - begun < delay:
            time.sleep(0.001)
        process.kill()
        told = process.told()
        killed = {"done": True} not in told
        seconds[task] = seconds[task] * 1.2 if killed else max(0.05, delay * 0.7)
        for line in told:
            expected |= line.get("there", {})
            gone |= set(line.get("gone", []))
        lines = sum("there" in line or "gone" in line for line in told)
        wrong = faults(place, expected, gone, encoders)
        if killed:
            kills += 1
            table.append([task, f"{delay:.3f} s", lines, len(expected), wrong])
        elif wrong:
            raise AssertionError(f"{task} ended and left {wrong[:3]}")
    # Everything still works: the same adds again, a change of the model, and the end is what it should be.
    last = catalogue.snapshot().state
    model = [encoder.revision for encoder in encoders].index(last.revision)
    Catalogue.open(place, encoders[model]).reembed(encoders[1 - model])
    table.append(["reembed", "not killed", 0, len(expected), faults(place, expected, gone, encoders)])
    return table


def printed(table):
    lines = [f"{'#':>2}  {'task':<8} {'kill -9 after':<14} {'answers':>7} {'rows known':>10}  catalogue"]
    for number, (task, moment, answers, rows, wrong) in enumerate(table, 1):
        verdict = "whole" if not wrong else f"WRONG: {'; '.join(wrong[:3])}"
        lines.append(f"{number:>2}  {task:<8} {moment:<14} {answers:>7} {rows:>10}  {verdict}")
    return "\n".join(lines)


@pytest.mark.slow
def test_twenty_kills_lose_nothing(tmp_path):
    command = [sys.executable, __file__, "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count(" whole") == MOMENTS + 1


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [(2, 4), (3, 5)], ids=["other rows", "the same new rows"])
def test_two_processes_that_add_at_once_lose_nothing(tmp_path, numbers):
    from syncmask.retrieval.catalogue import Catalogue

    encoders = [load(0), load(1)]
    Catalogue.open(tmp_path / "shop", encoders[0], create=True)
    processes = [Process("add", tmp_path / "shop", number, 0) for number in numbers]
    for process in processes:
        process.go()
    told = [process.told() for process in processes]
    assert all({"done": True} in lines for lines in told)
    expected = {}
    for lines, number in zip(told, numbers):
        for line in lines:
            # Where both wrote the same row, either may have been the last.
            expected |= dict.fromkeys(line.get("there", {}), min(numbers) if numbers[0] % 2 else number)
    assert len(expected) == (ITEMS if numbers[0] % 2 else 2 * ITEMS)
    assert faults(tmp_path / "shop", expected, set(), encoders) == []
    assert len(state_of(tmp_path / "shop")[1]) == len(expected)


@pytest.mark.slow
def test_adding_while_another_process_re_embeds_loses_nothing(tmp_path):
    """The writer ends well, or is told that the switch came first; what was acknowledged is there in any case."""
    from syncmask.retrieval.catalogue import Catalogue

    encoders = [load(0), load(1)]
    place = tmp_path / "shop"
    Catalogue.open(place, encoders[0], create=True).add(rows_of(1))
    for number in range(2, 8, 2):
        model = [e.revision for e in encoders].index(Catalogue.open(place).snapshot().state.revision)
        switch, writer = Process("reembed", place, number, model), Process("add", place, number, model)
        switch.go()
        time.sleep(0.05 * number)
        writer.go()
        output, errors = writer.child.communicate(timeout=300)
        assert writer.child.returncode == 0 or "Outdated" in errors, errors
        assert {"done": True} in switch.told()
        expected = {row["photo_id"]: 0 for row in rows_of(1)}
        for line in output.splitlines():
            expected |= json.loads(line).get("there", {})
        assert faults(place, expected, set(), encoders) == []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    results = kill_runs(given.folder or Path(tempfile.mkdtemp()), given.seed)
    print(printed(results))
    sys.exit(any(row[-1] for row in results))
