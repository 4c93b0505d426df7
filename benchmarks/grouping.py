"""The order of an epoch of similar pairs: `python -m benchmarks.grouping [--quick] [--json]`.

One sub-queue of 1,920 pairs against the published walk in its plain form (CPU seconds, in turns), and a whole epoch of
260,480 pairs (FashionGen's size) with every rule on, and of more with `--rows`, against the time and the memory that
are the target.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import numpy as np
import torch
from scipy import sparse

from syncmask.training.grouping import greedy_walk, plan_epoch, same_item_or_text, similarities

from .measure import Row, Times, arguments, both_times, in_turns, peak_memory, print_rows, timed_row

DIM, SUB_QUEUE, BATCH, FASHIONGEN = 256, 1_920, 64, 260_480


def published_walk(image_feats: torch.Tensor, text_feats: torch.Tensor, start: int, temperature: float = 0.07) -> list:
    """GRIT-VLP's grouping of a sub-queue in its plain form: what ours is timed against.

    A product and a softmax for each direction; a row that was visited becomes zero in all rows and columns; the best of
    a row is looked up on the device, and its row number fetched from a table, one by one.

    Args:
        image_feats, text_feats: (M, D). start: the first row.

    Returns:
        The M rows in the order of the walk: to the nearest text of an image, to the nearest image of that text, ...
    """
    by_image = (image_feats @ text_feats.T / temperature).softmax(1).fill_diagonal_(0)
    by_text = (text_feats @ image_feats.T / temperature).softmax(1).fill_diagonal_(0)
    numbers, current = torch.arange(len(image_feats)), torch.tensor(start)
    order = [numbers[current].cpu()]
    for step in range(len(image_feats) - 1):
        nearest = (by_image, by_text)[step % 2][current].topk(1).indices[0]
        for matrix in (by_image, by_text):
            matrix[current, :] = 0
            matrix[:, current] = 0
        order.append(numbers[nearest].cpu())
        current = nearest
    return [int(row) for row in order]


def pairs(rows: int, items: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Features (M, 256) of images and texts of a mixture, photos of an item close together; and the item ids (M,)."""
    generator = torch.Generator().manual_seed(seed)
    item_ids = torch.arange(rows) % items
    families = torch.randn(max(1, items // 200), DIM, generator=generator)
    centres = families[torch.randint(len(families), (items,), generator=generator)]
    centres += 0.6 * torch.randn(items, DIM, generator=generator)
    feats = []
    for _ in range(2):
        found = torch.randn(rows, DIM, generator=generator).mul_(0.5)
        for part, ids in zip(found.split(20_000), item_ids.split(20_000)):
            part += centres[ids]
            part /= part.norm(dim=1, keepdim=True)
        feats.append(found)
    return *feats, item_ids.numpy()


def overlap_rows(texts: int, words: int = 8_000, length: int = 25, seed: int = 0) -> sparse.csr_matrix:
    """Unit rows (texts, words) of texts of some 25 words, common and rare as in language."""
    rng = np.random.default_rng(seed)
    columns = np.minimum(rng.zipf(1.3, texts * length) - 1, words - 1)
    weights = np.log1p(columns + 1.0).astype(np.float32)
    rows = sparse.csr_matrix((weights, (np.repeat(np.arange(texts), length), columns)), (texts, words))
    return sparse.diags(1 / np.sqrt(rows.multiply(rows).sum(1).A1)) @ rows


def walk_row(rounds: int) -> Row:
    """The walk of one sub-queue, similarities included; both give the same order where nothing is forbidden."""
    image_feats, text_feats, ids = pairs(SUB_QUEUE, SUB_QUEUE)
    own = same_item_or_text(ids, ids)
    start, memory = SUB_QUEUE // 2, torch.empty(2, SUB_QUEUE**2)  # as an epoch has it, for all of its parts

    def ours() -> np.ndarray:
        return greedy_walk(similarities(image_feats, text_feats, memory), own, own, BATCH, start).order

    def published() -> list[int]:
        return published_walk(image_feats, text_feats, start)

    if ours().tolist() != published():
        raise AssertionError("the two walks differ though no pair is forbidden; their times say nothing")
    times = in_turns(ours, published, rounds=rounds)
    return timed_row("grouping of 1,920 pairs, same order", *times, 5, 8)


def epoch_rows(rows: int, threads: int) -> list[Row]:
    """Seconds and memory of an epoch's order with every rule on, in a process of its own, against the target."""
    command = [sys.executable, "-m", "benchmarks.grouping", "--measure_epoch", str(rows), "--threads", str(threads)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, by_clock, gib, given = map(float, printed.split())
    name = f"order of an epoch of {rows:,} pairs"
    scale = rows / FASHIONGEN
    held = (
        f"peer = the floor; of the whole process, {given:.2f} GiB of it libraries, features and texts that it is given"
    )
    about = {"at_most": True, "times": both_times(Times([seconds], [by_clock])), "notes": "peer = the floor"}
    return [
        Row(f"{name}, time", "CPU s", seconds, scale * 12, 1.0, 0.5, **about),
        Row(f"{name}, memory", "GiB", gib, max(1.0, scale) * 2, 1.0, 0.8, at_most=True, notes=held),
    ]


def measure_epoch(rows: int) -> None:
    """Order once, 4.3 photos an item, rules 1 to 3, all grouped.

    Prints CPU seconds, seconds by the clock, peak GiB and GiB held before.
    """
    items = round(rows / 4.3)
    image_feats, text_feats, item_ids = pairs(rows, items)
    texts = overlap_rows(items)
    # What making the data took beside the data themselves must not be the peak.
    given, begun, by_clock = peak_memory() / 2**30, time.process_time(), time.perf_counter()
    plan_epoch(
        image_feats, text_feats, np.ones(rows, bool), item_ids, item_ids, texts,
        seed=0, epoch=1, batch_size=BATCH, tau=0.4, margin=0.0,
    )  # fmt: skip
    print(time.process_time() - begun, time.perf_counter() - by_clock, peak_memory() / 2**30, given)


def rows(quick: bool, threads: int = 1) -> list[Row]:
    """All rows of this benchmark."""
    return [walk_row(15 if quick else 45), *epoch_rows(FASHIONGEN, threads)]


def main(argv: list[str] | None = None) -> int:
    """Run and print; returns the exit code, 1 where a floor was missed."""
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, help="also an epoch of so many pairs, such as 1000000")
    parser.add_argument("--measure_epoch", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    if given.measure_epoch:
        measure_epoch(given.measure_epoch)
        return 0
    more = epoch_rows(given.rows, given.threads) if given.rows else []
    return print_rows(rows(given.quick, given.threads) + more, given.json)


if __name__ == "__main__":
    sys.exit(main())
