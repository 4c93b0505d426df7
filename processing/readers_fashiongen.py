"""FashionGen's HDF5 files: 256 x 256 photos as bytes, texts in latin-1, one row a photo.

How many rows, products or classes there are is counted in the files, never assumed: a misprinted count of the
validation rows (35,528) went from paper to paper. Needs h5py (the extra `fashiongen`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from .readers_folder import canonical_split
from .streams import RowStream, row_ranges, stamp_of

SUFFIXES = (".h5", ".hdf5")
REQUIRED = ("input_image", "input_description", "input_productID")
TEXTS = tuple(
    "brand category composition concat_description department description gender name season subcategory".split()
)
BLOCK_BYTES = 64 * 2**20
LARGEST_BLOCK = 512 * 2**20

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "text": datasets.Value("string"),
        "item_id": datasets.Value("string"),
        "view": datasets.Value("string"),
        **{name: datasets.Value("string") for name in TEXTS},
        "name_and_description": datasets.Value("string"),
        "price_usd": datasets.Value("float32"),
        "source_row": datasets.Value("int64"),
    }
)


def fashiongen_files(path: Path) -> dict[str, Path]:
    """HDF5 files by split: one file, or those of a folder; a file's name tells its split. {} where there is none.

    Raises:
        ValueError: two files of one split.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    else:
        files = [path] if path.suffix.lower() in SUFFIXES and path.is_file() else []
    found: dict[str, Path] = {}
    for file in files:
        split = _split_of(file)
        if split in found:
            raise ValueError(f"{found[split]} and {file} both look like split {split!r}; keep one, or pass one file.")
        found[split] = file
    return found


def _split_of(file: Path) -> str:
    for part in file.stem.lower().replace("-", "_").split("_"):
        if canonical_split(part) in ("train", "validation", "test"):
            return canonical_split(part)
    return "all"


def open_fashiongen(path: Path) -> dict[str, RowStream]:
    """Streams by split; the text is the description, the item the product, the view the pose.

    Other texts are columns too, for `--text-column`: name, concat_description, name_and_description ("name. text").

    Raises:
        ImportError: h5py is not installed.
        ValueError: a file that is cut short or no HDF5, lacks a key, or whose keys differ in length.
    """
    return {split: _stream(file) for split, file in fashiongen_files(path).items()}


def _stream(path: Path) -> RowStream:
    with FashionGenFile(path) as file:
        rows, block = len(file), file.block_rows
    piece = block * max(1, 1024 // block)
    pieces = tuple((str(path), start, stop) for start, stop in row_ranges(rows, piece))
    return RowStream(FEATURES, pieces, read_rows, stamp_of([path]), rows)


def read_rows(path: str, start: int, stop: int) -> Iterator[dict]:
    """Rows of one file, in the schema; photos are PIL images, None where their place in the file is damaged."""
    with FashionGenFile(Path(path)) as file:
        yield from file.rows(start, stop)


class FashionGenFile:
    """One HDF5 file. The handle belongs to the process that uses it: a copy sent to a worker opens its own.

    Example:
        >>> FashionGenFile(Path("fashiongen_256_256_train.h5"))[0]["text"]  # doctest: +SKIP
        'Slim-fit jeans in indigo...'
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._handle, self._owner = None, None

    def __enter__(self) -> FashionGenFile:
        return self

    def __exit__(self, *_) -> None:
        if self._handle is not None and self._owner == os.getpid():
            self._handle.close()
        self._handle = None

    def __getstate__(self) -> dict:
        return {"path": self.path, "_handle": None, "_owner": None}

    @property
    def handle(self):
        """The open file (an h5py.File), this process's own."""
        if self._handle is None or self._owner != os.getpid():
            # HDF5 keeps its place in the file in the handle: two forked workers with one handle read garbage.
            self._handle, self._owner = _open(self.path), os.getpid()
        return self._handle

    def __len__(self) -> int:
        return len(self.handle["input_image"])

    def __getitem__(self, row: int) -> dict:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} rows of {self.path}")
        row %= len(self)
        return next(self.rows(row, row + 1))

    @property
    def block_rows(self) -> int:
        """Rows to read at once: whole chunks of the photos, so that each chunk is unpacked once."""
        photos = self.handle["input_image"]
        row_bytes = max(int(np.prod(photos.shape[1:])), 1)
        chunk = photos.chunks[0] if photos.chunks else 1
        block = chunk * max(1, BLOCK_BYTES // (row_bytes * chunk))
        return min(block, max(1, LARGEST_BLOCK // row_bytes))

    def rows(self, start: int, stop: int) -> Iterator[dict]:
        """The rows from start to stop, in the file's order, a block in memory at a time."""
        block = self.block_rows
        for first in range(start, stop, block):
            last = min(first + block, stop)
            columns = self._columns(first, last)
            for offset, photo in enumerate(self._photos(first, last)):
                yield _row(photo, {name: values[offset] for name, values in columns.items()}, first + offset)

    def _columns(self, first: int, last: int) -> dict[str, list]:
        keys = [key for key in self.handle if key.startswith("input_") and key != "input_image"]
        return {key[len("input_") :]: [_value(cell) for cell in self.handle[key][first:last]] for key in keys}

    def _photos(self, first: int, last: int) -> Iterator[Image.Image | None]:
        photos = self.handle["input_image"]
        try:
            yield from map(Image.fromarray, photos[first:last])
        except OSError:  # A damaged chunk: the rows beside it are still good.
            for row in range(first, last):
                yield _one_photo(photos, row)


def _one_photo(photos, row: int) -> Image.Image | None:
    try:
        return Image.fromarray(photos[row])
    except OSError:
        return None


def _row(photo: Image.Image | None, values: dict[str, Any], row: int) -> dict:
    texts = {name: values.get(name) for name in TEXTS}
    both = [part.rstrip(". ") for part in (texts["name"], texts["description"]) if part]
    return {
        "image": photo,
        "text": texts["description"],
        "item_id": str(values["productID"]),
        "view": values.get("pose"),
        **texts,
        "name_and_description": ". ".join(both),
        "price_usd": values.get("msrpUSD"),
        "source_row": row,
    }


def _value(cell) -> Any:
    """A cell (1,) or () as a Python value; bytes are latin-1 (utf-8 fails at the first accent)."""
    value = cell.reshape(-1)[0] if isinstance(cell, np.ndarray) else cell
    if isinstance(value, bytes):
        return value.decode("latin-1").strip("\x00 ")
    return value.item() if isinstance(value, np.generic) else value


def _open(path: Path):
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"{path} is HDF5; reading it needs h5py: pip install 'syncmask[fashiongen]'.") from error
    try:
        handle = h5py.File(path, "r")
    except OSError as error:
        size = path.stat().st_size if path.is_file() else 0
        raise ValueError(
            f"{path} ({size:,} bytes) cannot be opened as HDF5: {error}. It is cut short or no HDF5 file; "
            "download it again and compare its size."
        ) from error
    _check_keys(handle, path)
    return handle


def _check_keys(handle, path: Path) -> None:
    missing = [key for key in REQUIRED if key not in handle]
    if missing:
        raise ValueError(
            f"{path} lacks the keys {', '.join(missing)}; it has {', '.join(handle)}. "
            "Wanted is FashionGen's layout: input_image, input_description, input_productID and more."
        )
    lengths = {key: len(handle[key]) for key in handle if key.startswith("input_")}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{path}: its keys differ in length ({lengths}); it is damaged, download it again.")
    shape, kind = handle["input_image"].shape, handle["input_image"].dtype
    if len(shape) != 4 or shape[-1] != 3 or kind != np.uint8:
        raise ValueError(f"{path}: input_image is {shape} {kind}; wanted (rows, height, width, 3) uint8.")
