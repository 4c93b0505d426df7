import json

import numpy as np
import pytest
import torch

from benchmarks import scale
from benchmarks.scale import Plan, kmeans_flop, memory, order_seconds, ring_all_gather, ring_all_reduce, simulate
from syncmask.training import partition
from syncmask.training.partition import ITERATIONS, MOST_CLUSTERS, SAMPLE_PER_CENTRE, split_into_parts

FREE = {"latency": 1e-12}


def test_ring_formulas_give_known_values():
    plan = Plan(processes=4, bandwidth=1e9, latency=0.5)
    assert ring_all_gather(1e9, plan) == pytest.approx(3 * (1 + 0.5))
    assert ring_all_reduce(4e9, plan) == pytest.approx(6 * (1 + 0.5))


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_ring_formulas_equal_the_hops_played_out(processes):
    """Chunks that go round a ring, one hop at a time, all links at once."""
    hops, held = 0, np.ones((processes, processes), dtype=int)  # of how many processes p holds the sum of chunk c
    for phase in range(2):
        for hop in range(processes - 1):
            hops += 1
            before = held.copy()
            for process in range(processes):
                chunk = (process - hop + phase) % processes
                target = (process + 1) % processes
                held[target, chunk] = (
                    before[process, chunk] if phase else before[target, chunk] + before[process, chunk]
                )
    assert (held == processes).all()
    plan = Plan(processes=processes, bandwidth=2.0, **FREE)
    assert ring_all_reduce(processes * 3.0, plan) == pytest.approx(hops * 3.0 / 2.0)
    assert ring_all_gather(3.0, plan) == pytest.approx(hops / 2 * 3.0 / 2.0)


def test_one_process_talks_to_nobody_and_orders_as_measured():
    plan = Plan(pairs=20_000, processes=1, batch=64)
    found = simulate(plan)
    assert found["features, ms a step"] == found["gradients, ms a step"] == 0
    assert found["training, s an epoch"] == pytest.approx(20_000 // 64 * plan.step_seconds)
    walks, kmeans = 10 * plan.part_seconds * 2_000**2, kmeans_flop(20_000, 10, plan.dim) / (plan.gflops * 1e9)
    assert order_seconds(plan) == pytest.approx(walks + kmeans + 20_000 * plan.row_seconds)
    assert found["order, walks shared out, s"] == found["order, were one process to walk alone, s"]
    one_part = Plan(pairs=2_000, processes=1)
    assert order_seconds(one_part) == pytest.approx(one_part.part_seconds * 2_000**2 + 2_000 * plan.row_seconds)


def test_walks_alone_are_shared_and_no_more_than_there_are_parts():
    shared = Plan(pairs=20_000, processes=2, batch=64)
    alone = order_seconds(Plan(pairs=20_000, processes=1, batch=64)) - order_seconds(shared)
    assert alone == pytest.approx(10 * shared.part_seconds * 2_000**2 / 2)
    assert simulate(shared)["order, were one process to walk alone, s"] == pytest.approx(order_seconds(shared) + alone)
    few = Plan(pairs=4_000, processes=10, batch=10)
    assert order_seconds(few) == order_seconds(Plan(pairs=4_000, processes=2, batch=50))


def test_kmeans_counts_the_products_that_are_made(monkeypatch):
    made = []
    plain = partition.nearest_centres

    def counted(points, centres):
        made.append(2 * points.shape[0] * centres.shape[0] * points.shape[1])
        return plain(points, centres)

    monkeypatch.setattr(partition, "nearest_centres", counted)
    points = torch.nn.functional.normalize(torch.randn(4_000, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    partition.kmeans(points, 5, np.random.default_rng(0))
    assert sum(made) == kmeans_flop(4_000, 5, 8) == 2 * 8 * 5 * (ITERATIONS * 5 * SAMPLE_PER_CENTRE + 4_000)


def test_two_levels_of_kmeans_cost_less_than_one():
    clusters = MOST_CLUSTERS + 33  # 17 x 17
    rows = 2_000 * clusters
    flat = 2 * 256 * clusters * (ITERATIONS * SAMPLE_PER_CENTRE * clusters + rows)
    assert kmeans_flop(rows, clusters, 256) == pytest.approx(
        kmeans_flop(rows, 17, 256) + 17 * kmeans_flop(rows / 17, 17, 256)
    )
    assert kmeans_flop(rows, clusters, 256) < flat / 5


def test_parts_are_as_large_as_grouping_makes_them():
    plan = Plan(pairs=512 * 12, processes=4, batch=128, part_size=100)
    points = torch.nn.functional.normalize(
        torch.randn(plan.pairs, 8, generator=torch.Generator().manual_seed(0)), dim=1
    )
    parts = split_into_parts(points, plan.global_batch, plan.part_size, np.random.default_rng(0))
    assert plan.part_rows == 1_024
    assert max(map(len, parts)) <= 1.5 * plan.part_rows


def test_more_pairs_cost_more_and_more_processes_save_time():
    small, large = Plan(pairs=1_000_000), Plan(pairs=10_000_000)
    assert order_seconds(small) < order_seconds(large)
    for name, size in memory(small).items():
        assert size <= memory(large)[name]
    # The part's own size does not grow with the corpus: all else is linear in the rows.
    rest = {plan.pairs: memory(plan)["points of k-means, the main process"] for plan in (small, large)}
    assert rest[10_000_000] == pytest.approx(10 * rest[1_000_000])
    runs = [simulate(Plan(processes=count)) for count in (1, 2, 8, 64)]
    for name, falls in {
        "training, s an epoch": True,
        "features, ms a step": False,
        "gradients, ms a step": False,
    }.items():
        figures = [run[name] for run in runs]
        assert figures == sorted(figures, reverse=falls) and len(set(figures)) == 4
    for run in runs:
        assert run["order, walks shared out, s"] <= run["order, were one process to walk alone, s"]
    faster = simulate(Plan(bandwidth=1e11))
    assert faster["communication, % of a step"] < runs[-1]["communication, % of a step"]


def test_memory_of_a_known_plan():
    found = memory(Plan(pairs=2**20, dim=256, processes=16, processes_per_node=8, batch=64))
    assert found["features, float16, mapped, a node"] == pytest.approx(1.0)
    assert found["points of k-means, the main process"] == pytest.approx(0.5)
    assert found["one part, a process"] == pytest.approx((12 * 2_048**2 + 2 * 2_048 * 256 * 4) / 2**30)
    own = sum(found[name] for name in found if name.endswith("a process"))
    assert found["the main node in all"] == pytest.approx(1.0 + 0.5 + 8 * own)


def test_the_command_says_that_it_simulates_and_takes_every_constant(capsys):
    assert scale.main(["--processes", "16", "--pairs", "1000000"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("SIMULATION") and "| SIMULATION |" in text and "1,000,000 pairs, 16 processes" in text
    assert scale.main(["--json", "--bandwidth", "1e9"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["kind"] == "SIMULATION" and [run["plan"]["processes"] for run in content["runs"]] == [1, 8, 64]
    assert all(run["plan"]["bandwidth"] == 1e9 for run in content["runs"])
    with pytest.raises(SystemExit):
        scale.main(["--gflops", "0"])
    assert "gflops must be above 0" in capsys.readouterr().err
