"""Rows that are read piece by piece and never all at once: what conversion and check walk over.

A piece is what one output file of a conversion holds: a range of rows, or a tar shard. Sources that are no table
(HDF5, tar) are streams from the start; a table becomes one without a copy.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
from PIL import Image

from .tar_photos import with_bytes

VERSION = 1
"""Part of the cache key of streams that were made a table: raise it when what a reader gives changes."""


@dataclass(frozen=True)
class RowStream:
    """Rows of one split, by pieces.

    Attributes:
        features: of the rows. Photos come as PIL images or as undecoded cells {"bytes", "path"}.
        pieces: arguments of `read`, one tuple a piece.
        read: gives the rows of one piece, in order; it opens its files itself, so pieces may go to any process.
        stamp: changes when the source changes (names, sizes and times of its files).
        rows: how many there are, or None where only reading tells.
    """

    features: datasets.Features
    pieces: tuple[tuple, ...]
    read: Callable[..., Iterator[dict]]
    stamp: str
    rows: int | None = None

    def __iter__(self) -> Iterator[dict]:
        for piece in self.pieces:
            yield from self.read(*piece)


def row_ranges(rows: int, size: int) -> tuple[tuple[int, int], ...]:
    """Ranges of `size` rows, the last one shorter.

    Example:
        >>> row_ranges(5, 2)
        ((0, 2), (2, 4), (4, 5))
    """
    return tuple((start, min(start + size, rows)) for start in range(0, rows, size))


def stream_of_table(rows: datasets.Dataset, *, piece_rows: int = 1000, batch: int = 64) -> RowStream:
    """A table as a stream; photos stay undecoded cells, `batch` rows are in memory at a time.

    Photos that lie in tar shards are read from there.
    """
    features = rows.features
    photos = photo_columns(features)
    plain = rows.with_format(None)
    for name in photos:
        plain = plain.cast_column(name, datasets.Image(decode=False))

    def read(start: int, stop: int) -> Iterator[dict]:
        for first in range(start, stop, batch):
            columns = plain[first : min(first + batch, stop)]
            for values in zip(*columns.values(), strict=True):
                row = dict(zip(columns, values, strict=True))
                yield row | {name: with_bytes(row[name]) for name in photos}

    return RowStream(features, row_ranges(len(rows), piece_rows), read, rows._fingerprint, len(rows))


def table_of_stream(stream: RowStream) -> datasets.Dataset:
    """A stream as a memory-mapped table, written once to the cache of `datasets`; photos that are pixels become PNG.

    Raises:
        ValueError: what the reader raised for a file that is damaged further on.
    """
    try:
        return datasets.Dataset.from_generator(
            _cells,
            features=stream.features,
            gen_kwargs={
                "read": stream.read,
                "pieces": stream.pieces,
                "photos": tuple(photo_columns(stream.features)),
                "stamp": f"{VERSION}-{stream.stamp}",
            },
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


def _cells(read: Callable, pieces: tuple[tuple, ...], photos: tuple[str, ...], stamp: str) -> Iterator[dict]:
    for piece in pieces:
        for row in read(*piece):
            yield row | {name: photo_cell(row[name]) for name in photos}


def with_columns(stream: RowStream, features: datasets.Features, origin: Mapping[str, str]) -> RowStream:
    """The stream with columns renamed or copied: column c holds what stood in origin[c].

    Values of columns that became strings are turned into strings.
    """
    texts = [name for name, kind in features.items() if kind == datasets.Value("string")]

    def read(*piece) -> Iterator[dict]:
        for row in stream.read(*piece):
            row = {name: row[source] for name, source in origin.items()}
            yield row | {name: str(row[name]) for name in texts if row[name] is not None}

    return replace(stream, features=features, read=read)


def where_rows(stream: RowStream, where: Mapping[str, object]) -> RowStream:
    """Only the rows whose columns have these values."""

    def read(*piece) -> Iterator[dict]:
        for row in stream.read(*piece):
            if all(row[column] == value or str(row[column]) == str(value) for column, value in where.items()):
                yield row

    return replace(stream, read=read, rows=None)


def photo_columns(features: datasets.Features) -> list[str]:
    """Names of the columns that hold photos."""
    return [name for name, kind in features.items() if isinstance(kind, datasets.Image)]


def photo_cell(photo: Image.Image | dict | None) -> dict | None:
    """A photo as an undecoded cell; pixels become a PNG file, compressed quickly and without loss."""
    if not isinstance(photo, Image.Image):
        return photo
    buffer = io.BytesIO()
    photo.save(buffer, "PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def stamp_of(files: list[Path]) -> str:
    """A name for the state of files: their names, sizes and times of change."""
    digest = hashlib.sha256()
    for file in files:
        state = file.stat()
        digest.update(f"{file.name}:{state.st_size}:{state.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
