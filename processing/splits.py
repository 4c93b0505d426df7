"""Train, validation and test: a source's own splits, or by a seeded hash of the item, so that none straddles two."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence

import datasets
import numpy as np

from .readers_folder import SPLITS, canonical_split
from .variants import FAMILY

logger = logging.getLogger(__name__)


def item_fraction(item_id: str, seed: int) -> float:
    """Where a seeded hash puts an item between 0 and 1; of the id alone, so other items change nothing.

    Example:
        >>> item_fraction("MH01-gray", 0) == item_fraction("MH01-gray", 0)
        True
    """
    digest = hashlib.sha256(f"{seed}:{item_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def place_items(items: Sequence[str], seed: int, shares: Mapping[str, float]) -> np.ndarray:
    """(rows,) int64: which of the shares each row's item falls to by its hash.

    Raises:
        ValueError: shares that do not sum to 1.

    Example:
        >>> place_items(["a", "a"], 0, {"train": 1.0, "test": 0.0}).tolist()
        [0, 0]
    """
    fraction_of = {item: item_fraction(item, seed) for item in set(items)}
    bounds = np.cumsum(list(shares.values()))
    if not np.isclose(bounds[-1], 1) or min(shares.values()) < 0:
        raise ValueError(f"shares are {tuple(shares.values())}; wanted numbers >= 0 that sum to 1.")
    return np.searchsorted(bounds[:-1], [fraction_of[item] for item in items], side="right")


def split_by_item(rows: datasets.Dataset, seed: int, shares: Mapping[str, float]) -> dict[str, datasets.Dataset]:
    """Rows dealt out by the hashes of their families or items, in the order and the shares given."""
    place = place_items(rows[FAMILY if FAMILY in rows.column_names else "item_id"][:], seed, shares)
    return {name: rows.select(np.flatnonzero(place == number)) for number, name in enumerate(shares)}


def with_splits(tables: dict[str, datasets.Dataset], seed: int, shares: Sequence[float]) -> datasets.DatasetDict:
    """Train, validation and test of a source's own splits, or of its one table.

    Raises:
        ValueError: splits of other names.
    """
    if len(tables) == 1:
        (rows,) = tables.values()
        return datasets.DatasetDict(split_by_item(rows, seed, dict(zip(SPLITS, shares, strict=True))))
    known = {canonical_split(name): rows for name, rows in tables.items()}
    if "train" not in known or not set(known) <= set(SPLITS) or len(known) < len(tables):
        raise ValueError(
            f"the source's splits are {', '.join(map(repr, tables))}; wanted train, validation, test. "
            "Read one of them by `split`; it is then split by item."
        )
    if "validation" not in known:
        cut = {"train": 1 - shares[1], "validation": shares[1]}
        known |= split_by_item(known["train"], seed, cut)
    return datasets.DatasetDict({name: known[name] for name in SPLITS if name in known})


def warn_of_splits(corpus: datasets.DatasetDict) -> None:
    """Say which splits are empty, and which share items with train."""
    items = {name: set(rows["item_id"][:]) for name, rows in corpus.items()}
    for name, ids in items.items():
        if not ids:
            logger.warning("split %s is empty: the corpus has few items; pass other `shares` or more items", name)
    for name in set(items) - {"train"}:
        if shared := items["train"] & items[name]:
            logger.warning("%d items are in train and in %s too: scores there are too good", len(shared), name)
