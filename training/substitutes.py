"""A photo that can no longer be read is replaced by another row, the same one on any number of processes and workers.

The sampler's keys carry the global batch they belong to; a worker that cannot read a row's photo tries the other
photos of its item, then the rows that this epoch drops, in an order that follows from (seed, epoch, row).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

from syncmask.processing.collator import Collator, PhotoDataset, UnreadablePhoto, read_photo
from syncmask.processing.corpus import CorpusIndex

from .sampler import GroupedBatchSampler

logger = logging.getLogger(__name__)


class GlobalBatch(NamedTuple):
    """The rows that are trained on together, all processes' (B,), and the rows that the epoch drops."""

    rows: np.ndarray
    tail: np.ndarray


class BatchesInContext:
    """The sampler's batches with keys (epoch, row, GlobalBatch) instead of (epoch, row)."""

    def __init__(self, sampler: GroupedBatchSampler):
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[tuple[int, int, GlobalBatch]]]:
        sampler = self.sampler
        order, size, first = sampler.order, sampler.batch_size, sampler.consumed
        tail = order[sampler.batches * size :]
        for number, keys in enumerate(sampler, start=first):
            context = GlobalBatch(order[number * size : (number + 1) * size], tail)
            yield [(epoch, row, context) for epoch, row in keys]


def candidates(row: int, batch: GlobalBatch, index: CorpusIndex, seed: int, epoch: int) -> np.ndarray:
    """List the rows that may stand in for one row of a batch, best first.

    Other photos of its item, then rows of the dropped tail; each satisfies rule 1 against every other row of the
    batch: never the same item, never the same text. Two rows of one batch that both need the tail choose apart from
    one another, so theirs may share an item; the losses then treat them as the same item.

    Args:
        row: whose photo cannot be read. batch: what it belongs to. index: item and text ids of all rows.
        seed, epoch: with the row, what the order follows from.
    """
    items, texts = index.item_ids, index.text_ids
    others = batch.rows[batch.rows != row]
    views = np.flatnonzero(items == items[row])
    views = views[~np.isin(views, batch.rows)]
    rng = np.random.default_rng(np.random.SeedSequence([seed, epoch, row, 1]))
    found = np.concatenate([rng.permutation(views), rng.permutation(batch.tail[items[batch.tail] != items[row]])])
    clash = np.isin(items[found], items[others]) | np.isin(texts[found], texts[others])
    return found[~clash]


class SubstitutingPhotos(Dataset):
    """Records by (epoch, row, GlobalBatch); one that cannot be read is another row's, marked with what was asked for.

    A record then has `asked`, the row that it stands in for, and `reason`, why that could not be read.

    Raises:
        UnreadablePhoto: where no row that may stand in can be read either.
    """

    def __init__(self, photos: PhotoDataset, index: CorpusIndex, seed: int):
        self.photos, self.index, self.seed = photos, index, seed

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, key: tuple[int, int, GlobalBatch]) -> dict:
        return self._readable(*key)

    def __getitems__(self, keys: Sequence[tuple[int, int, GlobalBatch]]) -> list[dict]:
        """Many records with one look into the table, where all can be read."""
        try:
            return self.photos.__getitems__([(epoch, row) for epoch, row, _ in keys])
        except UnreadablePhoto:
            return [self._readable(*key) for key in keys]

    def _readable(self, epoch: int, row: int, batch: GlobalBatch) -> dict:
        try:
            return self.photos[(epoch, row)]
        except UnreadablePhoto as problem:
            reason = problem.reason
        for other in candidates(row, batch, self.index, self.seed, epoch):
            try:
                return self.photos[(epoch, int(other))] | {"asked": row, "reason": reason}
            except UnreadablePhoto:
                continue
        raise UnreadablePhoto(
            row,
            f"{reason}; and no photo that may stand in for it can be read either. Is the photos' disk still there?",
        )


class SubstitutingCollator:
    """Batches of `Collator` with `asked_ids` (B,), the rows that were wanted, and `reasons` {row: why not}."""

    def __init__(self, collator: Collator):
        self.collator = collator

    def __call__(self, records: list[dict]) -> dict[str, torch.Tensor | dict[int, str]]:
        """See the class."""
        asked = [record.get("asked", record["row_id"]) for record in records]
        reasons = {record["asked"]: record["reason"] for record in records if "asked" in record}
        return self.collator(records) | {"asked_ids": torch.tensor(asked), "reasons": reasons}


def readable(dataset: datasets.Dataset) -> datasets.Dataset:
    """Leave out the rows whose photos cannot be read, with a warning that names them; reads every photo."""
    return dataset.select(readable_rows(dataset))


def readable_rows(dataset: datasets.Dataset) -> list[int]:
    """List the rows whose photos can be read; of triplets, the reference photos (`candidate`) are read too."""
    columns = [name for name in ("image", "candidate") if name in dataset.column_names]
    cells = dataset.select_columns(columns).with_format(None)
    for name in columns:
        cells = cells.cast_column(name, datasets.Image(decode=False))
    kept = []
    for row, record in enumerate(cells):
        try:
            for name in columns:
                read_photo(record[name], row)
            kept.append(row)
        except UnreadablePhoto as problem:
            logger.warning("left out: %s", problem)
    return kept
