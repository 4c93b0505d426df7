"""The order of an epoch for data that is read best in stretches: blocks of rows, batches made inside each.

A shard on a slow disk or behind a network is read well once and badly in 10,000 places. The rows are cut into blocks of
consecutive rows, the blocks are shuffled, and batches are made of one block's rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

OrderRows = Callable[[np.ndarray, int], np.ndarray]


def cut_blocks(rows: int, buffer: int, shards: np.ndarray | None = None) -> list[np.ndarray]:
    """Cut rows into blocks of at most `buffer` consecutive ones, and of whole shards where they fit.

    Args:
        rows: how many there are.
        buffer: rows of a block, at most.
        shards: (rows,) integers, which file each row is in; None where rows are in no shards. A shard of more rows
            than `buffer` is cut.

    Returns:
        Blocks of row numbers; together 0, 1, 2, ...

    Example:
        >>> [block.tolist() for block in cut_blocks(6, 4, np.array([0, 0, 0, 1, 1, 2]))]
        [[0, 1, 2], [3, 4, 5]]
    """
    ends = np.array([0, rows]) if shards is None else np.array([0, *np.flatnonzero(np.diff(shards)) + 1, rows])
    cuts = [0]
    while cuts[-1] < rows:
        full = min(cuts[-1] + buffer, rows)
        whole = int(ends[np.searchsorted(ends, full, side="right") - 1])
        cuts.append(whole if whole > cuts[-1] else full)
    return [np.arange(start, stop) for start, stop in zip(cuts, cuts[1:])]


def block_order(
    blocks: Sequence[np.ndarray], order_rows: OrderRows, *, seed: int, epoch: int, batch_size: int
) -> np.ndarray:
    """Order the rows of an epoch block by block.

    Blocks come in an order that follows from (seed, epoch). What is left of a block once its batches are full, less
    than a batch, is ordered together with the next block's rows; what the last block leaves is the tail that no batch
    is made of. So the batches of a block read its rows and less than a batch of earlier ones.

    Args:
        blocks: row numbers, from `cut_blocks`; together a permutation.
        order_rows: (rows, seed) -> a permutation of 0, 1, ..., len(rows) - 1: batch after batch, its tail last, as
            `random_batches` and `plan_epoch` give it. The first block's seed is `seed` itself, so that one block
            gives the order that `order_rows` gives for all rows.
        seed: of the run.
        epoch: the epoch that the order is for.
        batch_size: rows of a global batch.

    Returns:
        (rows,) int64, a permutation; the same on any number of processes.

    Raises:
        ValueError: no blocks.

    Example:
        >>> block_order(cut_blocks(6, 4), lambda rows, seed: np.arange(len(rows)), seed=0, epoch=0, batch_size=2)
        array([4, 5, 0, 1, 2, 3])
    """
    if not blocks:
        raise ValueError("got no blocks; wanted at least one, of the rows that are trained on.")
    seeds = [seed, *map(int, np.random.SeedSequence(seed).generate_state(len(blocks) - 1))]
    order, left = [], np.zeros(0, dtype=np.int64)
    turns = np.random.default_rng((seed, epoch, 3)).permutation(len(blocks))
    for turn, number in enumerate(turns, start=1):
        rows = np.concatenate([left, blocks[number]])
        if len(rows) >= batch_size or turn == len(blocks):
            rows = rows[order_rows(rows, seeds[number])]
        full = len(rows) // batch_size * batch_size
        order.append(rows[:full])
        left = rows[full:]
    return np.concatenate([*order, left])
