"""One version of a catalogue as a reader sees it: the nearest photos, the photos of some items, a photo's file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
from lancedb.expr import Expr, col

from .rows import HIDDEN, OWN
from .store import State
from .vectors import ExactScan

# Partitions of the ANN index that are looked into for a query (our choice, measured by benchmarks/retrieval.py).
PROBES = 96
# Values in one condition "is one of".
MANY = 1000


class Snapshot:
    """A table pinned at its version; writes after it do not show.

    Up to `exact_up_to` rows all vectors are scanned in memory, where the first search loads them; above, LanceDB's own
    index is asked (or, while there is none, its slow scan of the files).

    Args:
        table: LanceDB's handle; it stays at the version that it was opened at.
        state: what `about` says of it.
        exact_up_to: rows.
    """

    def __init__(self, table, state: State, exact_up_to: int):
        self.state, self.version, self.rows = state, table.version, table.count_rows()
        self.table = table
        self.exact = self.rows <= exact_up_to
        self._scan: ExactScan | None = None
        self._row_ids, self._items = np.empty(0, np.uint64), pa.array([], pa.string())

    @cached_property
    def schema(self) -> pa.Schema:
        """Of the table, our own columns included."""
        return self.table.schema

    @property
    def columns(self) -> list[str]:
        """Names of the columns that were given with the photos."""
        return [name for name in self.schema.names if name not in OWN and name != "vector"]

    @property
    def indexed(self) -> bool:
        """Whether there is an ANN index."""
        return any("vector" in index.columns for index in self.table.list_indices())

    @property
    def scan(self) -> ExactScan:
        """All vectors, in memory from the first use on."""
        if self._scan is None:
            self._load()
        return self._scan

    def nearest(self, query: np.ndarray, k: int, where: Expr | None) -> list[str]:
        """Item ids of the k photos nearest to a query (P,), best first; an item stands there once a photo."""
        if not self.rows:
            return []
        return self._exact(query, k, where) if self.exact else self._approximate(query, k, where)

    def photos_of(self, items: Sequence[str], where: Expr | None) -> pa.Table:
        """All photos of some items that meet the condition, with every column but the photos' bytes."""
        names = [name for name in self.schema.names if name != "photo_bytes"]
        return _where_in(self.table, "item_id", items, names, where)

    def known(self, photo_ids: Sequence[str], columns: Sequence[str]) -> dict[str, dict]:
        """See `known`."""
        return known(self.table, photo_ids, columns)

    def sources(self, photo_ids: Sequence[str]) -> dict[str, str | bytes]:
        """Where each photo is: its bytes if the catalogue holds them, else its path."""
        rows = self.known(photo_ids, ["photo_path", "photo_bytes"])
        return {name: row["photo_bytes"] or row["photo_path"] for name, row in rows.items()}

    # --------------------------------------------------------------------------------------------------- search
    def _exact(self, query: np.ndarray, k: int, where: Expr | None) -> list[str]:
        scan, allowed = self.scan, None
        if where is not None:
            rows = self.table.search().where(where).select(["item_id"]).with_row_id(True).to_arrow()
            allowed = torch.from_numpy(np.isin(self._row_ids, rows["_rowid"].to_numpy()))
        _, found = scan.search(torch.from_numpy(query)[None], k, allowed)
        return self._items.take(pa.array(found[0].numpy())).to_pylist()

    def _approximate(self, query: np.ndarray, k: int, where: Expr | None) -> list[str]:
        asked = self.table.search(query, vector_column_name="vector").distance_type("cosine").nprobes(PROBES).limit(k)
        asked = asked if where is None else asked.where(where, prefilter=True)
        return asked.select(["item_id", "_distance"]).to_arrow()["item_id"].to_pylist()

    def _load(self) -> None:
        vectors = torch.empty(self.rows, self.state.dim)
        self._row_ids = np.empty(self.rows, np.uint64)
        items, start = [], 0
        columns = self.table.search().select(["item_id", "vector"]).with_row_id(True)
        for batch in columns.to_batches(batch_size=65_536):
            part = slice(start, start + len(batch))
            flat = batch["vector"].flatten().to_numpy(zero_copy_only=False)
            vectors.numpy()[part] = flat.reshape(-1, self.state.dim)
            self._row_ids[part] = batch["_rowid"].to_numpy()
            items.append(batch["item_id"])
            start += len(batch)
        self._items = pa.concat_arrays(items) if items else self._items
        self._scan = ExactScan(vectors)


def known(table, photo_ids: Sequence[str], columns: Sequence[str]) -> dict[str, dict]:
    """Some columns of some photos of a table, by photo id; those that are not there are left out."""
    found = _where_in(table, "photo_id", photo_ids, ["photo_id", *columns])
    return {row["photo_id"]: row for row in found.to_pylist()}


def _where_in(table, column: str, values: Sequence[str], names: Sequence[str], where: Expr | None = None) -> pa.Table:
    parts = []
    for start in range(0, len(values), MANY):
        condition = col(column).isin(list(values[start : start + MANY]))
        condition = condition if where is None else condition & where
        parts.append(table.search().where(condition).select(list(names)).to_arrow())
    return pa.concat_tables(parts) if parts else table.schema.empty_table().select(list(names))


def shown(row: dict) -> dict:
    """A stored row's further columns: what the caller gave beside photo, text and ids, empty values left out."""
    return {name: value for name, value in row.items() if name not in (*OWN, *HIDDEN) and value is not None}
