"""Where a catalogue lives: a LanceDB folder, one table of photos a model revision, one row that says which counts.

A table is written to by merge-inserts keyed by photo id, so a row is there whole or not at all, and once. The row in
`about` is the only switch: a new model's vectors are written to a table of their own, and count when `about` says so.
"""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass
from pathlib import Path

import lancedb
import pyarrow as pa
from lancedb.expr import col, lit

FORMAT = 1
ABOUT = "about"
RETRIES = 20


class NoCatalogue(FileNotFoundError):
    """A place that holds no catalogue."""


class Outdated(ValueError):
    """A model other than the one that a catalogue's vectors are of."""


@dataclass(frozen=True)
class State:
    """The row in `about`.

    Attributes:
        table: the table of photos that counts.
        revision: of the model its vectors are of.
        model: name or folder of that model.
        dim: length of its vectors.
        switching: token of a re-embedding that is about to switch; "" otherwise.
        previous: the table that counted before the last switch, until `Store.clear` drops it.
        format: of all this.
    """

    table: str
    revision: str
    model: str
    dim: int
    switching: str = ""
    previous: str = ""
    format: int = FORMAT


def table_name(revision: str) -> str:
    """Of the photos embedded by one model revision."""
    return f"photos_{revision[:16]}"


class Store:
    """The tables at one place, by short-lived handles: whoever asks sees the newest version."""

    def __init__(self, place: str):
        self.place = place
        self.db = lancedb.connect(place)

    @classmethod
    def open(cls, place: str) -> Store:
        """Open what is there.

        Raises:
            NoCatalogue: nothing, or something else; nothing is made there.
            ValueError: a catalogue that a newer version of this package wrote.
        """
        if "://" not in place and not (Path(place) / f"{ABOUT}.lance").is_dir():
            what = "does not exist" if not Path(place).exists() else "is no catalogue: it has no table 'about'"
            raise NoCatalogue(f"{place} {what}. Make one: syncmask index PHOTOS {place} --model RUN")
        store = cls(place)
        if ABOUT not in store.tables():
            raise NoCatalogue(f"{place} is no catalogue. Make one: syncmask index PHOTOS {place} --model RUN")
        store.state()
        return store

    @classmethod
    def create(cls, place: str, schema: pa.Schema, revision: str, model: str, dim: int) -> Store:
        """Make an empty catalogue; if another process was quicker, its one is opened.

        Raises:
            ValueError: a folder with other files in it.
        """
        if "://" not in place and Path(place).exists():
            if not Path(place).is_dir():
                raise ValueError(f"{place} is a file; name a new folder.")
            foreign = [path.name for path in Path(place).iterdir() if path.suffix != ".lance"]
            if foreign:
                raise ValueError(f"{place} holds other files ({', '.join(sorted(foreign)[:3])}); name a new folder.")
        store = cls(place)
        state = State(table_name(revision), revision, model, dim)
        store.create_table(state.table, schema)
        try:
            store.db.create_table(ABOUT, pa.Table.from_pylist([vars(state)]))
        except (ValueError, RuntimeError):
            if ABOUT not in store.tables():
                raise
        return store

    def tables(self) -> list[str]:
        """Names of all tables."""
        return list(self.db.list_tables(limit=1000).tables)

    def create_table(self, name: str, schema: pa.Schema):
        """An empty table of photos, or the one that has the name already."""
        try:
            return self.db.create_table(name, schema=schema)
        except (ValueError, RuntimeError):
            if name not in self.tables():
                raise
            return self.db.open_table(name)

    def state(self) -> State:
        """What counts now.

        Raises:
            ValueError: a newer version of this package wrote it.
        """
        row = self.db.open_table(ABOUT).search().to_arrow().to_pylist()[0]
        if row["format"] > FORMAT:  # whose fields may be others
            raise ValueError(
                f"{self.place} has format {row['format']}, this package reads {FORMAT}; install a newer syncmask."
            )
        return State(**row)

    def table(self, name: str):
        """A handle on the newest version of a table."""
        return self.db.open_table(name)

    # -------------------------------------------------------------------------------------------------- writing
    def merge(self, name: str, make) -> None:
        """Insert rows, or replace those with the same photo id, in one commit.

        Args:
            name: of the table.
            make: called with the table, gives the rows in its schema; again after a conflict with another writer.
        """

        def once():
            table = self.table(name)
            rows = make(table)
            table.merge_insert("photo_id").when_matched_update_all().when_not_matched_insert_all().execute(rows)

        retrying(once)

    def confirm(self, name: str) -> None:
        """After a commit to a table: make sure that it counts, and that no re-embedding switches over without it.

        A re-embedding switches only while its token stands, and it takes over the rows that were there when it put the
        token. So a writer that finds a token takes it away, and the re-embedding looks again. Nobody waits for anybody,
        and a re-embedding that was killed blocks nobody.

        Raises:
            Outdated: the switch came first; what was just written may not be in the catalogue.
        """
        state = self.state()
        if state.switching:
            self.set_state({"switching": ""}, only_if=("switching", state.switching))
            state = self.state()
        if state.table != name:
            raise Outdated(
                f"{self.place} was re-embedded by {state.model} in the meantime; the last rows were not kept. "
                "Open it anew, with that model, and add them again."
            )

    def set_state(self, values: dict[str, object], only_if: tuple[str, str]) -> None:
        """Change the row in `about` in one commit, where a field still has the value given."""
        field, value = only_if

        def once():
            self.db.open_table(ABOUT).update(where=col(field) == lit(value), values=values)

        retrying(once)

    def clear(self, keep: datetime.timedelta) -> None:
        """Drop the table before the last switch, and versions that are older than `keep`."""
        state = self.state()
        if state.previous:
            if state.previous in self.tables():
                self.db.drop_table(state.previous)
            self.set_state({"previous": ""}, only_if=("previous", state.previous))
        self.db.open_table(ABOUT).optimize(cleanup_older_than=keep)


def retrying(action) -> None:
    """Start over after a conflict with another writer, at most RETRIES times.

    Raises:
        RuntimeError: LanceDB's own, of another kind or the last one.
    """
    for attempt in range(RETRIES):
        try:
            return action()
        except RuntimeError as error:
            if attempt + 1 == RETRIES or not any(word in str(error).lower() for word in ("conflict", "concurrent")):
                raise
            time.sleep(0.02 * (attempt + 1))
