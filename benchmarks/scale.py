"""SIMULATION of an epoch of 10 million pairs on 64 processes: `python -m benchmarks.scale [--json] [--pairs N] ...`.

Nothing is run: arithmetic on constants, each an argument with its source in `--help`. Communication by ring formulas;
grouping by what a part costs and takes here; the time of a training step is the reader's to fill in.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, field, fields, replace

from syncmask.training.partition import ITERATIONS, MOST_CLUSTERS, SAMPLE_PER_CENTRE

from .measure import number

# Bytes of each pair of rows of a part: two float32 similarities, two rules and two that are on their way to one.
PART_BYTES = 2 * 4 + 4
# Bytes of each row: numbers of items and texts, the order, and five permutations on the way to it, 8 each.
ROW_BYTES = 8 * 8
# Bytes of a feature: float16 as stored and as points of k-means, float32 as sent.
STORED, SENT = 2, 4
# Slices gathered a step (student's and teacher's image and text for the loss, the teacher's for the bank), and those of
# them that carry a gradient back, the sum of all processes' gradients of the global batch.
GATHERED, WITH_GRADIENT = 6, 2


def constant(default: float, source: str):
    """A field that is an argument too."""
    return field(default=default, metadata={"source": source})


@dataclass(frozen=True)
class Plan:
    """What is simulated: each constant with its source; times in seconds, sizes in bytes."""

    pairs: int = constant(10_000_000, "chosen")
    processes: int = constant(64, "chosen")
    processes_per_node: int = constant(8, "assumed")
    batch: int = constant(64, "chosen: rows of a process's slice")
    dim: int = constant(256, "the model's default projection")
    part_size: int = constant(2_000, "the default of grouping; parts hold two global batches at least")
    part_seconds: float = constant(1.23e-8, "measured: CPU s of a part / rows^2, every rule on (0.049 s for 2,000)")
    row_seconds: float = constant(2.4e-6, "measured: CPU s a row for what is not shared beside k-means: means, swaps")
    gflops: float = constant(85.0, "measured: float32 GEMM of one core, GFLOP/s; for k-means")
    parameters: int = constant(209_900_000, "counted: trained parameters of ViT-B/16 with BERT-base")
    gradient_bytes: int = constant(4, "DDP reduces float32 gradients")
    bandwidth: float = constant(12.5e9, "assumed: bytes/s of the slowest link of the ring (100 Gbit/s between nodes)")
    latency: float = constant(2e-5, "assumed: seconds a hop")
    step_seconds: float = constant(0.25, "assumed: forward and backward of a slice on one accelerator")

    @property
    def global_batch(self) -> int:
        """Rows of a step over all processes."""
        return self.batch * self.processes

    @property
    def part_rows(self) -> int:
        """Rows of a part, as in `split_into_parts`."""
        return min(self.pairs, max(self.part_size, 2 * self.global_batch))


def ring_all_gather(slice_bytes: float, plan: Plan) -> float:
    """Seconds until every process has every slice: P - 1 hops of one slice."""
    hops = plan.processes - 1
    return hops * (slice_bytes / plan.bandwidth + plan.latency)


def ring_all_reduce(size: float, plan: Plan) -> float:
    """Seconds until every process has the sum of `size` bytes: 2 (P - 1) hops of a P-th of them."""
    hops = 2 * (plan.processes - 1)
    return hops * (size / plan.processes / plan.bandwidth + plan.latency)


def step_communication(plan: Plan) -> tuple[float, float]:
    """Seconds a step for features and for gradients, none of it hidden behind computing."""
    slice_bytes = plan.batch * plan.dim * SENT
    features = GATHERED * ring_all_gather(slice_bytes, plan)
    features += WITH_GRADIENT * ring_all_reduce(plan.global_batch * plan.dim * SENT, plan)
    return features, ring_all_reduce(plan.parameters * plan.gradient_bytes, plan)


def kmeans_flop(rows: float, clusters: float, dim: int) -> float:
    """Floating-point operations of `training.partition.kmeans`, two levels where there are many clusters."""
    if clusters <= 1:
        return 0.0
    first = clusters if clusters <= MOST_CLUSTERS else round(clusters**0.5)
    sample = min(rows, SAMPLE_PER_CENTRE * first)
    below = kmeans_flop(rows / first, clusters / first, dim) if first < clusters else 0.0
    return 2 * dim * first * (ITERATIONS * sample + rows) + first * below


def order_seconds(plan: Plan) -> float:
    """Seconds for an epoch's order on one core of each process; the main one alone does all but the walks."""
    parts = plan.pairs / plan.part_rows
    walks = parts * plan.part_seconds * plan.part_rows**2 / min(plan.processes, parts)
    cut = kmeans_flop(plan.pairs, round(parts), plan.dim) / (plan.gflops * 1e9)
    return walks + cut + plan.pairs * plan.row_seconds


def memory(plan: Plan) -> dict[str, float]:
    """GiB: the mapped file of features (a node reads it once), and what processes hold while the epoch is ordered."""
    points, part = plan.pairs * plan.dim * STORED, PART_BYTES * plan.part_rows**2
    rows, feats = plan.pairs * ROW_BYTES, 2 * plan.part_rows * plan.dim * SENT
    mapped = 2 * plan.pairs * plan.dim * STORED
    found = {"features, float16, mapped, a node": mapped, "points of k-means, the main process": points}
    found |= {"one part, a process": part + feats, "row numbers, a process": rows}
    resident = points + min(plan.processes, plan.processes_per_node) * (part + feats + rows)
    return {name: size / 2**30 for name, size in (found | {"the main node in all": mapped + resident}).items()}


def simulate(plan: Plan) -> dict[str, float]:
    """Every figure of the table, named with its unit."""
    features, gradients = step_communication(plan)
    steps = plan.pairs // plan.global_batch
    training = steps * (plan.step_seconds + features + gradients)
    order = order_seconds(plan)
    without = order_seconds(replace(plan, processes=1, batch=plan.global_batch))
    return {
        "global batch, rows": plan.global_batch,
        "steps an epoch": steps,
        "rows of a part": plan.part_rows,
        "features, ms a step": 1e3 * features,
        "gradients, ms a step": 1e3 * gradients,
        "communication, % of a step": 100 * (features + gradients) / (plan.step_seconds + features + gradients),
        "training, s an epoch": training,
        "order, were one process to walk alone, s": without,
        "order, walks shared out, s": order,
        "order, % of the epoch": 100 * order / (order + training),
        **{f"memory: {name}, GiB": size for name, size in memory(plan).items()},
    }


def table(plans: list[Plan]) -> str:
    """The simulation of each plan, a column each, as Markdown."""
    found = [simulate(plan) for plan in plans]
    columns = [f"{plan.pairs:,} pairs, {plan.processes} process{'es' * (plan.processes > 1)}" for plan in plans]
    lines = [["SIMULATION", *columns], ["---"] * (len(plans) + 1)]
    lines += [[name, *(number(figures[name]) for figures in found)] for name in found[0]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def constants(plan: Plan) -> str:
    """Every constant with its source, as Markdown."""
    lines = [f"| {item.name} | {getattr(plan, item.name)} | {item.metadata['source']} |" for item in fields(plan)]
    return "\n".join(["| constant | value | source |", "| --- | --- | --- |", *lines])


def main(argv: list[str] | None = None) -> int:
    """Print the simulation for one process, one node and all processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    for item in fields(Plan):
        about = f"{item.metadata['source']}; %(default)s"
        parser.add_argument(f"--{item.name}", type=type(item.default), default=item.default, help=about)
    given = vars(parser.parse_args(argv))
    as_json = given.pop("json")
    if wrong := [name for name, value in given.items() if value <= 0]:
        parser.error(f"{', '.join(wrong)} must be above 0")
    counts = sorted({1, min(given["processes_per_node"], given["processes"]), given["processes"]})
    plans = [Plan(**given | {"processes": count}) for count in counts]
    if as_json:
        content = [{"plan": asdict(plan), "figures": simulate(plan)} for plan in plans]
        print(json.dumps({"kind": "SIMULATION", "runs": content}, indent=2))
    else:
        print("SIMULATION: computed from the constants below; nothing of this size was run.\n")
        print(f"{table(plans)}\n\n{constants(plans[-1])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
