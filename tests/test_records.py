"""What training keeps for the report: masks of a few photos after each epoch, times by phase, two batches."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from syncmask.evaluation.batch_sheets import read_batches
from syncmask.evaluation.history import read_history, waiting_share
from syncmask.evaluation.masks_over_time import RECORD, read_mask_states
from syncmask.evaluation.protocols import photo_names
from syncmask.processing.corpus import load_corpus
from syncmask.training import resume, task_pretraining
from syncmask.training.arguments import DataArguments
from syncmask.training.progress import Agreed, Progress
from syncmask.training.stopwatch import PHASES, StallMeter, Stopwatch, memory
from syncmask.training.trainer import Trainer

SMALL = [
    *("--num_items", "60", "--epochs", "3", "--mask_strategy", "evidence"),
    *("--log_batches", "--log_every", "2", "--checkpoint_every", "3"),
]


@pytest.fixture(scope="module")
def train(pretrain_tiny):
    return lambda folder, *more: pretrain_tiny(folder, *SMALL, *more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, train):
    return train(tmp_path_factory.mktemp("finished"), "--no-evaluate")


class Killed(Exception):
    pass


def test_masks_are_kept_before_the_first_step_and_after_each_epoch(finished):
    states = read_mask_states(finished)
    steps = [line["step"] for line in read_history(finished) if line["split"] == "validation"]
    assert [state.step for state in states] == [0, *steps] and [state.epoch for state in states] == [0, 1, 2, 3]
    assert states[0].strength == 0 and states[-1].strength == 1 and states[0].grid == [4, 4]
    validation = load_corpus("garments", num_items=60, image_size=32)["validation"]
    names = photo_names(validation).tolist()
    rows = [names.index(name) for name in states[0].photos]
    assert len({validation[row]["item_id"] for row in rows}) == len(rows) >= 2  # different items
    for state in states:
        assert state.photos == states[0].photos
        for length, words, patches in zip(state.lengths, state.words, state.patches):
            assert len(words) == round(0.3 * length) and len(patches) == round(0.4 * 16)
    assert states[0].words != states[-1].words
    assert (finished / RECORD).stat().st_size / len(states) < 10_000


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [1, 2, 4])
def test_a_resumed_run_keeps_the_same_masks(finished, tmp_path, monkeypatch, checkpoints, train):
    done, real = [], resume.save_checkpoint

    def save(*args, **kwargs):
        real(*args, **kwargs)
        done.append(1)
        if len(done) == checkpoints:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(resume, "save_checkpoint", save)
        with pytest.raises(Killed):
            train(tmp_path, "--no-evaluate")
    with (tmp_path / "run" / RECORD).open("a") as file:
        file.write('{"step": 99, "half a li')  # as a kill leaves it
    run = train(tmp_path, "--no-evaluate", "--resume")
    assert (run / RECORD).read_bytes() == (finished / RECORD).read_bytes()
    steps = [line["step"] for line in read_history(run, "times.jsonl") if line["pairs"]]
    assert steps == sorted(steps)


@pytest.mark.slow
def test_following_photos_changes_no_bit_of_the_run(finished, tmp_path, monkeypatch, train):
    monkeypatch.setattr(task_pretraining.MaskRecord, "state", lambda *_: None)
    run = train(tmp_path, "--no-evaluate")
    assert not (run / RECORD).exists()
    for name in ("batches.jsonl", "metrics.jsonl"):
        one, other = ([{**line, "time_s": 0} for line in read_history(folder, name)] for folder in (run, finished))
        assert one == other
    assert (run / "final" / "model.safetensors").read_bytes() == (finished / "final" / "model.safetensors").read_bytes()


def test_times_count_every_pair_and_second_once(finished):
    times = read_history(finished, "times.jsonl")
    rows = sum(len(line["rows"]) for line in read_history(finished, "batches.jsonl"))
    assert sum(line["pairs"] for line in times) == rows
    assert sum(line["steps"] for line in times) == times[-1]["step"]
    for line in times:
        assert 0 <= line["cpu_s"] and (line["cpu_s"] > 0 or not line["steps"])
        phases = [line[f"{name}_s"] for name in PHASES]
        assert min(phases) >= 0 and sum(phases) <= line["seconds"] + 0.01
        assert line["peak_rss_bytes"] > 50e6
    assert sum(line["validating_s"] for line in times) > 0 and sum(line["saving_s"] for line in times) > 0


def test_a_stopwatch_tells_phases_apart(monkeypatch):
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], process_time=lambda: now[0] / 2)
    monkeypatch.setattr("syncmask.training.stopwatch.time", clock)
    watch = Stopwatch()

    def batches():
        for number in range(3):
            now[0] += 0.25
            yield number

    for _ in watch.waits(batches()):
        now[0] += 1.0
    with pytest.raises(ValueError, match="stop"), watch.phase("saving"):
        now[0] += 0.5
        raise ValueError("stop")
    read = watch.read()
    assert (read["waiting_s"], read["saving_s"], read["planning_s"]) == (0.75, 0.5, 0)
    assert (read["seconds"], read["cpu_s"]) == (4.25, 2.125) and watch.read()["waiting_s"] == 0
    assert memory()["peak_rss_bytes"] > 1e6


def reading(waited, **more):
    return {"seconds": 12.0, "waiting_s": waited, "planning_s": 1.0, "validating_s": 0.5, "saving_s": 0.5} | more


def test_waiting_is_a_share_of_the_time_of_training_since_the_last_logged_step():
    meter = StallMeter()
    assert waiting_share([]) == waiting_share([reading(0.0)]) == 0 and waiting_share([reading(10.0)]) > 0.999
    meter.add(reading(1.0))
    meter.add(reading(3.0))  # a checkpoint lay between
    assert not meter.close() and meter.share == pytest.approx(0.2)
    meter.add(reading(0.5))
    assert not meter.close() and meter.share == pytest.approx(0.05)


def test_much_waiting_is_told_once_where_it_lasts(caplog):
    told = []
    trainer = SimpleNamespace(
        stalls=StallMeter(),
        accelerator=SimpleNamespace(is_main_process=True),
        arguments=SimpleNamespace(data=DataArguments(fast_decode=True)),
    )
    for waited in (5.0, 5.0, 0.0, 5.0, 3.0, 2.5, 5.0, 0.0, 5.0, 5.0, 5.0):
        trainer.stalls.add(reading(waited))
        Trainer._note_waiting(trainer)
        told.append(len(caplog.records))
    assert told == [0] * 5 + [1] * 6
    assert caplog.messages == [
        "waiting for photos: 25 % of the time. What helps: more --num_workers or --decoded_cache FOLDER"
    ]


def test_waiting_goes_to_the_bar_and_the_trackers_alone():
    logged, tracked, loss = [], [], Agreed({"itc": 1.0}, True, 0)
    trainer = SimpleNamespace(
        stalls=StallMeter(),
        progress=Progress(),
        arguments=SimpleNamespace(run=SimpleNamespace(log_every=2), data=DataArguments()),
        schedule=SimpleNamespace(get_last_lr=lambda: [0.1]),
        task=SimpleNamespace(figures=lambda *_: {}),
        student=None,
        accelerator=SimpleNamespace(is_main_process=True, log=lambda figures, step: tracked.append(figures)),
        _log=lambda split, figures: logged.append(figures),
    )
    trainer._log_times = lambda: trainer.stalls.add(reading(2.5))
    trainer._note_waiting = lambda: Trainer._note_waiting(trainer)
    for trainer.progress.step in (1, 2, 3):
        Trainer._log_step(trainer, {}, None, 1.0, loss)
    assert trainer.shown == {"itc": "1.00", "waiting": "25%"}
    assert len(logged) == len(tracked) == 1
    assert tracked == [logged[0] | {"waiting_share": pytest.approx(0.25)}] and "waiting_share" not in logged[0]


@pytest.mark.parametrize("workers, wanted", [(0, None), (2, 5)])
def test_workers_read_as_many_batches_ahead_as_is_asked_for(workers, wanted):
    data = DataArguments(num_workers=workers, prefetch_factor=5)
    trainer = SimpleNamespace(
        arguments=SimpleNamespace(data=data, run=SimpleNamespace(seed=0)),
        task=SimpleNamespace(data=SimpleNamespace(photos=[], index=None), processor=None),
        sampler=None,
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )
    assert Trainer._loader(trainer).prefetch_factor == wanted


def test_waiting_is_in_the_summary_and_nowhere_in_the_metrics(finished):
    share = waiting_share(read_history(finished, "times.jsonl"))
    assert 0 < share < 1
    assert f"waiting for photos: {share:.0%} of the time of training" in (finished / "summary.txt").read_text()
    assert "waiting" not in (finished / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_a_run_ends_with_a_whole_report_that_can_be_made_again(tmp_path, capsys, train):
    from typer.testing import CliRunner

    from syncmask.evaluation.cli import app

    run = train(tmp_path)
    page = (run / "report" / "index.html").read_text(encoding="utf-8")
    assert "What is not here" not in page
    for heading in ("The masks over training time", "Where words look", "A random and a grouped batch", "The corpus"):
        assert f"<h2>{heading}</h2>" in page
    batches, used = read_batches(run)
    train_names = set(photo_names(load_corpus("garments", num_items=60, image_size=32)["train"]).tolist())
    for batch in batches.values():
        assert set(batch.photos) <= train_names and len(batch.photos) == 16 and batch.same_item_pairs == 0
        cosines = np.array(batch.cosines) / 100
        assert abs(cosines).max() <= 1.01 and batch.own == pytest.approx(cosines.diagonal().mean(), abs=0.3)
    assert isinstance(used, bool) and set(batches["grouped"].photos) != set(batches["random"].photos)
    names = {path.name for path in (run / "report").iterdir()}
    (run / "report" / "index.html").unlink()
    done = CliRunner().invoke(app, ["report", str(run)], catch_exceptions=False)
    assert done.exit_code == 0 and {path.name for path in (run / "report").iterdir()} == names
    # Only usage.json goes on counting after the first report.
    speed = re.compile(r"<h2>Speed and memory.*?</section>", re.DOTALL)
    again = (run / "report" / "index.html").read_text(encoding="utf-8")
    assert speed.sub("", again) == speed.sub("", page)
    (run / RECORD).unlink()
    (run / "grouping.json").write_text(json.dumps({"used": False, "batches": {}}))
    CliRunner().invoke(app, ["report", str(run)], catch_exceptions=False)
    page = (run / "report" / "index.html").read_text(encoding="utf-8")
    assert "The masks over training time: the run was made by a version that did not record it" in page
