"""What a catalogue keeps of a photo: from a caller's row to a record, and records to an Arrow table."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

REMOTE = ("http://", "https://", "data:")
# Columns of our own, with the types they are stored in; "vector" is added with its length.
OWN = {
    "photo_id": pa.string(),
    "item_id": pa.string(),
    "text": pa.string(),
    "photo_path": pa.string(),
    "photo_bytes": pa.large_binary(),
    "photo_sha256": pa.string(),
    "row_sha256": pa.string(),
    "revision": pa.string(),
}
# How LanceDB is told of a key: two processes that insert the same new photo at once are a conflict then, and one
# starts over. `set_unenforced_primary_key` writes the same, but not in the commit that makes the table.
KEY = {"lance-schema:unenforced-primary-key:position": "1"}
# What a caller names a row by; the rest of OWN is ours alone.
GIVEN = ("photo_id", "item_id", "text", "image")
HIDDEN = ("photo_path", "photo_bytes", "photo_sha256", "row_sha256", "revision", "vector")


@dataclass
class Record:
    """A row on its way into the table.

    Attributes:
        photo_id, item_id, text: as given, or made up from the photo's name.
        path: absolute, of a photo that lies in a file and stays there.
        photo: bytes of the photo's file; dropped once it is encoded, unless `stored`.
        stored: whether the bytes go into the table.
        photo_sha256: of those bytes. A vector belongs to it and to the model's revision.
        columns: all further ones.
        vector: (P,) float32, once it is known.
        taken_over: hash of the stored row that this one repeats; None for a row that a caller gave.
    """

    photo_id: str
    item_id: str
    text: str
    path: str | None
    photo: bytes | None
    stored: bool
    photo_sha256: str
    columns: dict[str, object] = field(default_factory=dict)
    vector: np.ndarray | None = None
    taken_over: str | None = None

    @classmethod
    def of_stored(cls, row: Mapping[str, object], columns: dict[str, object], photo: bytes) -> Record:
        """A stored row with its photo's bytes as they are now."""
        return cls(
            photo_id=row["photo_id"],
            item_id=row["item_id"],
            text=row["text"],
            path=row["photo_path"],
            photo=photo,
            stored=row["photo_bytes"] is not None,
            photo_sha256=hashlib.sha256(photo).hexdigest(),
            columns=columns,
        )

    @property
    def row_sha256(self) -> str:
        """Of all that is kept: the photo's hash, the text and every column. Equal hash, equal row."""
        if self.taken_over:
            return self.taken_over
        kept = [self.photo_id, self.item_id, self.text, self.path, self.stored, self.photo_sha256]
        columns = {name: value for name, value in self.columns.items() if value is not None}
        return hashlib.sha256(json.dumps([kept, columns], sort_keys=True, default=_told).encode()).hexdigest()


class Unreadable(ValueError):
    """A row whose photo is missing or broken: skipped and listed, never fatal."""

    def __init__(self, photo_id: str, reason: str):
        super().__init__(f"{photo_id}: {reason}")
        self.photo_id, self.reason = photo_id, reason


def read_row(row: Mapping[str, object], store_photos: bool = False) -> Record:
    """A caller's row as a record, its photo's file read but not decoded.

    Args:
        row: `image` (PIL image, path, bytes, or a cell {"bytes", "path"} of `datasets`); optionally `item_id` (else
            every photo is an item), `photo_id` (else item and file name, or hash), `text`; and any further columns.
        store_photos: copy photos that are files into the table too; photos given as pixels or bytes always are.

    Raises:
        Unreadable: no photo, or none that can be read from disk.
        ValueError: a row that is no mapping or whose columns have names that cannot be kept.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"a row is a {type(row).__name__}; wanted a mapping with 'image' and, for example, 'item_id'.")
    path, photo = _photo(row)
    name = Path(path).name if path else hashlib.sha256(photo).hexdigest()[:16]
    item_id = _given(row, "item_id") or _given(row, "photo_id") or Path(name).stem
    photo_id = _given(row, "photo_id") or f"{item_id}/{name}"
    if photo is None:
        photo = photo_of_file(path, photo_id)
    return Record(
        photo_id=photo_id,
        item_id=item_id,
        text=str(row.get("text") or ""),
        path=path,
        photo=photo,
        stored=store_photos or path is None,
        photo_sha256=hashlib.sha256(photo).hexdigest(),
        columns={name: value for name, value in row.items() if name not in GIVEN},
    )


def _told(value: object) -> object:
    """What JSON does not know, for a hash; of long arrays `repr` leaves the middle out."""
    return value.tolist() if isinstance(value, np.ndarray) else repr(value)


def _given(row: Mapping[str, object], name: str) -> str:
    """An id as a string; 0 is one, None is none."""
    return "" if row.get(name) is None else str(row[name])


def check_columns(names: Sequence[str]) -> None:
    """Refuse column names that are ours, or that LanceDB cannot hold or compare.

    Raises:
        ValueError: such a name.
    """
    for name in names:
        if name in HIDDEN:
            raise ValueError(f"column {name!r} has a name that the catalogue uses itself; rename it.")
        if not isinstance(name, str) or not name or any(sign in name for sign in ".`\"'\\\0\n"):
            raise ValueError(f"column {name!r} cannot be kept: wanted a name without dots, quotes and backslashes.")


def _photo(row: Mapping[str, object]) -> tuple[str | None, bytes | None]:
    """(absolute path, None) of a photo in a file, else (None, bytes)."""
    image = row.get("image")
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    where = str(row.get("photo_id") or row.get("item_id") or "a row without ids")
    if image is None:
        raise Unreadable(where, "the row has no photo: 'image' is empty")
    if isinstance(image, (bytes, bytearray)):
        return None, bytes(image)
    if isinstance(image, Image.Image):
        return None, _png(image)
    if isinstance(image, (str, os.PathLike)):
        if str(image).startswith(REMOTE):
            raise Unreadable(where, f"{str(image)[:80]!r} is a web address; download the photo first")
        return os.path.abspath(os.path.expanduser(image)), None
    raise ValueError(f"{where}: 'image' is a {type(image).__name__}; wanted a PIL image, a path or bytes.")


def photo_of_file(path: str, photo_id: str) -> bytes:
    """The bytes of a photo's file.

    Raises:
        Unreadable: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise Unreadable(photo_id, f"{path}: {error.strerror or error}") from error


def _png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------- Arrow
def schema_of(dim: int) -> pa.Schema:
    """The schema of an empty catalogue with vectors of `dim` numbers."""
    key = pa.field("photo_id", OWN["photo_id"], nullable=False, metadata=KEY)
    others = [pa.field(name, kind) for name, kind in OWN.items() if name != "photo_id"]
    return pa.schema([key, *others, pa.field("vector", pa.list_(pa.float32(), dim))])


def new_fields(records: Sequence[Record], schema: pa.Schema) -> list[pa.Field]:
    """Columns of the records that a table does not have yet, with the types their values show.

    Raises:
        ValueError: values of one column that are of several kinds, or a name that cannot be kept.
    """
    names = dict.fromkeys(name for record in records for name in record.columns)
    check_columns(list(names))
    fields = []
    for name in (name for name in names if name not in schema.names):
        kind = _array(name, [record.columns.get(name) for record in records], None).type
        if not pa.types.is_null(kind):  # nothing but empty values: they say nothing of the type, so it waits
            fields.append(pa.field(name, kind))
    return fields


def to_table(records: Sequence[Record], schema: pa.Schema, revision: str) -> pa.Table:
    """Records, encoded, as rows of a table with this schema; columns that a record lacks are empty.

    Raises:
        ValueError: a value that is not of its column's type.
    """
    own = {
        "photo_id": lambda record: record.photo_id,
        "item_id": lambda record: record.item_id,
        "text": lambda record: record.text,
        "photo_path": lambda record: record.path,
        "photo_bytes": lambda record: record.photo if record.stored else None,
        "photo_sha256": lambda record: record.photo_sha256,
        "row_sha256": lambda record: record.row_sha256,
        "revision": lambda record: revision,
    }
    arrays = []
    for column in schema:
        if column.name == "vector":
            flat = np.concatenate([record.vector for record in records]).astype(np.float32)
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(flat), column.type.list_size))
        elif column.name in own:
            arrays.append(pa.array([own[column.name](record) for record in records], column.type))
        else:
            arrays.append(_array(column.name, [record.columns.get(column.name) for record in records], column.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _array(name: str, values: list, kind: pa.DataType | None) -> pa.Array:
    if kind is not None and pa.types.is_string(kind):
        # A column of codes such as "007" may come as numbers now and then.
        plain = (int, float, bool, datetime.date)
        values = [str(value) if isinstance(value, plain) else value for value in values]
    try:
        return pa.array(values, kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        kinds = sorted({type(value).__name__ for value in values if value is not None})
        wanted = f"the catalogue keeps it as {kind}" if kind is not None else "wanted one kind"
        raise ValueError(f"column {name!r} holds {', '.join(kinds)}; {wanted} ({error}).") from error
