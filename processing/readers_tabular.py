"""Tables: parquet and Arrow files, `save_to_disk` folders, datasets of the Hub."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import pyarrow as pa

from syncmask.processing.readers_folder import SPLITS, canonical_split


def read_parquet(path: Path) -> dict[str, datasets.Dataset]:
    """One parquet file ("all"), or a folder of them: train-00000-of-00002.parquet, train.parquet, train/*.parquet.

    Photos are embedded (bytes, or {"bytes", "path"}) or paths relative to the folder.

    Raises:
        ValueError: a file that is no parquet.
    """
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    groups: dict[str, list[str]] = {}
    for file in files:
        groups.setdefault(_split_of(file, path), []).append(str(file))
    base = path if path.is_dir() else path.parent
    try:
        tables = {name: datasets.Dataset.from_parquet(group) for name, group in groups.items()}
    except (pa.ArrowInvalid, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {error.__cause__ or error}") from error
    return {name: _absolute_paths(rows, base) for name, rows in tables.items()}


def _split_of(file: Path, root: Path) -> str:
    """The split that a file's name begins with, else its folder's name, else "all"."""
    if file == root:
        return "all"
    for name in (re.split(r"[-_.]", file.name)[0], file.parent.name if file.parent != root else ""):
        if canonical_split(name) in SPLITS:
            return canonical_split(name)
    return "all"


def _absolute_paths(rows: datasets.Dataset, base: Path) -> datasets.Dataset:
    """Columns of relative paths to files beside the table, made absolute, whatever the working folder."""
    for name, kind in rows.features.items():
        if not isinstance(kind, datasets.Value) or kind.dtype not in ("string", "large_string") or not len(rows):
            continue
        first = rows[0][name]
        if not first or not re.search(r"\.(jpe?g|png|webp|gif|bmp|tiff?)$", first, re.IGNORECASE):
            continue
        if (base / first).is_file() and not Path(first).is_absolute():
            values = rows.select_columns([name]).with_format("arrow")[:].column(name).to_pylist()
            values = [None if value is None else str(base.resolve() / value) for value in values]
            rows = rows.remove_columns(name).add_column(name, values)
    return rows


def read_saved(path: Path) -> dict[str, datasets.Dataset]:
    """A folder of `save_to_disk` or one .arrow file, memory-mapped."""
    saved = datasets.Dataset.from_file(str(path)) if path.suffix == ".arrow" else datasets.load_from_disk(path)
    return dict(saved) if isinstance(saved, datasets.DatasetDict) else {"all": saved}


def read_hub(name: str) -> dict[str, datasets.Dataset]:
    """A dataset of the Hub, by its name.

    Raises:
        FileNotFoundError: neither a path here nor a dataset that can be reached.
    """
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise FileNotFoundError(f"{name!r} does not exist. Check the path.")
    try:
        found = datasets.load_dataset(name)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise FileNotFoundError(
            f"{name!r} is no file or folder here and could not be loaded from the Hub "
            f"({type(error).__name__}: {error}). If it is gated, log in and accept its terms; or download it and "
            "pass the folder of its parquet files."
        ) from error
    return dict(found)
