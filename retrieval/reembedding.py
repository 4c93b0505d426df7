"""A catalogue's vectors by another model: written beside the old ones, resumed after a kill, switched to at the end."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator

import pyarrow as pa
from lancedb.expr import col

from .encoder import Encoder
from .rows import OWN, Record, Unreadable, photo_of_file
from .snapshot import MANY, Snapshot
from .store import Outdated, State, Store, retrying, table_name
from .writing import CHUNK, Report, Writer

Done = Callable[[list[str]], None]


def prepare(
    store: Store, encoder: Encoder, batch_size: int, on_commit: Done, share: tuple[int, int] = (0, 1)
) -> Report:
    """See `Catalogue.prepare`."""
    old = store.state()
    if old.revision == encoder.revision:
        return Report(unchanged=store.table(old.table).count_rows())
    new = table_name(encoder.revision)
    if old.previous == new:  # what is left from before the last switch is of use again, so nobody may clear it away
        store.set_state({"previous": ""}, only_if=("previous", new))
    store.create_table(new, _schema_for(store.table(old.table).schema, encoder.dim))
    return _copy(store, old, new, encoder, batch_size, on_commit, share)


def reembed(store: Store, encoder: Encoder, batch_size: int, on_commit: Done, drop_unreadable: bool = False) -> Report:
    """See `Catalogue.reembed`."""
    old, new = store.state(), table_name(encoder.revision)
    report = prepare(store, encoder, batch_size, on_commit)
    if old.revision == encoder.revision:
        return report
    if report.skipped and not drop_unreadable:
        name, reason = report.skipped[0]
        raise ValueError(
            f"{len(report.skipped)} photos cannot be read, such as {name!r} ({reason}). Nothing was switched. Mend or "
            "delete them and call again (what is embedded stays), or drop them (drop_unreadable=True, --prune)."
        )
    while store.state().table == old.table:
        # See `Store.confirm`: this holds unless a writer takes the token away, whose rows the next round finds.
        token = uuid.uuid4().hex
        store.set_state({"switching": token}, only_if=("table", old.table))
        late = _copy(store, old, new, encoder, batch_size, on_commit)
        report.added, report.updated = report.added + late.added, report.updated + late.updated
        switched = {"table": new, "revision": encoder.revision, "model": encoder.name, "dim": encoder.dim}
        store.set_state(switched | {"switching": "", "previous": old.table}, only_if=("switching", token))
    if store.state().table != new:
        raise Outdated(f"{store.place} was re-embedded by {store.state().model} in the meantime; that one counts.")
    return report


def _schema_for(schema: pa.Schema, dim: int) -> pa.Schema:
    place = schema.get_field_index("vector")
    return schema.set(place, pa.field("vector", pa.list_(pa.float32(), dim))).remove_metadata()


def _copy(
    store: Store,
    old: State,
    new: str,
    encoder: Encoder,
    batch_size: int,
    on_commit: Done,
    share: tuple[int, int] = (0, 1),
) -> Report:
    """Bring the new table to what the old one holds now: its share of changed and missing rows, and all deletions."""
    source = Snapshot(store.table(old.table), old, 0)
    wanted, there = _hashes(source.table), _hashes(store.table(new))
    gone = [name for name in there if name not in wanted]
    for start in range(0, len(gone), MANY):
        part = gone[start : start + MANY]
        retrying(lambda part=part: store.table(new).delete(col("photo_id").isin(part)))
    writer = Writer(store, new, encoder, batch_size=batch_size, on_commit=on_commit, confirm=False)
    mine = list(wanted)[share[0] :: share[1]]
    missing = [name for name in mine if there.get(name) != wanted[name]]
    for record in _records(source, missing, writer):
        writer.put(record)
    return writer.close()


def _hashes(table) -> dict[str, str]:
    rows = table.search().select(["photo_id", "row_sha256"]).to_arrow()
    return dict(zip(rows["photo_id"].to_pylist(), rows["row_sha256"].to_pylist()))


def _records(source: Snapshot, photo_ids: list[str], writer: Writer) -> Iterator[Record]:
    names = [name for name in source.schema.names if name not in ("photo_id", "vector")]
    for start in range(0, len(photo_ids), CHUNK):
        for row in source.known(photo_ids[start : start + CHUNK], names).values():
            try:
                yield stored_record(row)
            except Unreadable as error:
                writer.skip(error.photo_id, error.reason)


def stored_record(row: dict) -> Record:
    """A stored row as a record, its photo read anew.

    Its hash stays the stored one, which says that the row was taken over; the photo's own is that of the bytes now.

    Raises:
        Unreadable: the photo's file is gone.
    """
    photo = row["photo_bytes"] or photo_of_file(row["photo_path"], row["photo_id"])
    record = Record.of_stored(row, {name: value for name, value in row.items() if name not in OWN}, photo)
    record.taken_over = row["row_sha256"]
    return record
