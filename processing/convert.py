"""Any source as sharded parquet in the one schema: `syncmask corpus convert SOURCE OUT`.

Photos that are files keep their bytes; pixels (HDF5) become PNG. Each file is written under another name and renamed
when it is complete, so a run that was stopped goes on with the first file that is not there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from .check_photos import probe
from .corpus import open_streams
from .processing_syncmask import split_words
from .readers_fashioniq import holds_fashioniq, read_fashioniq
from .readers_folder import canonical_split
from .readers_tabular import ASIDE, PLAN
from .streams import RowStream, photo_cell, photo_columns, stream_of_table

VERSION = 1
GROUP_BYTES = 32 * 2**20  # of a row group: what a reader has in memory at a time
GROUP_ROWS = 500
SKIPPED = "skipped.jsonl"
SKIPPED_KEY = b"syncmask.skipped"


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote.

    Attributes:
        rows: by split.
        skipped: rows that were left out, each {"split", "row", "item_id", "reason"}; also in skipped.jsonl.
        resumed: files that were there already.
    """

    rows: dict[str, int]
    skipped: list[dict]
    resumed: int


def convert(
    source: str | os.PathLike,
    out: Path,
    *,
    verify: bool = False,
    min_words: int = 1,
    piece_rows: int = 1000,
    on_row: Callable[[], None] = lambda: None,
    **columns,
) -> Converted:
    """Write a corpus as OUT/SPLIT-00000-of-00042.parquet files, which `load_corpus(OUT)` reads as it reads the source.

    Rows without a text, an item or a photo's file are left out, counted and listed. FashionIQ's galleries go to
    OUT/galleries. The same call goes on where a stopped one was.

    Args:
        source: as `load_corpus` takes it.
        out: a new folder, or one of the same conversion.
        verify: also decode every photo and leave out those that the check calls unreadable or huge.
        min_words: rows whose text has fewer words are left out.
        piece_rows: rows of a file; tar shards give a file each, HDF5 whole chunks.
        on_row: called after each row (for a progress bar).
        columns: split, image_column, text_column, item_id_column, where, seed, num_items, image_size of `load_corpus`.

    Raises:
        FileExistsError: the folder holds something else, or a conversion of another source or with other settings.
        FileNotFoundError, ValueError: as `load_corpus`.
    """
    out = Path(out)
    streams = _named(open_streams(source, piece_rows=piece_rows, **columns))
    plan = {"version": VERSION, "settings": _settings(streams, verify, min_words, columns), "files": _files(streams)}
    if holds_fashioniq(Path(source)):
        found = read_fashioniq(Path(source))
        gallery = {f"{ASIDE}/gallery": stream_of_table(found.photos, piece_rows=piece_rows)}
        streams, plan = streams | gallery, plan | {"missing": found.missing, "leaks": found.leaks}
        plan["files"] = _files(streams)
    _begin(out, plan)
    keep = _Keep(verify, max(min_words, 1))
    resumed = 0
    for name, stream in streams.items():
        for file, piece in zip(_files({name: stream}), stream.pieces, strict=True):
            resumed += (out / file).is_file()
            if not (out / file).is_file():
                _write(out / file, stream, piece, keep, name, on_row)
    return _finish(out, streams, resumed)


def _named(streams: dict[str, RowStream]) -> dict[str, RowStream]:
    """Splits by names that a file can begin with and `load_corpus` finds again ("all" and "data" are "data")."""
    if len(streams) == 1 and canonical_split(next(iter(streams))) not in ("train", "validation", "test"):
        return {"data": next(iter(streams.values()))}
    return {canonical_split(name): stream for name, stream in streams.items()}


def _settings(streams: dict[str, RowStream], verify: bool, min_words: int, columns: dict) -> dict:
    given = {name: value for name, value in sorted(columns.items()) if value is not None}
    return {
        "stamps": {name: stream.stamp for name, stream in streams.items()},
        "verify": verify,
        "min_words": min_words,
        "columns": json.loads(json.dumps(given, default=str)),
    }


def _files(streams: dict[str, RowStream]) -> list[str]:
    return [
        f"{name}-{number:05d}-of-{len(stream.pieces):05d}.parquet"
        for name, stream in streams.items()
        for number in range(len(stream.pieces))
    ]


def _begin(out: Path, plan: dict) -> None:
    """Write the plan into a new folder, or see that the one there is the same."""
    if not (out / PLAN).is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise FileExistsError(f"{out} is not empty and no conversion; name a new folder.")
        out.mkdir(parents=True, exist_ok=True)
        _replace(out / PLAN, json.dumps(plan, indent=1) + "\n")
        return
    found = json.loads((out / PLAN).read_text(encoding="utf-8"))
    for name in ("version", "settings", "files"):
        if found[name] != plan[name]:
            raise FileExistsError(
                f"{out} holds a conversion of another source, of one that changed, or with other settings (its {name} "
                "differ). Name a new folder, or remove this one to begin anew."
            )


def _replace(file: Path, text: str) -> None:
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


# --------------------------------------------------------------------------------------------- one file
@dataclass(frozen=True)
class _Keep:
    """Which rows stay: their photos' bytes are fetched here, and the reason is told where they do not."""

    verify: bool
    min_words: int

    def __call__(self, row: dict, photos: list[str]) -> tuple[dict, str | None]:
        if "text" in row and len(split_words(row["text"] or "")) < self.min_words:
            return row, "no text" if self.min_words == 1 else f"a text of fewer than {self.min_words} words"
        if not (row["item_id"] or "").strip():
            return row, "no item id"
        row = dict(row)
        for name in photos:
            row[name], reason = _embedded(row[name])
            if reason is None and self.verify:
                reason = _unreadable(row[name]["bytes"])
            if reason:
                return row, f"{name}: {reason}"
        return row, None


def _embedded(photo) -> tuple[dict | None, str | None]:
    """A cell that holds the file's own bytes, or why there is none."""
    cell = photo_cell(photo)
    if cell is None or not (cell.get("bytes") or cell.get("path")):
        return None, "the row holds no photo"
    content = cell.get("bytes")
    if content is None:
        try:
            content = Path(cell["path"]).read_bytes()
        except OSError as error:
            return None, f"{cell['path']} cannot be read ({error.strerror})"
    if not content:
        return None, f"{cell.get('path') or 'the photo'} is a file of zero bytes"
    name = None if cell.get("path") is None else Path(cell["path"]).name
    return {"bytes": content, "path": name}, None


def _unreadable(content: bytes) -> str | None:
    """Why the corpus check would call the photo unreadable or huge."""
    facts = probe({"bytes": content, "path": None})
    return None if facts.problem in (None, "tiny") else f"{facts.problem}: {facts.reason}"


def _write(file: Path, stream: RowStream, piece: tuple, keep: _Keep, split: str, on_row: Callable) -> None:
    """One parquet file, complete or absent; the rows left out are listed in its footer."""
    file.parent.mkdir(exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    schema, photos, skipped = stream.features.arrow_schema, photo_columns(stream.features), []

    def kept() -> Iterator[dict]:
        for number, row in enumerate(stream.read(*piece)):
            row, reason = keep(row, photos)
            on_row()
            if reason is None:
                yield row
            else:
                place = {"split": split, "file": file.name, "row_of_piece": number, "item_id": row["item_id"]}
                skipped.append(place | {"reason": reason})

    with pq.ParquetWriter(partial, schema, compression="none", use_dictionary=False) as writer:
        for group in _groups(kept(), photos):
            writer.write_table(_table(group, stream.features))
        writer.add_key_value_metadata({SKIPPED_KEY: json.dumps(skipped).encode()})
    os.replace(partial, file)


def _groups(rows: Iterator[dict], photos: list[str]) -> Iterator[list[dict]]:
    group, size = [], 0
    for row in rows:
        group.append(row)
        size += sum(len(row[name]["bytes"]) for name in photos)
        if size >= GROUP_BYTES or len(group) >= GROUP_ROWS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _table(rows: list[dict], features: datasets.Features) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=features.arrow_schema)


# ---------------------------------------------------------------------------------------------- the end
def _finish(out: Path, streams: dict[str, RowStream], resumed: int) -> Converted:
    rows, skipped = {}, []
    for name, stream in streams.items():
        rows[name] = 0
        for file in _files({name: stream}):
            footer = pq.read_metadata(out / file)
            rows[name] += footer.num_rows
            skipped += json.loads(footer.metadata[SKIPPED_KEY])
    _replace(out / SKIPPED, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in skipped))
    if not any(count for name, count in rows.items() if not name.startswith(ASIDE)):
        raise ValueError(f"no row was left of {sum(rows.values()) + len(skipped)}; see {out / SKIPPED} for why.")
    return Converted(rows, skipped, resumed)
