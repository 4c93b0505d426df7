"""Rows into a table of photos: what is there already costs no forward pass, what cannot be read is listed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from syncmask.processing.processing_syncmask import open_image, to_rgb

from .encoder import Encoder
from .rows import Record, new_fields, to_table
from .snapshot import known
from .store import Store

# Rows that are looked up and encoded together, and rows of one commit, at most; the second also ends at this size.
CHUNK, COMMIT_ROWS, COMMIT_BYTES = 64, 1024, 64 * 2**20


@dataclass
class Report:
    """What became of the rows that were given.

    Attributes:
        added, updated, unchanged: numbers of rows.
        encoded: photos that went through the model.
        skipped: (photo id, reason) of each row that was left out: unreadable photos, ids that were given twice.
    """

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    encoded: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __add__(self, other: Report) -> Report:
        return Report(*(getattr(self, name) + getattr(other, name) for name in vars(self)))

    def __str__(self) -> str:
        line = f"{self.added:,} added, {self.updated:,} updated, {self.unchanged:,} unchanged"
        return f"{line}, {len(self.skipped):,} skipped; {self.encoded:,} photos encoded"


class Writer:
    """Collects records, encodes those that need it, and commits them in batches.

    Args:
        store: of the catalogue.
        table: name of the table that is written to.
        encoder: of that table's revision.
        batch_size: photos a pass.
        on_commit: called after each commit with the ids that are now safe; unchanged ones are among them.
        confirm: whether the table must be the one that counts (see `Store.confirm`).
    """

    def __init__(
        self,
        store: Store,
        table: str,
        encoder: Encoder,
        *,
        batch_size: int = 32,
        on_commit: Callable[[list[str]], None] = lambda ids: None,
        confirm: bool = True,
    ):
        self.store, self.table, self.encoder = store, table, encoder
        self.batch_size, self.on_commit, self.confirm = batch_size, on_commit, confirm
        self.report = Report()
        self.seen: set[str] = set()
        self._chunk: list[Record] = []
        self._pending: list[Record] = []
        self._new = self._bytes = 0

    def skip(self, photo_id: str, reason: str) -> None:
        """Leave a row out and say so in the report; its id counts as seen."""
        self.seen.add(photo_id)
        self.report.skipped.append((photo_id, reason))

    def put(self, record: Record) -> None:
        """Take a record; it is safe once `on_commit` names it, or after `close`."""
        if record.photo_id in self.seen:
            self.report.skipped.append((record.photo_id, "a photo with this id was given before; give each a photo_id"))
            return
        self.seen.add(record.photo_id)
        self._chunk.append(record)
        if len(self._chunk) == CHUNK:
            self._encode_chunk()

    def close(self) -> Report:
        """Encode and commit what is left."""
        self._encode_chunk()
        self._commit()
        return self.report

    # ---------------------------------------------------------------------------------------------------- chunks
    def _encode_chunk(self) -> None:
        chunk, self._chunk = self._chunk, []
        if not chunk:
            return
        ids = [record.photo_id for record in chunk]
        stored = known(self.store.table(self.table), ids, ["photo_sha256", "row_sha256", "vector"])
        changed, unchanged = [], []
        for record in chunk:
            old = stored.get(record.photo_id)
            if old:
                same_photo = old["photo_sha256"] == record.photo_sha256
                if same_photo and old["row_sha256"] == record.row_sha256:
                    unchanged.append(record.photo_id)
                    continue
                if same_photo:
                    record.vector = np.asarray(old["vector"], dtype=np.float32)
            changed.append(record)
        self.report.unchanged += len(unchanged)
        if unchanged:
            self.on_commit(unchanged)
        self._queue(self._encoded(changed), stored)

    def _encoded(self, records: list[Record]) -> list[Record]:
        """Records with their vectors; photos that cannot be decoded are skipped."""
        photos, kept = [], []
        for record in records:
            if record.vector is None:
                try:
                    photos.append(to_rgb(open_image(record.photo)))
                except (ValueError, OSError) as error:
                    self.skip(record.photo_id, f"{record.path or 'photo'}: {error}")
                    continue
            kept.append(record)
        fresh = [record for record in kept if record.vector is None]
        if fresh:
            vectors = self.encoder.encode_image(photos, self.batch_size, as_numpy=True)
            for record, vector in zip(fresh, vectors, strict=True):
                record.vector = vector
        self.report.encoded += len(fresh)
        return kept

    def _queue(self, records: list[Record], stored: dict) -> None:
        for record in records:
            if not record.stored:
                record.photo = None
            self._bytes += len(record.photo or b"")
            self._new += record.photo_id not in stored
        self._pending += records
        if len(self._pending) >= COMMIT_ROWS or self._bytes >= COMMIT_BYTES:
            self._commit()

    def _commit(self) -> None:
        records = self._pending
        if not records:
            return
        self.store.merge(self.table, lambda table: to_table(records, widened(table, records), self.encoder.revision))
        if self.confirm:
            self.store.confirm(self.table)
        self.report.added += self._new
        self.report.updated += len(records) - self._new
        self._pending, self._new, self._bytes = [], 0, 0
        self.on_commit([record.photo_id for record in records])


def widened(table, records: Sequence[Record]) -> pa.Schema:
    """The table's schema, after columns that only the records have were added to it."""
    fields = new_fields(records, table.schema)
    if fields:
        try:
            table.add_columns(fields)
        except (ValueError, RuntimeError):
            table.checkout_latest()
            if not all(field.name in table.schema.names for field in fields):
                raise  # else another writer was quicker
    return table.schema
