"""Folders of photos with metadata.{jsonl,csv,parquet}: reading and writing."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet

from .processing_syncmask import to_rgb
from .safe_paths import inside

SPLITS = ("train", "validation", "test")
ALIASES = {"training": "train", "val": "validation", "valid": "validation", "dev": "validation"}
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
MADE = "corpus.json"
"""What `syncmask corpus make` writes beside the splits: how to draw the same corpus again."""


def canonical_split(name: str) -> str:
    """A split's name as this project spells it ("val" is "validation"); unknown names come back as they are."""
    return ALIASES.get(name.lower(), name.lower())


def split_of_file(file: Path, root: Path) -> str:
    """The split that a file's name begins with, else its folder's name, else "all" (and "all" for the root itself).

    Example:
        >>> split_of_file(Path("set/val-00000-of-00002.parquet"), Path("set"))
        'validation'
    """
    if file == root:
        return "all"
    for name in (re.split(r"[-_.]", file.name)[0], file.parent.name if file.parent != root else ""):
        if canonical_split(name) in SPLITS:
            return canonical_split(name)
    return "all"


def _metadata_file(folder: Path) -> Path | None:
    found = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{folder} holds {' and '.join(file.name for file in found)}; wanted one of them.")
    return found[0] if found else None


def _split_folders(root: Path) -> dict[str, Path]:
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and canonical_split(path.name) in SPLITS]
    return {canonical_split(path.name): path for path in folders if _metadata_file(path)}


def holds_metadata(root: Path) -> bool:
    """Whether a folder is one for `read_folder`: metadata in it or in its train/ validation/ test/ folders."""
    return bool(_metadata_file(root) or _split_folders(root))


def read_folder(root: Path) -> dict[str, datasets.Dataset]:
    """Tables by split ("all" where the folder has none); photos are known by their paths, not opened.

    Metadata hold one row a photo with its `file_name`, relative to the metadata file. Values of CSV files stay the
    strings they are ("None", "NA" and "001" included).

    Raises:
        ValueError: metadata without rows or without `file_name`, rows that are not readable (file and line named),
            or a `file_name` that leads out of the metadata's folder (absolute, `..`, a link).
    """
    top = _metadata_file(root)
    files = {"all": top} if top else {name: _metadata_file(path) for name, path in _split_folders(root).items()}
    return {name: _read_metadata(file) for name, file in files.items()}


def _read_metadata(file: Path) -> datasets.Dataset:
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    table = readers[file.suffix](file)
    if "file_name" not in table.column_names:
        raise ValueError(
            f"{file} has no column file_name (a photo's path relative to it); it has {table.column_names}."
        )
    if not table.num_rows:
        raise ValueError(f"{file} has no rows.")
    names = [None if name is None else str(name) for name in table.column("file_name").to_pylist()]
    paths = inside(file.parent, names, str(file))
    if "image" in table.column_names:
        table = table.rename_columns(["source_image" if name == "image" else name for name in table.column_names])
    rows = datasets.Dataset(table.add_column(0, "image", pa.array(paths, pa.string())))
    return rows.cast_column("image", datasets.Image())


def _read_jsonl(file: Path) -> pa.Table:
    rows = []
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:  # No JSON, or no UTF-8.
                raise ValueError(f"{file}, line {number} is no JSON: {error}. Mend or remove the line.") from error
            if not isinstance(row, dict):
                raise ValueError(f"{file}, line {number} holds a {type(row).__name__}; wanted an object {{...}}.")
            rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)  # Not every line names every column.
    return pa.table({name: _array(file, name, [row.get(name) for row in rows]) for name in names})


def _read_parquet(file: Path) -> pa.Table:
    try:
        return pyarrow.parquet.read_table(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} cannot be read as parquet: {error}. Write or download it again.") from error


def _array(file: Path, name: str, values: list) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        kinds = sorted({type(value).__name__ for value in values if value is not None})
        raise ValueError(f"{file}: column {name!r} mixes {', '.join(kinds)}; wanted one kind ({error}).") from error


def _read_csv(file: Path) -> pa.Table:
    # Not pyarrow's or pandas's reader: they turn "NA", "None" and "" into nulls and "001" into 1.
    with open(file, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"{file}, line {reader.line_num}: wanted {len(reader.fieldnames)} fields.")
            rows.append(row)
    return pa.table({name: pa.array([row[name] for row in rows], pa.string()) for name in reader.fieldnames or []})


def write_folder(corpus: datasets.DatasetDict, root: Path, *, on_photo: Callable[[], None] = lambda: None) -> None:
    """Write a corpus as a folder that `read_folder` reads: split/NNNNNN.png and split/metadata.jsonl.

    Columns beside the photo go to the metadata as they are, ground truth included.

    Args:
        corpus: splits in the schema of `load_corpus`.
        root: folder; it must be absent or empty.
        on_photo: called after each photo (for a progress bar).

    Raises:
        FileExistsError: the folder holds something.
    """
    root = Path(root)
    if root.exists() and any(root.iterdir()):
        raise FileExistsError(f"{root} is not empty; name a new folder or remove its files first.")
    for split, rows in corpus.items():
        if not len(rows):
            continue
        (root / split).mkdir(parents=True)
        rows = rows.with_format(None)
        with open(root / split / "metadata.jsonl", "w", encoding="utf-8") as lines:
            for number, row in enumerate(rows):
                name = f"{number:06d}.png"
                (root / split / name).write_bytes(_png(row.pop("image")))
                lines.write(json.dumps({"file_name": name, **row}, ensure_ascii=False) + "\n")
                on_photo()


def _png(image) -> bytes:
    buffer = BytesIO()
    to_rgb(image).save(buffer, "PNG")
    return buffer.getvalue()
