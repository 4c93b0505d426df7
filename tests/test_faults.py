"""Faults, injected for real: what is said, and that nothing finished is lost.

As a script (`torchrun --nproc_per_node 2 tests/test_faults.py FOLDER FAULT`) this file is what two processes run.
"""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from syncmask.processing.collator import PhotoDataset, UnreadablePhoto
from syncmask.processing.corpus import CorpusIndex
from syncmask.training import launch, pretrain, trainer
from syncmask.training.checkpoint import load_checkpoint, newest_complete, save_checkpoint
from syncmask.training.faults import RunStopped
from syncmask.training.substitutes import GlobalBatch, SubstitutingPhotos, candidates

SETTINGS = [
    *("--image_size", "32", "--preset", "tiny", "--model_overrides", '{"patch_size": 8, "projection_dim": 16}'),
    *("--warmup_steps", "2", "--epochs", "2", "--gate_every", "2", "--gate_max_steps", "4", "--mask_ramp_steps", "2"),
    *("--num_threads", "1", "--log_every", "1", "--log_batches", "--checkpoint_every", "2", "--no-evaluate"),
]
GARMENTS = ["--corpus", "garments", "--num_items", "40"]


def train(folder, *more, corpus=GARMENTS, batch=16):
    run = ["--output_dir", str(folder), "--run_name", "run", "--per_device_batch_size", str(batch)]
    pretrain.main([*SETTINGS, *corpus, *run, *more])
    return folder / "run"


def at_step(monkeypatch, step, act):
    """Call act(trainer) once, just before a step."""
    real, done = trainer.Trainer.train_step, []

    def train_step(self, batch):
        if self.progress.step == step and not done:
            done.append(1)
            act(self)
        return real(self, batch)

    monkeypatch.setattr(trainer.Trainer, "train_step", train_step)


def same_run(one, other):
    for name in ("metrics.jsonl", "batches.jsonl"):
        lines = [[json.loads(line) for line in (run / name).read_text().splitlines()] for run in (one, other)]
        assert [{**line, "time_s": 0} for line in lines[0]] == [{**line, "time_s": 0} for line in lines[1]]
    a, b = (load_file(run / "final" / "model.safetensors") for run in (one, other))
    assert all(torch.equal(a[name], b[name]) for name in a)


def steps(run):
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").open() if '"split": "train"' in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_tells_how_to_go_on(whole, tmp_path, monkeypatch, capfd, number):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda _: os.kill(os.getpid(), number))
        with pytest.raises(RunStopped) as stopped:
            train(tmp_path)
    assert stopped.value.code == 128 + number and signal.getsignal(number) is before
    said = capfd.readouterr().err
    assert f"stopped by {number.name} after step 3/8" in said and "--resume" in said
    assert newest_complete(tmp_path / "run" / "checkpoints").name == "step_00000003"
    if number == signal.SIGTERM:
        same_run(train(tmp_path, "--resume"), whole)


def test_a_nan_weight_stops_the_run_and_is_never_saved(tmp_path, monkeypatch):
    def poison(self):
        with torch.no_grad():
            self.student.itm_head.weight.view(-1)[0] = float("nan")

    at_step(monkeypatch, 3, poison)
    with pytest.raises(RunStopped, match=r"itm is not finite in .* step 3 \(rows \[\d+.*step_00000002.*--resume"):
        train(tmp_path)
    assert steps(tmp_path / "run") == [1, 2, 3]
    saved = newest_complete(tmp_path / "run" / "checkpoints")
    assert saved.name == "step_00000002"
    assert all(tensor.isfinite().all() for tensor in load_checkpoint(saved).tensors["model"].values())


def test_a_model_that_is_not_finite_is_not_saved(tmp_path, monkeypatch):
    real = trainer.Trainer.train_step

    def spoil_after(self, batch):
        stepped = real(self, batch)
        if self.progress.step == 2:
            self.student.itm_head.weight.data[0, 0] = float("inf")
        return stepped

    monkeypatch.setattr(trainer.Trainer, "train_step", spoil_after)
    with pytest.raises(RunStopped, match="itm_head.weight, are not finite after step 2"):
        train(tmp_path)
    assert newest_complete(tmp_path / "run" / "checkpoints") is None


def test_out_of_memory_says_what_to_lower(tmp_path, monkeypatch):
    at_step(monkeypatch, 0, lambda _: torch.empty(1 << 55))
    with pytest.raises(RunStopped, match="out of memory.*--per_device_batch_size"):
        train(tmp_path)


def test_a_file_that_cannot_grow_leaves_what_was_saved(tmp_path):
    """The system's own limit for a file's size: the write itself fails, in the midst of a tensor."""
    tensors = {"model": {"weight": torch.zeros(100_000)}}
    before = save_checkpoint(tmp_path, tensors, {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="step_00000002 could not be written; it needs 400,000 bytes"):
            save_checkpoint(tmp_path, tensors, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"] and newest_complete(tmp_path) == before


@pytest.fixture
def mounted(tmp_path):
    """Mount a small disk in memory: `mounted(options)` returns its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        if os.geteuid() != 0 or shutil.which("mount") is None:
            pytest.skip("only root may mount a disk")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.decode().strip()}")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


def test_a_read_only_folder_is_told_at_the_start(mounted):
    folder = mounted("ro")
    with pytest.raises(RunStopped, match="nothing can be written to .*Read-only file system.*--output_dir"):
        train(folder)


@pytest.mark.slow
def test_a_full_disk_is_told_in_bytes_and_the_run_goes_on_once_there_is_room(whole, mounted, monkeypatch, capfd):
    folder = mounted("size=64m")

    def fill(_):
        (folder / "filler").write_bytes(bytes(shutil.disk_usage(folder).free - 500_000))

    with monkeypatch.context() as patch:
        at_step(patch, 3, fill)
        with pytest.raises(RunStopped, match=r"disk is full.*needs [\d,]+ bytes and [\d,]+ are free.*--resume"):
            train(folder)
    assert newest_complete(folder / "run" / "checkpoints").name == "step_00000002"
    (folder / "filler").unlink()
    same_run(train(folder, "--resume"), whole)


# --- photos that rot


@pytest.fixture
def photos(tmp_path):
    """Twelve items of two photos as files (an image folder), rows 2i and 2i + 1 of item i."""
    import datasets

    generator = np.random.default_rng(0)
    rows = {"image": [], "text": [], "item_id": []}
    for row in range(24):
        path = tmp_path / f"{row}.png"
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
        rows["image"].append(str(path))
        rows["text"].append(f"text {row // 2}")
        rows["item_id"].append(f"item {row // 2}")
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    index = CorpusIndex.from_dataset(dataset)
    return tmp_path, PhotoDataset(dataset, index, image_size=8, seed=0, augment=False), index


def rot(folder, *rows):
    for row in rows:
        path = folder / f"{row}.png"
        path.write_bytes(path.read_bytes()[:40])


def test_another_photo_of_the_item_stands_in(photos):
    folder, dataset, index = photos
    batch = GlobalBatch(np.array([0, 2, 4, 6]), np.array([8, 9, 10]))
    rot(folder, 2)
    keys = [(3, row, batch) for row in batch.rows.tolist()]
    whole = SubstitutingPhotos(dataset, index, seed=0).__getitems__(keys)
    assert [record["row_id"] for record in whole] == [0, 3, 4, 6]
    assert whole[1]["asked"] == 2 and whole[1]["reason"] and "asked" not in whole[0]
    # The same choice where another process holds another slice.
    half = SubstitutingPhotos(dataset, index, seed=0).__getitems__(keys[1:2])
    assert half[0]["row_id"] == 3 and np.array_equal(half[0]["pixel_values"], whole[1]["pixel_values"])


def test_then_a_row_of_the_dropped_tail_stands_in_and_rule_1_holds(photos):
    folder, dataset, index = photos
    batch = GlobalBatch(np.array([0, 2, 4, 6]), np.array([1, 5, 8, 9, 12]))
    rot(folder, 2, 3)
    record = SubstitutingPhotos(dataset, index, seed=0)[(0, 2, batch)]
    assert record["asked"] == 2 and record["row_id"] in (8, 9, 12)
    chosen = {SubstitutingPhotos(dataset, index, seed=0)[(epoch, 2, batch)]["row_id"] for epoch in range(12)}
    assert chosen == {8, 9, 12}


@pytest.mark.parametrize("seed", range(20))
def test_candidates_equal_a_search_by_loops(seed):
    rng = np.random.default_rng(seed)
    index = CorpusIndex(rng.integers(0, 8, 30), rng.integers(0, 9, 30), [str(n) for n in range(9)])
    order = rng.permutation(30)
    batch, row = GlobalBatch(order[:8], order[24:]), int(order[rng.integers(8)])
    others = [other for other in batch.rows if other != row]
    allowed = []
    for other in range(30):
        view = index.item_ids[other] == index.item_ids[row]
        if other in batch.rows or not (view or other in batch.tail):
            continue
        if all(
            index.item_ids[other] != index.item_ids[o] and index.text_ids[other] != index.text_ids[o] for o in others
        ):
            allowed.append(other)
    found = candidates(row, batch, index, seed, 0)
    assert sorted(found.tolist()) == allowed
    is_view = index.item_ids[found] == index.item_ids[row]
    assert not (np.diff(is_view.astype(int)) > 0).any()  # views before the tail
    assert np.array_equal(found, candidates(row, batch, index, seed, 0))


def test_nothing_that_may_stand_in_ends_the_run(photos):
    folder, dataset, index = photos
    rot(folder, 2, 3)
    with pytest.raises(UnreadablePhoto, match="no photo that may stand in"):
        SubstitutingPhotos(dataset, index, seed=0)[(0, 2, GlobalBatch(np.array([0, 2]), np.array([1])))]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_photo_that_rots_while_training_is_replaced_listed_and_counted(tmp_path, monkeypatch, capfd, workers):
    """Truncated files in an image folder; a run that is stopped and resumed lists each of them once."""
    from syncmask.processing.garments import make_garments

    corpus = tmp_path / "corpus"
    corpus.mkdir()
    with (corpus / "metadata.jsonl").open("w") as lines:
        for row, cells in enumerate(make_garments(40, seed=0, image_size=32, cache_dir=str(tmp_path / "cache"))):
            cells["image"].save(corpus / f"{row}.png")
            line = {"file_name": f"{row}.png", "text": cells["text"], "item_id": str(cells["item_id"])}
            lines.write(json.dumps(line) + "\n")
    settings = {"corpus": ["--corpus", "folder", "--data_dir", str(corpus)]}
    more = ("--num_workers", str(workers))

    def truncate(_):
        for path in sorted(corpus.glob("*.png"))[::9]:
            path.write_bytes(path.read_bytes()[:60])

    with monkeypatch.context() as patch:
        at_step(patch, 1, truncate)
        at_step(patch, 5, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(RunStopped):
            train(tmp_path / "cut", *more, **settings)
    run = train(tmp_path / "cut", *more, "--resume", **settings)
    listed = [json.loads(line) for line in (run / "substitutes.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (run / "batches.jsonl").read_text().splitlines()]
    assert listed and len({(line["epoch"], line["row"]) for line in listed}) == len(listed)
    for line in listed:
        batch = next(b["rows"] for b in rows if b["step"] == line["step"])
        assert line["substitute"] in batch and line["row"] not in batch and line["reason"]
    assert f"{len(listed)} photos could not be read" in (run / "summary.txt").read_text()


# --- faults of one of two processes


class Faulty(trainer.Trainer):
    """Meets a fault on the second process alone, before step 3."""

    fault = None

    def train_step(self, batch):
        if self.accelerator.process_index == 1 and self.progress.step == 3:
            if self.fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.fault == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            elif self.fault == "nan":
                batch["pixel_values"] = batch["pixel_values"].float() * float("nan")
            elif self.fault == "teacher":
                next(self.task.teacher.model.parameters()).data.view(-1)[0] += 1
        return super().train_step(batch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said", "left"),
    [
        ("kill", "Signal 9 (SIGKILL)", "step_00000002"),
        ("signal", "stopped by SIGTERM after step 4", "step_00000004"),
        ("nan", "not finite in the batch after step 3", "step_00000002"),
        ("teacher", "the teacher of process(es) 1 is not that of process 0", "step_00000002"),
    ],
)
def test_a_fault_of_one_process_ends_all_with_its_own_error(tmp_path, fault, said, left):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "c")}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    command = [*launcher, __file__, str(tmp_path), fault]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=150)
    assert done.returncode != 0 and said in done.stderr, done.stderr[-3000:]
    if fault in ("signal", "nan", "teacher"):
        assert done.stderr.count(said) == 1  # said once, not by every process
    assert newest_complete(tmp_path / "run" / "checkpoints").name == left
    # The kill came before step 4 on one process alone: both have written no more than what they agreed on.
    assert steps(tmp_path / "run")[:3] == [1, 2, 3] and not (tmp_path / "run" / "final").exists()


if __name__ == "__main__":
    Faulty.fault = sys.argv[2]
    launch.Trainer = Faulty
    train(Path(sys.argv[1]), batch=8)
