"""What the benchmarks compute from seconds; the seconds themselves are no test's business."""

import json

import pytest
import torch

from benchmarks import all as all_benchmarks
from benchmarks import decoding, measure, peers
from benchmarks.measure import Row, Times, both_times, in_turns, print_rows, table, timed_row


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_rounds_are_in_turns_and_the_first_does_not_count(monkeypatch):
    calls, seconds = [], iter(range(100))
    monkeypatch.setattr(measure.gc, "collect", lambda: None)
    monkeypatch.setattr(measure.time, "process_time", lambda: float(next(seconds)))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: 0.5 * len(calls))
    first, second = in_turns(lambda: calls.append("a"), lambda: calls.append("b"), rounds=3)
    assert calls == ["a", "b"] * 4
    assert first.cpu == second.cpu == [1.0] * 3 and first.wall == [0.5] * 3


def test_medians_of_both_clocks_and_their_ratios(one_thread):
    ours, peer = Times([1.0, 2.0, 9.0], [4.0, 4.0, 5.0]), Times([8.0, 6.0, 5.0], [2.0, 2.0, 2.0])
    row = timed_row("a", ours, peer, 2.5, 3.5)
    assert (row.ours, row.peer, row.ratio) == (2.0, 6.0, 3.0)
    assert row.reaches(row.floor) and not row.reaches(row.goal)
    assert row.times["1"]["wall_ratio"] == 0.5 and row.spread["ours"] == (1.0, 9.0)
    rate = timed_row("a", ours, peer, a_second=(12, "queries"))
    assert (rate.ours, rate.peer, rate.ratio, rate.unit) == (6.0, 2.0, 3.0, "queries a CPU s")
    assert rate.spread["ours"] == (12 / 9.0, 12.0)
    assert "peer" not in both_times(ours)["1"]


def test_work_must_stay_below_its_floor_and_a_record_has_none():
    less = Row("work", "GFLOP", 80.0, 100.0, 0.86, 0.75, at_most=True)
    assert less.ratio == 0.8 and less.content()["holds"] and not less.content()["reached_goal"]
    assert not Row("work", "GFLOP", 90.0, 100.0, 0.86, 0.75, at_most=True).content()["holds"]
    record = Row("a peer", "CPU s", 9.0, 1.0)
    assert record.content()["holds"] and "for the record" in table([record])
    assert "**missed**" in table([Row("slow", "CPU s", 2.0, 1.0, 1.5, 2.0)])


def test_the_table_shows_the_most_threads_by_the_clock(one_thread):
    row = timed_row("a", Times([1.0], [1.0]), Times([2.0], [2.0]), 1.5, 3)
    assert "by the clock" not in table([row])
    row.times["2"] = {"ours": {"wall": 0.5}, "peer": {"wall": 2.0}, "wall_ratio": 4.0}
    alone = Row("b", "GiB", 1.0, 2.0, 1.0, 0.4, at_most=True)
    lines = table([row, alone]).splitlines()
    assert "by the clock, 2 threads" in lines[0] and "0.5 s, 2 s: 4.00" in lines[2]
    assert len({line.count("|") for line in lines}) == 1


def fake_run(calls, cpu):
    """In place of a benchmark's process: one row a module, faster on more threads."""

    def run(module, quick, threads):
        calls.append((module, threads))
        times = {str(threads): {"ours": {"wall": cpu[0] / threads}, "peer": {"wall": 6.0}, "wall_ratio": 1.0}}
        row = Row(module, "CPU s", cpu[0], 6.0, 1.5, 3.0, times={} if module == "memory" else times)
        if module == all_benchmarks.TIMED[-1]:
            cpu.append(cpu.pop(0))  # the next whole run
        machine = {"processor": "p", "threads": str(threads)}
        return {"machine": machine, "rows": [json.loads(json.dumps(row.content()))], "skipped": [f"{module} skipped"]}

    return run


def test_all_measures_every_row_on_one_thread_and_what_is_timed_on_all(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(all_benchmarks, "run", fake_run(calls, [2.0]))
    assert all_benchmarks.main(["--quick", "--json", "--threads", "4"]) == 0
    content = json.loads(capsys.readouterr().out)
    names = [row["name"] for row in content["rows"]]
    assert names == list(all_benchmarks.MODULES) and set(all_benchmarks.TIMED) == set(names) - {"memory"}
    assert calls == [(name, 1) for name in names] + [(name, 4) for name in all_benchmarks.TIMED]
    for row in content["rows"]:
        assert {"ours", "peer", "ratio", "floor", "goal", "holds", "reached_goal"} <= set(row)
        assert list(row["times"]) == ([] if row["name"] == "memory" else ["1", "4"])
    assert content["machine"]["threads"] == "1 and 4" and len(content["skipped"]) == len(names)


def test_runs_give_medians_and_verdicts_of_the_medians(monkeypatch, capsys):
    monkeypatch.setattr(all_benchmarks, "run", fake_run([], [1.0, 5.0, 1.5]))
    assert all_benchmarks.main(["--json", "--threads", "1", "--runs", "3"]) == 0
    for row in json.loads(capsys.readouterr().out)["rows"]:
        assert (row["ours"], row["ratio"], row["holds"], row["reached_goal"]) == (1.5, 4.0, True, True)
    monkeypatch.setattr(all_benchmarks, "run", fake_run([], [5.0]))
    assert all_benchmarks.main(["--threads", "1"]) == 1
    assert "**missed**" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        all_benchmarks.main(["--runs", "0"])


def test_a_library_that_is_not_installed_is_a_line(capsys):
    skipped = []
    assert peers.installed(("json", "no_such_library"), skipped) == ["json"]
    assert peers.installed(("json",), skipped, needs=("no_other",)) == []
    assert skipped == [
        "no_such_library skipped: no_such_library not installed",
        "json skipped: no_other not installed",
    ]
    assert print_rows([], False, skipped) == 0
    assert skipped[0] in capsys.readouterr().out


@pytest.mark.slow
def test_exact_pixels_are_the_stock_processors_own(one_thread, monkeypatch):
    """What the row of small files times is the same batch to the last bit."""
    monkeypatch.setattr(decoding, "PHOTOS", 3)
    assert "differ by 0.0000" in decoding.decode_row(256, False, 1.5, 2.0, rounds=1).notes
