"""A shop's catalogue: photos as vectors in an embedded LanceDB table, items as what is found.

`Catalogue.open` is all that most users need. Rows are photos, items are ranked: an item's best photo counts.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow.compute as pc
from lancedb.expr import col
from lancedb.index import BTree, IvfFlat

from .encoder import Encoder, Photo
from .filters import Filter, filterable
from .reembedding import prepare, reembed
from .rows import GIVEN, HIDDEN, Record, Unreadable, read_row, schema_of
from .search import Ranking, search
from .snapshot import MANY, PROBES, Snapshot
from .store import NoCatalogue, Outdated, State, Store, retrying
from .vectors import scan_dtype
from .writing import CHUNK, Report, Writer

# Our choice, measured by benchmarks/retrieval.py: there, the scan takes 65 ms of one core a query, and 1.5 GB.
EXACT_UP_TO = 1_000_000
# Rows from which an index of ids is worth its upkeep.
INDEXED_FROM = 10_000


class Catalogue:
    """Photos with their vectors and columns at one place; made by `Catalogue.open`.

    Every call sees the newest version; a search sees one version throughout, whatever is written meanwhile. Any number
    of processes may read and write at once.

    Example:
        >>> encoder = Encoder.from_pretrained("runs/quickstart")  # doctest: +SKIP
        >>> catalogue = Catalogue.open("shop", encoder, create=True)  # doctest: +SKIP
        >>> catalogue.add([{"image": "red.jpg", "item_id": "7", "category": "Tops"}])  # doctest: +SKIP
        >>> catalogue.search(text="red top", filter={"category": "Tops"})[0].item_id  # doctest: +SKIP
        '7'
    """

    def __init__(self, store: Store, encoder: Encoder | None = None, exact_up_to: int = EXACT_UP_TO):
        self._store, self._encoder, self.exact_up_to = store, encoder, exact_up_to
        self._snapshot: Snapshot | None = None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        encoder: Encoder | None = None,
        *,
        create: bool = False,
        exact_up_to: int = EXACT_UP_TO,
    ) -> Catalogue:
        """Open a catalogue, or make an empty one.

        Args:
            path: a folder, or an object store's address as LanceDB takes it ("s3://bucket/shop").
            encoder: None = the model that the catalogue names is loaded when it is needed.
            create: make one where there is none; it needs an encoder.
            exact_up_to: up to this many photos, all are scanned in memory; above, LanceDB's index is asked.

        Raises:
            FileNotFoundError: no catalogue there (`NoCatalogue`), and none is to be made.
            ValueError: a folder with other files in it; `create` without an encoder; a newer format.
        """
        place = str(path) if "://" in str(path) else str(Path(path).expanduser().absolute())
        try:
            return cls(Store.open(place), encoder, exact_up_to)
        except NoCatalogue:
            if not create:
                raise
        if encoder is None:
            raise ValueError(f"{path} is to be made; give the encoder whose vectors it will hold.")
        store = Store.create(place, schema_of(encoder.dim), encoder.revision, encoder.name, encoder.dim)
        return cls(store, encoder, exact_up_to)

    @property
    def encoder(self) -> Encoder:
        """The model of this catalogue, checked to be of the revision that its vectors are of.

        Raises:
            Outdated: it is of another one; the message says how to re-embed.
        """
        return self._encoder_of(self._store.state())

    # -------------------------------------------------------------------------------------------------- writing
    def add(
        self,
        rows: Iterable[Mapping[str, object]],
        *,
        batch_size: int = 32,
        store_photos: bool = False,
        on_commit: Callable[[list[str]], None] = lambda ids: None,
    ) -> Report:
        """Add photos, or bring those that are there to what is given now.

        A row that is there unchanged costs no forward pass and no write; one whose photo is unchanged costs no forward
        pass. Rows are committed about a thousand at a time, so that a long job goes on where it was killed.

        Args:
            rows: mappings with `image` (PIL image, path or bytes) and, if wanted, `item_id`, `photo_id`, `text` and any
                further columns. Photos of one item share its id. Photos that are files stay where they are.
            batch_size: photos a pass.
            store_photos: copy the files into the catalogue.
            on_commit: called with the photo ids that are safe from now on.

        Returns:
            What became of the rows; photos that cannot be read are listed there, and stop nothing.

        Raises:
            Outdated: the encoder is of another revision than the catalogue.
            ValueError: a column whose values or name cannot be kept.
        """
        writer = self._writer(batch_size, on_commit)
        for row in rows:
            try:
                writer.put(read_row(row, store_photos))
            except Unreadable as error:
                writer.skip(error.photo_id, error.reason)
        return writer.close()

    def update(self, rows: Iterable[Mapping[str, object]], *, batch_size: int = 32) -> Report:
        """Change columns of photos that are there; what a row does not name stays.

        Args:
            rows: mappings with `photo_id`, or with `item_id` for all photos of an item, and what changes: any columns,
                `text`, or (with `photo_id`) `image`. None empties a column.
            batch_size: photos a pass, of those whose image changes.

        Raises:
            ValueError: a row without an id, or an id that is not there; nothing is written then.
        """
        writer, snapshot = self._writer(batch_size, lambda ids: None), self.snapshot()
        changes = self._changes(list(rows), snapshot)
        ids = list(changes)
        names = [name for name in snapshot.schema.names if name not in ("photo_id", "vector")]
        for start in range(0, len(ids), CHUNK):
            for photo_id, row in snapshot.known(ids[start : start + CHUNK], names).items():
                try:
                    writer.put(_changed(row, changes[photo_id]))
                except Unreadable as error:
                    writer.skip(error.photo_id, error.reason)
        return writer.close()

    def delete(self, photo_ids: Sequence[str] = (), item_ids: Sequence[str] = ()) -> int:
        """Delete photos, and all photos of items; returns how many there were. Ids that are not there are no error."""
        state, deleted = self._store.state(), 0
        for column, ids in (("photo_id", list(photo_ids)), ("item_id", list(item_ids))):
            for start in range(0, len(ids), MANY):
                condition = col(column).isin([str(name) for name in ids[start : start + MANY]])
                deleted += retrying(
                    lambda where=condition: self._store.table(state.table).delete(where).num_deleted_rows
                )
        self._store.confirm(state.table)
        return deleted

    def reembed(
        self,
        encoder: Encoder,
        *,
        batch_size: int = 32,
        on_commit: Callable[[list[str]], None] = lambda ids: None,
        drop_unreadable: bool = False,
    ) -> Report:
        """Replace all vectors by those of another model.

        Readers see the old vectors until the last one is there; then all change at once. Killed, it goes on where it
        was when it is called again. What others write meanwhile is taken along.

        Args:
            encoder: the other model.
            batch_size: photos a pass.
            on_commit: called with the photo ids whose new vectors are safe.
            drop_unreadable: leave out photos that cannot be read any more; otherwise they stop the switch.

        Raises:
            ValueError: photos that cannot be read any more.
        """
        report = reembed(self._store, encoder, batch_size, on_commit, drop_unreadable)
        self._encoder, self._snapshot = encoder, None
        return report

    def prepare(
        self,
        encoder: Encoder,
        *,
        batch_size: int = 32,
        on_commit: Callable[[list[str]], None] = lambda ids: None,
        share: tuple[int, int] = (0, 1),
    ) -> Report:
        """The long part of `reembed`, for process share[0] of share[1]: embed its share, switch nothing."""
        return prepare(self._store, encoder, batch_size, on_commit, share)

    def optimise(self, keep: datetime.timedelta = datetime.timedelta(hours=1)) -> None:
        """Put small files together, bring the indices up to date, and free the space of what is no longer in use.

        Above `exact_up_to` photos it also builds the ANN index. Searches need it for speed alone, never to be right.

        Args:
            keep: how old a version must be to be dropped; no search may last that long.
        """
        self._store.clear(keep)
        table = self._store.table(self._store.state().table)
        table.optimize(cleanup_older_than=keep)
        rows = table.count_rows()
        names = {name for index in table.list_indices() for name in index.columns}
        if rows >= INDEXED_FROM:
            for column in ("photo_id", "item_id"):
                if column not in names:
                    table.create_index(column, config=BTree())
        if rows > self.exact_up_to and "vector" not in names:
            # By size, not by number: `optimize` falls back to LanceDB's own number, which is some 20 times too small.
            size = max(1, int(rows**0.5 / 2))
            table.create_index("vector", config=IvfFlat("cosine", target_partition_size=size, sample_rate=64))

    # -------------------------------------------------------------------------------------------------- reading
    def search(
        self,
        text: str | None = None,
        image: Photo | None = None,
        filter: Filter | None = None,
        k: int = 10,
        rerank: int = 0,
    ) -> Ranking:
        """The items nearest to a text, to a photo, or to a photo with what should differ from it.

        Args:
            text: what is wanted; with `image`, how it should differ.
            image: a PIL image, a path or bytes.
            filter: conditions on columns, {"category": "Tops", "price": {"<": 50}} or ["category=Tops", "price<50"].
                Photos that do not meet them are neither counted nor returned.
            k: items.
            rerank: so many of the best (by vector) are put in the order of the matching head; 0 = none.

        Returns:
            A sequence of `Hit`, best first, with `notes`.

        Raises:
            ValueError: nothing to search for, an unknown column, an unreadable photo; a model of another revision
                (`Outdated`).
        """
        snapshot = self.snapshot()
        return search(snapshot, self._encoder_of(snapshot.state), text, image, filter, k, rerank)

    def snapshot(self) -> Snapshot:
        """The newest version, for several readings that must agree; its vectors stay in memory until it changes."""
        state = self._store.state()
        table = self._store.table(state.table)
        last = self._snapshot
        if last is None or (last.state.table, last.version) != (state.table, table.version):
            self._snapshot = Snapshot(table, state, self.exact_up_to)
        return self._snapshot

    def __len__(self) -> int:
        """Photos."""
        return self.snapshot().rows

    def photo_ids(self) -> list[str]:
        """Of all photos, in no particular order."""
        return self.snapshot().table.search().select(["photo_id"]).to_arrow()["photo_id"].to_pylist()

    def describe(self) -> dict:
        """What is in the catalogue and how it is searched."""
        snapshot = self.snapshot()
        state = snapshot.state
        items = pc.count_distinct(snapshot.table.search().select(["item_id"]).to_arrow()["item_id"]).as_py()
        unfinished = [name for name in self._store.tables() if name.startswith("photos_")]
        return {
            "path": self._store.place,
            "photos": snapshot.rows,
            "items": items,
            "columns": snapshot.columns,
            "filterable": filterable(snapshot.schema),
            "model": state.model,
            "revision": state.revision,
            "dim": state.dim,
            "version": snapshot.version,
            "search": _engine(snapshot, self.exact_up_to),
            "unfinished": [name for name in unfinished if name not in (state.table, state.previous)],
        }

    # ---------------------------------------------------------------------------------------------------- parts
    def _encoder_of(self, state: State) -> Encoder:
        if self._encoder is None:
            if not state.model:
                raise ValueError(f"{self._store.place} does not name its model; open it with an encoder.")
            self._encoder = Encoder.from_pretrained(state.model)
        own = self._encoder
        if own.revision != state.revision:
            raise Outdated(
                f"{self._store.place} holds vectors of {state.model or 'a model'} (revision {state.revision[:12]}); "
                f"the encoder is {own.name or 'a model'} (revision {own.revision[:12]}). Vectors of two revisions "
                "cannot be compared. Use the first model, or re-embed with the second: catalogue.reembed(encoder), or "
                "syncmask index PHOTOS CATALOGUE --model RUN --reembed"
            )
        return own

    def _writer(self, batch_size: int, on_commit: Callable[[list[str]], None]) -> Writer:
        state = self._store.state()
        return Writer(self._store, state.table, self._encoder_of(state), batch_size=batch_size, on_commit=on_commit)

    def _changes(self, rows: list[Mapping[str, object]], snapshot: Snapshot) -> dict[str, Mapping[str, object]]:
        """By photo id, later rows over earlier ones."""
        changes: dict[str, dict[str, object]] = {}
        items: dict[str, list[str]] = {}
        wanted = [str(row["item_id"]) for row in rows if "photo_id" not in row and "item_id" in row]
        for row in snapshot.photos_of(wanted, None).select(["photo_id", "item_id"]).to_pylist():
            items.setdefault(row["item_id"], []).append(row["photo_id"])
        for number, row in enumerate(rows):
            if "photo_id" not in row and ("item_id" not in row or "image" in row):
                raise ValueError(
                    f"row {number} has no photo_id{' for its image' if 'image' in row else ' or item_id'}."
                )
            ids = [str(row["photo_id"])] if "photo_id" in row else items.get(str(row["item_id"]), [])
            for photo_id in ids:
                changes.setdefault(photo_id, {}).update(row)
        missing = set(changes) - snapshot.known(list(changes), ["item_id"]).keys() | set(wanted) - items.keys()
        if missing:
            some = ", ".join(repr(name) for name in sorted(missing)[:3])
            raise ValueError(
                f"{len(missing)} ids are not in the catalogue, such as {some}; add them. Nothing was written."
            )
        return changes


def _changed(row: dict, change: Mapping[str, object]) -> Record:
    """A stored row with what changes; its photo is read again only if it is another one."""
    columns = {name: value for name, value in row.items() if name not in (*GIVEN, *HIDDEN)}
    columns |= {name: value for name, value in change.items() if name not in GIVEN}
    item_id, text = (change.get(name, row[name]) for name in ("item_id", "text"))
    if "image" in change:
        given = {"photo_id": row["photo_id"], "item_id": item_id, "text": text, "image": change["image"]}
        return read_row({**columns, **given}, store_photos=row["photo_bytes"] is not None)
    record = Record.of_stored(
        row | {"item_id": str(item_id), "text": str(text or "")}, columns, row["photo_bytes"] or b""
    )
    record.photo_sha256 = row["photo_sha256"]  # of the file, which is not read
    return record


def _engine(snapshot: Snapshot, exact_up_to: int) -> str:
    """How a catalogue of this size is searched, in words."""
    if snapshot.exact:
        kind = scan_dtype()
        size = snapshot.rows * snapshot.state.dim * (4 + kind.itemsize) / 2**20
        second = " with float32 rescoring" if kind.itemsize < 4 else ""
        return f"exact scan in memory ({str(kind).removeprefix('torch.')}{second}, {size:.1f} MiB)"
    if snapshot.indexed:
        return f"LanceDB's IVF index ({PROBES} partitions a query), since there are more than {exact_up_to:,} photos"
    return "LanceDB's scan of its files, slow: call optimise() to build the index"


__all__ = ["Catalogue", "NoCatalogue", "Outdated", "Report"]
