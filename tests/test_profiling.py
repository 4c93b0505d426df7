"""Recording some steps: files that can be read, no other effect on the run."""

import json
import time

import pytest
import torch
from safetensors.torch import load_file

from syncmask.training import pretrain
from syncmask.training.profiling import WAIT, WARM_UP, StepProfile

SMALL = [
    *("--corpus", "garments", "--num_items", "40", "--image_size", "32", "--preset", "tiny", "--num_threads", "1"),
    *("--model_overrides", '{"patch_size": 8, "projection_dim": 16}', "--per_device_batch_size", "16"),
    *("--warmup_steps", "1", "--deterministic", "--no-evaluate", "--validate_every_epochs", "99", "--max_steps", "7"),
    *("--log_every", "1"),
]


@pytest.fixture(autouse=True)
def _restore_torch():
    yield
    torch.use_deterministic_algorithms(False)


def events(run):
    return json.loads((run / "profile" / "trace.json").read_text())["traceEvents"]


def test_exactly_the_steps_after_the_warm_up_are_recorded(tmp_path):
    with StepProfile(2, tmp_path) as recorded:
        for size in range(1, WAIT + WARM_UP + 4):
            with torch.profiler.record_function(f"step of size {size}"):
                torch.ones(size, size) @ torch.ones(size, size)
            recorded.step()
            time.sleep(0.001)
    names = {event.get("name") for event in events(tmp_path)}
    assert {name for name in names if str(name).startswith("step of")} == {"step of size 4", "step of size 5"}
    assert "aten::mm" in (tmp_path / "profile" / "operators.txt").read_text()


def test_without_steps_nothing_is_written(tmp_path, caplog):
    with StepProfile(None, tmp_path) as recorded:
        recorded.step()
    assert list(tmp_path.iterdir()) == [] and not caplog.records
    with StepProfile(1, tmp_path) as recorded:
        recorded.step()
    assert "nothing was profiled" in caplog.text


@pytest.mark.slow
def test_a_profiled_run_goes_on_and_equals_another_bit_for_bit(tmp_path):
    where = ("--output_dir", str(tmp_path), "--run_name")
    pretrain.main([*SMALL, *where, "plain"])
    pretrain.main([*SMALL, *where, "profiled", "--profile", "2"])
    one, other = (load_file(tmp_path / run / "final" / "model.safetensors") for run in ("plain", "profiled"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    names = {event.get("name") for event in events(tmp_path / "profiled")}
    assert any("backward" in str(name).lower() for name in names) and "aten::addmm" in names
    assert "Self CPU" in (tmp_path / "profiled" / "profile" / "operators.txt").read_text()
    assert not (tmp_path / "plain" / "profile").exists()
    steps = [json.loads(line)["step"] for line in (tmp_path / "profiled" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 7
