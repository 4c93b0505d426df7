"""What a run has used: counters that wrap or cannot be read, parts that add up, the record of a resumed run."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from syncmask.training import energy, pretrain
from syncmask.training.arguments import ModelArguments
from syncmask.training.energy import Nvml, Rapl
from syncmask.training.launch import hub_starts
from syncmask.training.usage import Usage, read_parts, summed, total


def zone(powercap, name, label, count, span=1000):
    folder = powercap / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, value in (("name", label), ("energy_uj", count), ("max_energy_range_uj", span)):
        (folder / file).write_text(f"{value}\n")


@pytest.fixture
def powercap(tmp_path):
    for number, (label, count) in enumerate((("package-0", 900), ("dram", 100), ("core", 500))):
        zone(tmp_path, f"intel-rapl:{number}", label, count)
    return tmp_path


def test_packages_and_memory_are_counted_also_over_a_wrap(powercap):
    rapl = Rapl(powercap)
    zone(powercap, "intel-rapl:0", "package-0", 50)  # 900 -> 1000 -> 50
    zone(powercap, "intel-rapl:1", "dram", 130)
    zone(powercap, "intel-rapl:2", "core", 999)  # inside the package's count
    assert rapl.joules() == pytest.approx((150 + 30) / 1e6)
    assert rapl.joules() == pytest.approx((150 + 30) / 1e6) and rapl.missing == ""


def test_a_counter_that_cannot_be_read_is_none_with_the_reason(powercap, tmp_path, monkeypatch):
    (powercap / "intel-rapl:0" / "energy_uj").unlink()
    rapl = Rapl(powercap)
    assert rapl.joules() is None and "cannot be read" in rapl.missing
    nowhere = Rapl(tmp_path / "nowhere")
    assert nowhere.joules() is None and "no RAPL" in nowhere.missing


def fake_nvml(monkeypatch, readings):
    fake = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: readings.pop(0) / (handle == "GPU-abc"),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(energy.torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))


def test_a_gpu_is_read_by_its_uuid_in_joules(monkeypatch):
    fake_nvml(monkeypatch, [5_000, 12_000])
    assert Nvml(torch.device("cuda", 0)).joules() == 7.0


def test_a_gpu_that_fails_ends_no_run(monkeypatch):
    fake_nvml(monkeypatch, [5_000])  # then an IndexError
    gpu = Nvml(torch.device("cuda", 0))
    assert gpu.joules() is None and "cannot be read" in gpu.missing
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py" in Nvml(torch.device("cuda", 0)).missing


def part(first, last, joules, **more):
    reading = {"joules": joules, "missing": "" if joules is not None else "no counter"}
    return {
        **{"from_step": first, "to_step": last, "wall_s": 10.0, "training_s": 4.0, "cpu_s": 20.0},
        **{"peak_rss_bytes": 7, "energy": {"cpu": reading}},
        **more,
    }


def test_parts_add_up():
    found = total([part(0, 6, 100.0), part(4, 10, 50.0, peak_rss_bytes=9)])  # steps 5 and 6 were lost and done again
    assert found["steps"] == 10 and found["wall_s"] == 20 and found["cpu_s"] == 40 and found["parts"] == 2
    assert found["steps_per_s"] == pytest.approx(12 / 8) and found["peak_rss_bytes"] == 9
    assert found["energy"] == {"cpu": {"joules": 150.0, "missing": ""}}


def test_energy_is_unknown_where_a_part_does_not_know_it():
    assert total([part(0, 6, 100.0), part(6, 9, None)])["energy"]["cpu"] == {"joules": None, "missing": "no counter"}
    without = total([part(0, 6, 1.0), part(6, 9, 1.0, energy={})])
    assert without["energy"]["cpu"]["joules"] is None
    assert summed([{"joules": 1.0, "missing": ""}, {"joules": 2.5, "missing": ""}])["joules"] == 3.5


def test_a_damaged_record_and_a_full_disk_stop_nothing(tmp_path, monkeypatch):
    (tmp_path / "usage.json").write_text('{"parts": [')
    assert read_parts(tmp_path / "usage.json") == []
    usage = Usage(tmp_path / "not there")
    usage.readings = [{"cpu_s": 1.0, "peak_rss_bytes": None, "device": "cpu", "energy": {}}]
    usage.write(3)  # logs a warning
    assert not (tmp_path / "not there").exists()


def test_of_what_training_starts_from_names_on_the_hub_are_noted(tmp_path):
    assert hub_starts(ModelArguments(vision="a/vision", text=str(tmp_path))) == ["a/vision"]
    assert hub_starts(ModelArguments(init_from=str(tmp_path))) == [] == hub_starts(ModelArguments())


@pytest.mark.slow
def test_a_resumed_run_adds_up(tmp_path):
    words = ["--config", "quickstart", "--num_items", "40", "--image_size", "32", "--per_device_batch_size", "16"]
    words += ["--gate_probe_pairs", "8", "--no-evaluate", "--num_threads", "1", "--output_dir", str(tmp_path)]
    words += ["--run_name", "run", "--validate_every_epochs", "9", "--epochs", "2"]
    pretrain.main([*words, "--max_steps", "2"])
    first = json.loads((tmp_path / "run" / "usage.json").read_text())
    pretrain.main([*words, "--max_steps", "4", "--resume"])
    both = json.loads((tmp_path / "run" / "usage.json").read_text())
    assert first["total"]["steps"] == 2 and both["total"]["steps"] == 4 and both["total"]["parts"] == 2
    assert both["parts"][0] == first["parts"][0]
    assert [(one["from_step"], one["to_step"]) for one in both["parts"]] == [(0, 2), (2, 4)]
    last = both["parts"][1]
    assert 0 < last["training_s"] <= last["wall_s"] and 0 < last["cpu_s"] and last["peak_rss_bytes"] > 2**24
    assert last["processes"] == 1 and last["devices"] == ["cpu"] and last["threads"] == 1
    assert both["total"]["wall_s"] == pytest.approx(sum(one["wall_s"] for one in both["parts"]))
