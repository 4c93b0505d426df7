"""The one schema of a corpus: photos in rows, `image`, `text`, `item_id`; all photos of an item share its id.

`load_corpus` brings any source to it, `CorpusIndex` numbers its items and texts, `fingerprint` names its contents.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from .processing_syncmask import split_words
from .readers_fashiongen import open_fashiongen
from .readers_fashioniq import holds_fashioniq, read_fashioniq
from .readers_folder import holds_metadata, read_folder
from .readers_shards import open_shards
from .readers_tabular import parquet_files, read_hub, read_parquet, read_saved, refuse_foreign
from .splits import warn_of_splits, with_splits
from .streams import RowStream, stream_of_table, table_of_stream, where_rows, with_columns
from .tar_photos import decode_tar_places
from .variants import variant_splits

logger = logging.getLogger(__name__)

GENERATED = "garments"
GENERATED_VARIANTS = "garment-variants"
FOLDER = "folder"
"""In settings: the photos lie in `data_dir`."""
ROLES = ("image", "text", "item_id")
CATEGORY_LEVELS = {"category1": "category", "category2": "subcategory"}
"""How the Marqo sets call them."""


def load_corpus(
    source: str | os.PathLike,
    *,
    split: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    item_id_column: str | None = None,
    seed: int = 0,
    num_items: int | None = None,
    image_size: int | None = None,
    min_words: int = 1,
    where: Mapping[str, object] | None = None,
    variants: str | None = None,
    shares: tuple[float, float, float] = (0.75, 0.1, 0.15),
) -> datasets.DatasetDict:
    """Read a corpus and bring it to the schema: `image`, `text`, `item_id`, and every further column as it was.

    Photos are not opened here, so a broken one stops nothing. Rows without text or item are dropped and counted in
    a warning; the texts "None" and "NA" stay texts. A source with train and validation (or test) splits keeps them,
    and a missing validation split is taken from train; any other is split by a seeded hash of the item's id, so
    that no item (no family, where a column `family_id` says which items belong together) straddles splits and adding
    items never moves old ones.

    Args:
        source: "garments" (generated, with ground truth); "garment-variants" (generated triplets: a photo, the same
            garment in another colour, a text that asks for it; see `make_garment_variants`); a folder of photos with
            metadata.{jsonl,csv,parquet}, in train/ validation/ test/ or flat; a parquet or Arrow file; a folder of
            parquet files; a folder of `save_to_disk`; FashionGen's HDF5 files or their folder; FashionIQ's folder
            (rows are its triplets, see `read_fashioniq`); tar shards or their folder; or a dataset's name on the Hub.
            HDF5 is written to the cache of `datasets` once: convert large files with `syncmask corpus convert`
            instead. Of tar shards only texts and places go there; their photos stay where they are.
        split: read this split of the source alone (and split it by item).
        image_column, text_column, item_id_column: what the source calls them. An item id of the text column itself
            makes photos with equal texts one item.
        seed: of the generated corpus and of the hash.
        num_items, image_size: of the generated corpora (2,000 garments, 64 pixels); others take no `num_items`.
        min_words: rows whose text has fewer words are dropped.
        where: keep only the rows whose column has the value, such as {"text_origin": "description"}.
        variants: "PRODUCT_COLUMN,COLOUR_COLUMN", such as "product_id,color": instead of the rows, triplets of photos of
            one product in two colours (`colour_variants`), split by product.
        shares: of items in train, validation and test where the source has no splits.

    Raises:
        FileNotFoundError: no such file, folder or dataset.
        ValueError: no reader for the source, a missing column, no row left, a damaged file, a file name that leads
            out of the corpus's folder.
        ImportError: HDF5 without h5py.

    Example:
        >>> load_corpus("garments", num_items=20)["train"].column_names[:3]  # doctest: +SKIP
        ['image', 'text', 'item_id']
    """
    tables = _read(source, seed, num_items, image_size, in_place=True)
    if split is not None:
        tables = {"all": _one_split(tables, split, source)}
    named = dict(zip(ROLES, (image_column, text_column, item_id_column), strict=True))
    tables = {name: table_of_stream(t) if isinstance(t, RowStream) else t for name, t in tables.items()}
    tables = {name: _to_schema(rows, named, source) for name, rows in tables.items()}
    tables = {name: _keep(rows, name, where or {}, min_words) for name, rows in tables.items()}
    if variants is not None:
        tables = variant_splits(tables, variants, seed)
    if not sum(map(len, tables.values())):
        raise ValueError(
            f"corpus {str(source)!r} has no row left; check `where`, `min_words` and its text column"
            + ("." if variants is None else f", and whether any product of {variants!r} has two colours in one view.")
        )
    corpus = with_splits(tables, seed, shares)
    warn_of_splits(corpus)
    return corpus


def corpus_of_run(data: Mapping[str, object], variants: str | None = None) -> datasets.DatasetDict:
    """The corpus that a run was trained on.

    Args:
        data: the section `data` of its config.yaml: corpus, data_dir, columns, where, seed, ...
        variants: see `load_corpus`; None = as the run did.

    Raises:
        ValueError: it names no source; and as `load_corpus`.
    """
    source = source_of_run(data)
    generated = source in (GENERATED, GENERATED_VARIANTS)
    return load_corpus(
        source,
        image_column=data.get("image_column"),
        text_column=data.get("text_column"),
        item_id_column=data.get("item_id_column"),
        where=dict(entry.split("=", 1) for entry in data.get("where") or []),
        variants=variants or data.get("variants"),
        seed=data.get("corpus_seed", 0),
        num_items=data.get("num_items") if generated else None,
        image_size=data.get("image_size") if generated else None,
    )


def source_of_run(data: Mapping[str, object]) -> str:
    """What `load_corpus` calls that corpus; ValueError where the settings name none."""
    folder = data.get("corpus") == FOLDER
    if source := data.get("data_dir" if folder else "corpus"):
        return source
    if folder:
        raise ValueError("corpus: folder needs the place of the photos: add --data_dir FOLDER")
    raise ValueError("this model belongs to no run, so its corpus is unknown; say which: --corpus SOURCE")


def source_kind(source: str | os.PathLike) -> str:
    """What `load_corpus` takes a source for: "generated", "files" of this machine, or a dataset of the "hub"."""
    if source in (GENERATED, GENERATED_VARIANTS):
        return "generated"
    return "files" if source == FOLDER or Path(source).expanduser().exists() else "hub"


def open_streams(
    source: str | os.PathLike,
    *,
    split: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    item_id_column: str | None = None,
    seed: int = 0,
    num_items: int | None = None,
    image_size: int | None = None,
    where: Mapping[str, object] | None = None,
    piece_rows: int = 1000,
) -> dict[str, RowStream]:
    """The same rows as streams in the schema, by the source's own splits; nothing is copied, dropped or split.

    What `load_corpus` would drop (rows without text or item) is still there, for the check to count. Arguments and
    errors are those of `load_corpus`; `piece_rows` says how tables are cut into pieces.
    """
    tables = _read(source, seed, num_items, image_size)
    if split is not None:
        tables = {"all": _one_split(tables, split, source)}
    named = dict(zip(ROLES, (image_column, text_column, item_id_column), strict=True))
    streams = {}
    for name, rows in tables.items():
        if isinstance(rows, RowStream):
            stream = _stream_to_schema(rows, named, source)
            streams[name] = where_rows(stream, _known(where or {}, stream.features)) if where else stream
        else:
            rows = _to_schema(rows, named, source)
            rows = rows.select(np.flatnonzero(_where_mask(rows, name, where))) if where else rows
            streams[name] = stream_of_table(rows, piece_rows=piece_rows)
    return streams


# -------------------------------------------------------------------------------------------- reading
Tables = dict[str, datasets.Dataset | RowStream]


def _read(source, seed: int, num_items: int | None, image_size: int | None, in_place: bool = False) -> Tables:
    """Tables (or streams, where the source is none) by split, with the source's own columns.

    With `in_place`, photos in tar shards are told by where they lie.
    """
    decode_tar_places()  # Of tables that were saved, too.
    if source == GENERATED:
        from syncmask.processing.garments import make_garments

        return {"all": make_garments(num_items or 2000, seed=seed, image_size=image_size or 64)}
    if source == GENERATED_VARIANTS:
        from syncmask.processing.garments_variants import make_garment_variants

        return {"all": make_garment_variants(num_items or 2000, seed=seed, image_size=image_size or 64)}
    if num_items is not None:
        raise ValueError(
            f"num_items is of the generated corpora ({GENERATED}, {GENERATED_VARIANTS}); {str(source)!r} has its own."
        )
    if "://" in str(source):
        raise ValueError(
            f"{str(source)!r} is an address; wanted a file or folder here, or the name of a Hub dataset. Photos are "
            "read from the middle of large files, so download or mount it, and pass its folder."
        )
    path = Path(source).expanduser()
    if not path.exists():
        return read_hub(str(source))
    if path.suffix == ".arrow" or (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return read_saved(path)
    if path.suffix == ".parquet":
        return read_parquet(path)
    if path.is_dir() and holds_metadata(path):
        return read_folder(path)
    if holds_fashioniq(path):
        return read_fashioniq(path).triplets
    if path.is_dir() and parquet_files(path):
        return read_parquet(path)
    if streams := open_fashiongen(path) or open_shards(path, in_place=in_place):
        return streams
    raise ValueError(
        f"cannot tell what {str(source)!r} is: wanted {GENERATED!r}, {GENERATED_VARIANTS!r}, a folder with "
        "metadata.jsonl, .csv or .parquet (flat or in train/ validation/ test/), .parquet or .arrow files, a "
        "save_to_disk folder, FashionGen's .h5 files, FashionIQ's folder, .tar shards, or a Hub dataset."
    )


def _one_split(tables: Tables, split: str, source) -> datasets.Dataset | RowStream:
    if split not in tables:
        raise ValueError(f"{str(source)!r} has no split {split!r}; it has {', '.join(map(repr, tables))}.")
    return tables[split]


# --------------------------------------------------------------------------------------------- schema
def _to_schema(rows: datasets.Dataset, named: dict[str, str | None], source) -> datasets.Dataset:
    """Columns renamed and cast to the schema; what stood under a schema name before is kept as source_<name>."""
    found = {role: _find_column(rows, role, column, source) for role, column in named.items()}
    for role, column in found.items():
        if column == role:
            continue
        if role in rows.column_names:
            rows = rows.rename_column(role, f"source_{role}")
            found = {r: f"source_{role}" if c == role else c for r, c in found.items()}
        if column in [other for r, other in found.items() if r != role] or column in ROLES:
            rows = rows.add_column(role, _strings(rows, column))
        else:
            rows = rows.rename_column(column, role)
    for role in ("text", "item_id"):
        kind = rows.features[role]
        if not isinstance(kind, datasets.Value):
            raise ValueError(
                f"column {found[role]!r} of {str(source)!r}, read as {role}, holds {kind}; wanted one string a row. "
                f"Name another by `{role}_column`, or flatten it first."
            )
        if kind.dtype != "string":
            rows = rows.cast_column(role, datasets.Value("string"))
    if not isinstance(rows.features["image"], datasets.Image):
        _refuse_foreign_photos(rows, found["image"], source)
        rows = rows.cast_column("image", datasets.Image())
    levels = CATEGORY_LEVELS if CATEGORY_LEVELS.keys() <= set(rows.column_names) else {}
    if not set(levels.values()) & set(rows.column_names):
        rows = rows.rename_columns(levels)
    return rows.select_columns([*ROLES, *(name for name in rows.column_names if name not in ROLES)])


def _refuse_foreign_photos(rows: datasets.Dataset, column: str, source) -> None:
    """A table that somebody else wrote may not name this machine's files as its photos."""
    path, kind = Path(source).expanduser(), rows.features["image"]
    if not isinstance(kind, datasets.Value) or (path.exists() and not (path.suffix == ".parquet" or path.is_dir())):
        return
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return  # The user's own save_to_disk keeps the absolute paths that a folder of photos has.
    base = None if not path.exists() else path if path.is_dir() else path.parent
    refuse_foreign(_strings(rows, "image"), base, f"column {column!r} of {str(source)!r}")


def _stream_to_schema(stream: RowStream, named: dict[str, str | None], source) -> RowStream:
    """`_to_schema` for streams: what it does to a table without rows tells what to do with each row."""
    empty = datasets.Dataset.from_dict({name: [] for name in stream.features}, features=stream.features)
    schema = _to_schema(empty, named, source).features
    origin = {role: _find_column(empty, role, column, source) for role, column in named.items()}
    renamed = {new: old for old, new in CATEGORY_LEVELS.items()} | {f"source_{role}": role for role in ROLES}
    for name in schema:
        if name not in origin:
            origin[name] = name if name in stream.features else renamed[name]
    return with_columns(stream, schema, {name: origin[name] for name in schema})


def _find_column(rows: datasets.Dataset, role: str, column: str | None, source) -> str:
    """The column named, else the schema's own name in any case (`item_ID`)."""
    if column is None:
        same = [name for name in rows.column_names if name.lower() == role]
        column = role if role in same or not same else same[0]
    if column in rows.column_names:
        return column
    hint = " (the text column itself, if photos with equal texts are one item)" if role == "item_id" else ""
    raise ValueError(
        f"{str(source)!r} has no column {column!r} for {role}; its columns are {', '.join(rows.column_names)}. "
        f"Say which one it is by `{role}_column`{hint}."
    )


def _column(rows: datasets.Dataset, name: str) -> pa.Array:
    """One column as Arrow, rows in order; no photo is touched."""
    return rows.select_columns([name]).with_format("arrow")[:].column(name).combine_chunks()


def _strings(rows: datasets.Dataset, name: str) -> list[str | None]:
    return _column(rows, name).to_pylist()


def _known(where: Mapping[str, object], columns) -> Mapping[str, object]:
    for column in where:
        if column not in columns:
            raise ValueError(f"`where` names column {column!r}; the columns are {', '.join(columns)}.")
    return where


def _where_mask(rows: datasets.Dataset, split: str, where: Mapping[str, object]) -> np.ndarray:
    """(rows,) bool: whose columns have the values wanted."""
    keep = np.ones(len(rows), dtype=bool)
    for column, value in _known(where, rows.column_names).items():
        values = _strings(rows, column)
        keep &= np.array([one == value or str(one) == str(value) for one in values], dtype=bool)
        if len(rows) and not keep.any():
            seen = sorted({str(one) for one in values})[:10]
            logger.warning("split %s: no row with %s = %r; some of its values: %s", split, column, value, seen)
    return keep


def _keep(rows: datasets.Dataset, split: str, where: Mapping[str, object], min_words: int) -> datasets.Dataset:
    """Rows that `where` wants and that have a text and an item."""
    keep = _where_mask(rows, split, where)
    texts = np.array([len(split_words(text or "")) >= max(min_words, 1) for text in _strings(rows, "text")], bool)
    items = np.array([bool(item and item.strip()) for item in _strings(rows, "item_id")], bool)
    for good, what in ((texts, f"a text of at least {max(min_words, 1)} word(s)"), (items, "an item id")):
        if (keep & ~good).any():
            logger.warning("split %s: dropped %d rows without %s", split, int((keep & ~good).sum()), what)
        keep &= good
    return rows if keep.all() else rows.select(np.flatnonzero(keep))


# ---------------------------------------------------------------------------------------------- index
def fold_text(text: str) -> str:
    """The form in which texts are compared: whitespace folded, lower case.

    Example:
        >>> fold_text(" Red  shirt ")
        'red shirt'
    """
    return " ".join(text.split()).lower()


@dataclass(frozen=True)
class CorpusIndex:
    """Items and texts of a dataset's rows as numbers, in order of first appearance.

    Attributes:
        item_ids: (rows,) int64.
        text_ids: (rows,) int64; texts that are equal after `fold_text` share one.
        texts: the distinct texts, as first seen; `text_ids` index it.
    """

    item_ids: np.ndarray
    text_ids: np.ndarray
    texts: list[str]

    @classmethod
    def from_dataset(cls, dataset: datasets.Dataset) -> CorpusIndex:
        """Number a dataset that follows the schema; no photo is decoded."""
        items: dict[str, int] = {}
        folded: dict[str, int] = {}
        texts: list[str] = []
        text_ids = []
        for text in _strings(dataset, "text"):
            number = folded.setdefault(fold_text(text), len(texts))
            if number == len(texts):
                texts.append(text)
            text_ids.append(number)
        item_ids = [items.setdefault(item, len(items)) for item in _strings(dataset, "item_id")]
        return cls(np.array(item_ids, dtype=np.int64), np.array(text_ids, dtype=np.int64), texts)

    @property
    def item_of_text(self) -> np.ndarray:
        """(texts,) int64: the item of each text's first row."""
        first = np.unique(self.text_ids, return_index=True)[1]
        return self.item_ids[first]


def fingerprint(dataset: datasets.Dataset) -> str:
    """Name of a dataset's contents: datasets' own fingerprint, the number of rows, a hash of item ids and texts.

    The parts are joined by "-". The last two stay the same when a folder moves to another place; the first one
    covers the other columns and the photos' places too.
    """
    digest = hashlib.sha256()
    for item, text in zip(_strings(dataset, "item_id"), _strings(dataset, "text"), strict=True):
        digest.update(f"{len(item)}:{item}{len(text)}:{text}".encode())
    return f"{dataset._fingerprint}-{len(dataset)}-{digest.hexdigest()[:16]}"
