"""Tables: parquet and Arrow files, `save_to_disk` folders, datasets of the Hub."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute

from .readers_folder import split_of_file
from .safe_paths import inside, refuse_climbing

PHOTO_NAME = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?)$", re.IGNORECASE)
PLAN = "convert.json"
"""What `syncmask corpus convert` writes beside its files: which there must be."""
ASIDE = "galleries"
"""Folder of parquet files that are no rows of the corpus (FashionIQ's galleries)."""
ADDRESSES = ("http://", "https://", "hf://", "s3://", "gs://")
"""Where a table may say that its photos are, beside its own folder."""


def parquet_files(path: Path) -> list[Path]:
    """One parquet file, or those of a folder, sorted; without the galleries that a conversion puts aside."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*.parquet") if ASIDE not in file.relative_to(path).parts[:-1])


def read_parquet(path: Path) -> dict[str, datasets.Dataset]:
    """One parquet file ("all"), or a folder of them: train-00000-of-00002.parquet, train.parquet, train/*.parquet.

    Photos are embedded (bytes, or {"bytes", "path"}) or paths relative to the folder.

    Raises:
        ValueError: a file that is no parquet, a photo's path that leads out of the folder, or a conversion that was
            never finished.
    """
    if path.is_dir():
        _refuse_unfinished(path)
    groups: dict[str, list[str]] = {}
    for file in parquet_files(path):
        groups.setdefault(split_of_file(file, path), []).append(str(file))
    base = path if path.is_dir() else path.parent
    try:
        tables = {name: datasets.Dataset.from_parquet(group) for name, group in groups.items()}
    except (pa.ArrowInvalid, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {error.__cause__ or error}") from error
    return {name: _paths_inside(rows, base) for name, rows in tables.items()}


def _refuse_unfinished(folder: Path) -> None:
    if not (folder / PLAN).is_file():
        return
    plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    lacking = [name for name in plan["files"] if not (folder / name).is_file()]
    if lacking:
        raise ValueError(
            f"{folder} is a conversion that was never finished: {len(lacking)} of {len(plan['files'])} files are "
            f"not there, such as {lacking[0]}. Run the same `syncmask corpus convert` again; it goes on where it was."
        )


def _paths_inside(rows: datasets.Dataset, base: Path) -> datasets.Dataset:
    """Columns of photos' paths, made absolute, whatever the working folder; none may lead out of the base."""
    for name, kind in rows.features.items():
        if isinstance(kind, datasets.Image) or _is_photo_struct(kind):
            rows = _struct_inside(rows, name, kind, base)
        elif isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string"):
            rows = _names_inside(rows, name, base)
    return rows


def _is_photo_struct(kind) -> bool:
    return isinstance(kind, dict) and set(kind) == {"bytes", "path"}


def _names_inside(rows: datasets.Dataset, name: str, base: Path) -> datasets.Dataset:
    """A column of file names beside the table, told by its first value; any other column stays as it is."""
    first = rows[0][name] if len(rows) else None
    if not first or not PHOTO_NAME.search(first) or Path(first).is_absolute() or not (base / first).is_file():
        return rows
    column = rows.select_columns([name]).with_format("arrow")[:].column(name).to_pylist()
    values = inside(base, column, f"column {name!r} of {base}")
    return rows.remove_columns(name).add_column(name, values)


def refuse_foreign(names: list[str | None], base: Path | None, where: str) -> None:
    """Raise ValueError where a column that is to be photos names files outside the table's folder.

    Args:
        names: as they stand after `read_parquet`, which made those inside absolute.
        base: the table's folder; None for a dataset of the Hub, which has none.
        where: what the message calls the column.
    """
    root = None if base is None else base.resolve()
    for name in names:
        if not name or name.startswith(ADDRESSES):
            continue
        if "://" in name:  # Such as file:// or tarphoto://, by which `datasets` would open files of this machine.
            raise ValueError(f"{where} names {name!r}; wanted files in its folder or {', '.join(ADDRESSES)} addresses.")
        if root is None or root not in Path(name).parents:
            refuse_climbing(name, where)


def _struct_inside(rows: datasets.Dataset, name: str, kind, base: Path) -> datasets.Dataset:
    """Photos that are given by their path alone; where the bytes are there the path is only a name."""
    paths = []
    for cells in rows.data.column(name).chunks:  # As they lie in the file: the photos' bytes are not touched.
        lacking = pa.compute.is_null(cells.field("bytes"))
        paths += pa.compute.if_else(lacking, cells.field("path"), None).to_pylist()
    if not any(paths):
        return rows
    outer = iter(inside(base, paths, f"column {name!r} of {base}"))

    def absolute(cell: dict | None) -> dict | None:
        path = next(outer)
        return cell if path is None else {"bytes": None, "path": path}

    cells = rows.with_format(None).cast_column(name, datasets.Image(decode=False))[name]
    return rows.remove_columns(name).add_column(name, [absolute(cell) for cell in cells], feature=kind)


def read_saved(path: Path) -> dict[str, datasets.Dataset]:
    """A folder of `save_to_disk` or one .arrow file, memory-mapped."""
    try:
        saved = datasets.Dataset.from_file(str(path)) if path.suffix == ".arrow" else datasets.load_from_disk(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} cannot be read as Arrow: {error}. Write or download it again.") from error
    return dict(saved) if isinstance(saved, datasets.DatasetDict) else {"all": saved}


def read_hub(name: str) -> dict[str, datasets.Dataset]:
    """A dataset of the Hub, by its name.

    Raises:
        FileNotFoundError: neither a path here nor a dataset that can be reached; the message says which of gated,
            absent and unreachable it is, and how to pass a local copy.
    """
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise FileNotFoundError(f"{name!r} does not exist. Check the path.")
    try:
        found = datasets.load_dataset(name)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise FileNotFoundError(
            f"{name!r} is no file or folder here, and from the Hub: {_why_not(error)} "
            f"({type(error).__name__}: {error}). Or have somebody who can reach it download its parquet files "
            f"(if it is gated, once its terms are accepted), and pass their folder instead of {name!r}."
        ) from error
    return dict(found)


def _why_not(error: Exception) -> str:
    """Which it is, in a sentence, with the way out."""
    causes, cause = [], error
    while cause is not None and len(causes) < 10:
        causes.append(f"{type(cause).__name__} {cause}".lower())
        cause = cause.__cause__ or cause.__context__
    story = " ".join(causes)
    if "gated" in story:
        return "it is gated. Accept its terms on its page, log in (hf auth login) and try again"
    if "offline" in story or "connect" in story or "timeout" in story:
        return "the Hub cannot be reached from here. Go online, or unset HF_HUB_OFFLINE"
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return "there is no such dataset, or it is private. Check its name, or log in (hf auth login)"
    return "it could not be loaded"
