"""Random batches in which no two rows share an item or a text, and the repair that grouped batches use too.

An order is a permutation of rows: row ids, batch after batch, with the rows that fill no batch (the tail) last.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

Seed = int | Sequence[int]
# Partners looked at for one swap (at first, and where none of those fits), and rows for which none was found before
# the repair gives up: far more than an ordinary corpus needs, and linear in time where all rows are of one item.
CANDIDATES = 128, 8192
FAILURES = 1000


def random_batches(item_ids: np.ndarray, text_ids: np.ndarray, *, seed: Seed, batch_size: int) -> np.ndarray:
    """Shuffle rows so that no batch holds two rows of one item or of one text, wherever that is possible.

    A plain shuffle whose conflicts are swapped away; where swaps do not suffice (few batches, many photos of an
    item), rows are dealt out item by item instead, and the better of the two is taken.

    Args:
        item_ids: (rows,) integers.
        text_ids: (rows,) integers.
        seed: an integer or several; the same seed gives the same order.
        batch_size: rows of a global batch.

    Returns:
        (rows,) int64, a permutation. `batch_statistics` counts what could not be separated.

    Example:
        >>> order = random_batches(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]), seed=0, batch_size=2)
        >>> sorted((order[:2] // 2).tolist())
        [0, 1]
    """
    item_ids, text_ids = np.asarray(item_ids), np.asarray(text_ids)
    rng = np.random.default_rng(seed)
    order, conflicts = separate_rows(rng.permutation(len(item_ids)), item_ids, text_ids, batch_size, rng)
    if conflicts and len(order) >= batch_size:
        dealt = deal_rows(item_ids, text_ids, batch_size, rng)
        dealt, dealt_conflicts = separate_rows(dealt, item_ids, text_ids, batch_size, rng)
        order = dealt if dealt_conflicts < conflicts else order
    return order


def deal_rows(item_ids: np.ndarray, text_ids: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """Deal rows out to the batches like cards, rows of one item (or of items that share texts) one after another.

    An item with no more rows than there are batches then meets itself nowhere. Families with more rows than
    batches come last, so that the tail takes their surplus.
    """
    rows, batches = len(item_ids), len(item_ids) // batch_size
    families = connected_families(item_ids, text_ids)
    too_many = np.bincount(families)[families] > batches
    chance = rng.random(families.max() + 1)[families]
    ranked = np.lexsort((rng.random(rows), text_ids, item_ids, chance, too_many))
    dealt = ranked[: batches * batch_size].reshape(batch_size, batches).T
    dealt = rng.permuted(dealt, axis=1)[rng.permutation(batches)]
    return np.concatenate([dealt.ravel(), ranked[batches * batch_size :]])


def connected_families(item_ids: np.ndarray, text_ids: np.ndarray) -> np.ndarray:
    """Number the groups of rows that are joined by a common item or text, (rows,) from 0 on."""
    items = np.unique(item_ids, return_inverse=True)[1]
    texts = np.unique(text_ids, return_inverse=True)[1] + items.max() + 1
    size = int(texts.max()) + 1
    graph = sparse.coo_matrix((np.ones(len(items), dtype=np.int8), (items, texts)), shape=(size, size))
    return csgraph.connected_components(graph, directed=False)[1][items]


def separate_rows(
    order: np.ndarray, item_ids: np.ndarray, text_ids: np.ndarray, batch_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """Swap rows between batches until no batch holds two rows of one item or text.

    Args:
        order: (rows,) a permutation; it is not changed.
        item_ids: (rows,) integers by row, not by position.
        text_ids: (rows,) integers by row.
        batch_size: rows of a global batch.
        rng: decides which of the possible partners a row is swapped with.

    Returns:
        The new order, and how many rows still share an item or text with an earlier row of their batch.
    """
    order, items, texts = order.copy(), item_ids[order], text_ids[order]
    # A second round, since a swap may open the way for one that was impossible before.
    for _ in range(2):
        swap_conflicts(order, items, texts, batch_size, rng)
    return order, int(repeats(items, texts, batch_size).sum())


def swap_conflicts(
    order: np.ndarray, items: np.ndarray, texts: np.ndarray, batch_size: int, rng: np.random.Generator
) -> None:
    """Try one swap for each row in conflict, in place; all three arrays are by position."""
    failures = 0
    for position in np.flatnonzero(repeats(items, texts, batch_size)):
        if not is_conflict(position, items, texts, batch_size):
            continue
        partner = find_partner(position, items, texts, batch_size, rng)
        if partner >= 0:
            for array in (order, items, texts):
                array[[position, partner]] = array[[partner, position]]
        elif (failures := failures + 1) >= FAILURES:
            return


def rows_in_batches(rows: int, batch_size: int) -> int:
    """Return how many rows are trained on: whole batches only, but all rows where there are too few for one."""
    return rows // batch_size * batch_size or rows


def repeats(items: np.ndarray, texts: np.ndarray, batch_size: int) -> np.ndarray:
    """Mark the positions whose item or text occurs earlier in the same batch, (rows,) bool; never in the tail."""
    used = rows_in_batches(len(items), batch_size)
    marked = np.zeros(len(items), dtype=bool)
    batches = marked[:used].reshape(-1, min(batch_size, used) or 1)
    for ids in (items, texts):
        ids = ids[:used].reshape(batches.shape)
        # Equal ids side by side, the earliest first: all but that one repeat what is before them.
        by_id = ids.argsort(axis=1, kind="stable")
        ranked = np.take_along_axis(ids, by_id, axis=1)
        again = np.zeros(batches.shape, dtype=bool)
        np.put_along_axis(again, by_id[:, 1:], ranked[:, 1:] == ranked[:, :-1], axis=1)
        batches |= again
    return marked


def is_conflict(position: int, items: np.ndarray, texts: np.ndarray, batch_size: int) -> bool:
    """Tell whether another row of the position's batch has its item or text."""
    start = position // batch_size * batch_size
    batch = slice(start, start + batch_size)
    same = (items[batch] == items[position]) | (texts[batch] == texts[position])
    return int(same.sum()) > 1


def find_partner(position: int, items: np.ndarray, texts: np.ndarray, batch_size: int, rng: np.random.Generator) -> int:
    """Find a position whose row can change places with this one without a conflict in either batch, or -1."""
    rows, used = len(items), rows_in_batches(len(items), batch_size)
    batch = position // batch_size
    others = np.arange(batch * batch_size, min(used, (batch + 1) * batch_size))
    others = others[others != position]
    own_items, own_texts = np.unique(items[others]), np.unique(texts[others])
    for count in CANDIDATES:
        candidates = rng.permutation(rows) if rows <= count else rng.integers(0, rows, count)
        candidates = candidates[candidates // batch_size != batch]
        known = (items[candidates][:, None] == own_items).any(axis=1)
        known |= (texts[candidates][:, None] == own_texts).any(axis=1)
        candidates = candidates[~known]
        # A few at a time: whole batches are looked at, and the first that fits will do.
        for some in np.split(candidates, range(CANDIDATES[0], len(candidates), CANDIDATES[0])):
            company = some[:, None] // batch_size * batch_size + np.arange(batch_size)
            # A candidate leaves its own batch, so it may be the one row there that this one must not meet; what lies
            # in the tail meets nobody.
            met = (company < used) & (company != some[:, None])
            company = company.clip(max=rows - 1)
            met &= (items[company] == items[position]) | (texts[company] == texts[position])
            fits = ~met.any(axis=1)
            if fits.any():
                return int(some[fits.argmax()])
    return -1


def batch_statistics(order: np.ndarray, item_ids: np.ndarray, text_ids: np.ndarray, batch_size: int) -> dict[str, int]:
    """Count what batches hold that they should not.

    Returns:
        batches, pairs (of rows within batches), same_item_pairs, same_text_pairs (of different items too).

    Example:
        >>> ids = np.array([0, 0, 1, 2])
        >>> batch_statistics(np.arange(4), ids, ids, 2)["same_item_pairs"]
        1
    """
    used = rows_in_batches(len(order), batch_size)
    batch = np.arange(used) // batch_size
    counts = {"batches": int(batch[-1]) + 1 if used else 0}
    for name, ids in {
        "pairs": np.zeros_like(item_ids),
        "same_item_pairs": item_ids,
        "same_text_pairs": text_ids,
    }.items():
        ranks = np.unique(ids, return_inverse=True)[1][order[:used]]
        size = np.unique(batch * (len(ids) + 1) + ranks, return_counts=True)[1]
        counts[name] = int((size * (size - 1) // 2).sum())
    return counts
