"""The memory of a step: counted as it is, a straight line in the batch's rows, and near what a process really holds."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from syncmask.training import finetune, pretrain
from syncmask.training.estimate import (
    GRADIENT_GAPS,
    RECOMPUTED_GAPS,
    Estimate,
    LiveBytes,
    Timeline,
    bytes_of,
    container_limit,
)

MIB = 2**20
SMALL = [
    *("--corpus", "garments", "--num_items", "40", "--image_size", "32", "--preset", "tiny", "--num_threads", "1"),
    *("--model_overrides", '{"patch_size": 8, "projection_dim": 16}', "--per_device_batch_size", "16"),
]


def test_tensors_are_counted_while_they_live():
    before = torch.ones(64)
    with LiveBytes() as counted:
        one = before + 1  # 256 bytes
        view, again = one[:8], one.add_(1)  # no memory of their own, nor has an operation in place
        two = torch.zeros(128)
        assert counted.live == 256 + 512
        del one, view, again
        assert counted.live == 512
        before.mul_(2)
        del two
    assert counted.live == 0 and max(live for live, _ in counted.points) == 768


def test_gradients_are_told_apart_and_saved_tensors_are_held():
    layer = torch.nn.Linear(16, 16)
    x = torch.randn(4, 16)
    with LiveBytes(layer.parameters()) as counted:
        loss = layer(x).square().sum()
        assert counted.live >= 4 * 16 * 4 and counted.gradients == 0  # the layer's output, saved for the square
        loss.backward()
        del loss
    size = sum(one.nbytes for one in layer.parameters())
    assert counted.gradients == size == counted.live
    with LiveBytes(layer.parameters()) as counted:  # they are there already
        layer(x).sum().backward()
    assert counted.gradients == 0 and counted.live == 0


def test_each_moment_is_a_line_and_the_peak_may_move():
    """First moment 100 + 10 a row, second 400 + 1 a row: the second is higher below 33 rows."""
    few, more = ([(100 + 10 * rows, 0), (400 + rows, 300)] for rows in (2, 4))
    line = Timeline.through(few, 2, more, 4)
    assert line.peak(10) == (410, 300) and line.peak(100) == (1100, 0)
    assert line.largest(1100) == 100 and line.largest(1109) == 100 and line.largest(399) == 0


def test_one_operation_more_in_one_of_the_runs_does_no_harm():
    few = [(rows, 0) for rows in np.linspace(0, 200, 50)]
    more = [(rows, 0) for rows in np.linspace(0, 400, 51)]
    assert Timeline.through(few, 2, more, 4).peak(8)[0] == pytest.approx(800, rel=0.01)


def test_gaps_of_the_host_have_their_limits():
    gaps = make_estimate(on_host=True).gaps
    assert gaps(0) == gaps(500 * MIB) == 50 * MIB and make_estimate().gaps(500 * MIB) == 0
    gaps = make_estimate(on_host=True, checkpointing=True, gradients=2000).gaps
    assert gaps(0) == GRADIENT_GAPS and gaps(100 * MIB) == GRADIENT_GAPS + 70 * MIB
    assert gaps(float("inf")) == GRADIENT_GAPS + RECOMPUTED_GAPS


def make_estimate(on_host=False, checkpointing=False, **changes):
    line = Timeline(np.array([0.0, 50.0]) * MIB, np.array([10.0, 0.0]) * MIB, np.array([0.0, 50.0]) * MIB)
    figures = {"process": 100, "weights": 50, "teacher": 50, "moments": 100, "gradients": 50, "room": 1000, "probe": 0}
    figures = {name: value * MIB for name, value in (figures | changes).items()}
    return Estimate(rows=20, tokens=12, step=line, on_host=on_host, checkpointing=checkpointing, **figures)


def test_the_parts_sum_to_the_whole_and_the_largest_batch_just_fits():
    found = make_estimate()
    assert found.peak == (100 + 50 + 50 + 100 + 200) * MIB
    assert found.largest_batch == 60  # 900 of 1000 MiB are for use, 300 are taken, 10 a row
    lines = found.table().splitlines()
    parts = [float(line.split()[-2]) for line in lines[1:] if line.endswith(" GiB")]
    assert sum(parts[:-1]) == pytest.approx(parts[-1], abs=0.03) and parts[-1] == pytest.approx(500 / 1024, abs=0.006)
    assert "largest batch that fits: 60" in found.table()
    assert "no batch fits" in make_estimate(room=330).table()


def test_the_gates_test_may_be_what_needs_most():
    found = make_estimate(probe=400)
    assert found.peak == 700 * MIB and "test of the gate" in found.table()
    assert make_estimate(probe=700).largest_batch == 0


def test_shared_memory_counts_once(tmp_path):
    weight = torch.ones(10)
    assert bytes_of([weight, weight, torch.ones(5)]) == 60
    assert container_limit(tmp_path / "none") == float("inf")
    (tmp_path / "limit").write_text("max\n")
    assert container_limit(tmp_path / "limit") == float("inf")
    (tmp_path / "limit").write_text("4096\n")
    assert container_limit(tmp_path / "limit") == 4096


def told(capsys, main, *words):
    """The figures of the printed table in GiB, and the largest batch."""
    main([*words])
    lines = capsys.readouterr().out.splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("memory of a step"))
    figures = {line[2:30].strip(): float(line.split()[-2]) for line in lines[start + 1 :] if line.startswith("  ")}
    largest = next(line for line in lines if line.startswith("largest batch"))
    return figures, int(largest.split(":")[1].split()[0])


def test_the_switch_prints_a_table_and_touches_no_folder(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("of another run")
    where = ("--output_dir", str(tmp_path), "--run_name", "run", "--overwrite", "--estimate")
    figures, largest = told(capsys, pretrain.main, *SMALL, *where)
    assert figures["in all"] > 0.1 and largest > 100
    assert [path.name for path in run.iterdir()] == ["config.yaml"] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_checkpointing_lets_more_rows_fit(tmp_path, capsys):
    deep = {"patch_size": 8, "vision_config": {"num_hidden_layers": 12}}
    words = (*SMALL, "--image_size", "64", "--model_overrides", json.dumps(deep), "--estimate")
    _, plain = told(capsys, pretrain.main, *words)
    _, checkpointed = told(capsys, pretrain.main, *words, "--activation_checkpointing")
    assert checkpointed > 1.5 * plain


@pytest.mark.parametrize("task", ["retrieval", "classification", "composed"])
def test_every_task_is_estimated(task, capsys):
    corpus = ["--corpus", "garment-variants"] if task == "composed" else []
    figures, largest = told(capsys, finetune.main, "--task", task, *SMALL, *corpus, "--estimate")
    assert figures["in all"] > 0.1 and largest > 100


# ------------------------------------------------------------------------------------------- against a process's memory

PRESET = ["--preset", "small", "--image_size", "112"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        [*PRESET, "--per_device_batch_size", "16"],
        [*PRESET, "--per_device_batch_size", "16", "--activation_checkpointing"],
        [*PRESET, "--per_device_batch_size", "16", "--mask_strategy", "evidence"],
        [*PRESET, "--per_device_batch_size", "8", "--freeze_towers"],
        [*PRESET, "--per_device_batch_size", "8", "--gradient_accumulation_steps", "2"],
        ["--preset", "tiny", "--image_size", "128", "--per_device_batch_size", "64"],
    ],
)
def test_the_estimate_is_within_15_percent_of_the_measured_peak(words):
    """Both above what the process holds beside weights and teacher; see benchmarks/memory.py."""
    command = [sys.executable, "-m", "benchmarks.memory", "--measure", json.dumps(words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(words, found)
    assert found["estimated"] == pytest.approx(found["measured"], rel=0.15), found
