"""Photos that stay in their tar shard: an image cell names the place, and whoever needs the photo reads it there.

A cell is {"bytes": None, "path": "tarphoto://1536+48213@/data/train-0000.tar!/set/0001.png"}: offset and size in bytes,
shard, member. So rows of shards are rows like any others: selected, pickled to workers, saved.
"""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path
from urllib.parse import quote, unquote

import datasets
import fsspec
import numpy as np
import pyarrow.compute as pc

SCHEME = "tarphoto"
PLACE = re.compile(rf"^{SCHEME}://(?P<offset>\d+)\+(?P<size>\d+)@(?P<shard>[^!]+)!/(?P<member>.+)$")


def tar_place(shard: str | Path, offset: int, size: int, member: str) -> str:
    """The path of a cell whose photo is `size` bytes from `offset` on in an uncompressed tar file (absolute path).

    Example:
        >>> tar_place("/data/a#1.tar", 1536, 213, "set/1.png")
        'tarphoto://1536+213@/data/a%231.tar!/set/1.png'
    """
    # Quoted, since fsspec takes "*" for a pattern and "::" for a chain.
    return f"{SCHEME}://{offset}+{size}@{quote(Path(shard).as_posix())}!/{quote(member)}"


def is_tar_place(source: str | bytes | None) -> bool:
    """Whether what a cell holds is a path of `tar_place`."""
    return isinstance(source, str) and source.startswith(f"{SCHEME}://")


def read_tar_place(path: str) -> bytes:
    """The bytes of the photo, by one look into its shard.

    Raises:
        ValueError: a path that names no place.
        OSError: the shard is gone, or ends before the photo does.
    """
    shard, offset, size, member = _parts(path)
    with open(shard, "rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) < size:
        raise OSError(f"{shard} ends inside {member!r}: it changed since it was loaded. Load the corpus again.")
    return content


def shard_of(path: str) -> str:
    """The shard that a path of `tar_place` names; ValueError where it names none."""
    return _parts(path)[0]


def _parts(path: str) -> tuple[str, int, int, str]:
    place = PLACE.match(path)
    if place is None:
        raise ValueError(f"{path!r} names no photo in a tar shard; wanted {SCHEME}://OFFSET+SIZE@SHARD!/MEMBER.")
    return unquote(place["shard"]), int(place["offset"]), int(place["size"]), unquote(place["member"])


def with_bytes(cell: dict | None) -> dict | None:
    """An undecoded cell that holds the photo itself where it named a place in a shard; any other as it is.

    A photo that cannot be read there leaves the cell as it is, for the reader of the cell to say so.
    """
    if cell is None or cell.get("bytes") is not None or not is_tar_place(cell.get("path")):
        return cell
    try:
        return {"bytes": read_tar_place(cell["path"]), "path": cell["path"].rpartition("/")[2]}
    except (OSError, ValueError):
        return cell


def shards_of(rows: datasets.Dataset) -> np.ndarray | None:
    """(rows,) int64: the shard that each row's photo lies in, -1 for none; None where no photo lies in any.

    Only the paths are read, even where the table holds photos.
    """
    cells = rows.select_columns(["image"]).cast_column("image", datasets.Image(decode=False)).flatten()
    paths = cells.select_columns(["image.path"]).with_format("arrow")[:].column("image.path").combine_chunks()
    shards = pc.struct_field(pc.extract_regex(paths, PLACE.pattern), "shard")
    if shards.null_count == len(shards):
        return None
    return shards.dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


def decode_tar_places() -> None:
    """Let `datasets` decode such cells in this process and those forked from it: `rows[0]["image"]` is a photo."""
    fsspec.register_implementation(SCHEME, TarPhotos, clobber=True)


class TarPhotos(fsspec.AbstractFileSystem):
    """What fsspec, and by it `datasets`, opens such paths with; read-only, and lists nothing."""

    protocol = SCHEME

    def info(self, path: str, **kwargs) -> dict:
        """Name, size and type, told by the path alone."""
        path = self._strip_protocol(path)
        return {"name": path, "size": _parts(f"{SCHEME}://{path}")[2], "type": "file"}

    def _open(self, path: str, mode: str = "rb", **kwargs) -> BytesIO:
        if mode != "rb":
            raise ValueError(f"photos in tar shards can only be read; mode is {mode!r}, wanted 'rb'.")
        return BytesIO(read_tar_place(f"{SCHEME}://{path}"))
