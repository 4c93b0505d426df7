"""Tar shards as WebDataset writes them: members of one sample share a name up to its first dot (`0001.jpg 0001.json`).

Nothing is unpacked or copied. For training, shards are read once for their headers and texts, and a photo's cell says
where in its shard it lies (`tar_photos`); conversion and check read them from end to end.
"""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import datasets

from .readers_folder import split_of_file
from .safe_paths import refuse_climbing
from .streams import RowStream, stamp_of
from .tar_photos import tar_place

logger = logging.getLogger(__name__)

PHOTOS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
TEXTS = ("txt", "text", "caption")
SUFFIXES = (".tar", ".tar.gz", ".tgz")
PEEKED = 100  # samples whose JSON tells the columns
LARGEST_MEMBER = 256 * 2**20


class CutShort(Exception):
    """A shard ends before its end mark; the message says where."""


def shard_files(path: Path) -> dict[str, list[Path]]:
    """Tar files by split, sorted; one file, or those of a folder and its train/ validation/ test/. {} if none."""
    if path.is_file():
        return {"all": [path]} if path.name.endswith(SUFFIXES) else {}
    groups: dict[str, list[Path]] = {}
    for file in sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES)):
        groups.setdefault(split_of_file(file, path), []).append(file)
    return groups


def open_shards(path: Path, *, in_place: bool = False) -> dict[str, RowStream]:
    """Streams by split, one piece a shard. See `read_shard` for the columns and `in_place`.

    Raises:
        ValueError: a shard that is no tar, or a member that leads out of its folder.
    """
    return {split: _stream(files, in_place) for split, files in shard_files(path).items()}


def _stream(files: list[Path], in_place: bool) -> RowStream:
    columns = shard_columns(files[0])
    features = {"image": datasets.Image(), **{name: datasets.Value("string") for name in columns}}
    pieces = tuple((str(file.absolute()), columns, in_place) for file in files)
    return RowStream(datasets.Features(features), pieces, read_shard, stamp_of(files))


def shard_columns(file: Path) -> tuple[str, ...]:
    """Columns beside the photo: text and item_id, then the JSON keys of the shard's first samples."""
    keys: dict[str, None] = dict.fromkeys(("text", "item_id"))
    for sample in islice(_samples(file, in_place=False), PEEKED):
        keys |= dict.fromkeys(key for key in _fields(sample) if key != "image")
    return tuple(keys)


def read_shard(file: str, columns: Sequence[str], in_place: bool = False) -> Iterator[dict]:
    """Rows of one shard: image (undecoded cell), then `columns` as strings, None where a sample lacks one.

    The text is the member `.txt`, else the JSON's `text` or `caption`; the item is the JSON's `item_id` in any case,
    else the sample's own name. Samples without a photo are skipped and counted in a warning. What follows the place
    where a shard is cut short is lost, with a warning, and so is the last sample before it, which may lack members.

    Args:
        in_place: photos are passed over, and their cells say where they lie. Those of a compressed shard, which
            cannot be read from the middle, are read all the same, with a warning.

    Raises:
        ValueError: no tar at all, or a member that leads out of its folder, is a link, sparse or too large.
    """
    without = 0
    for sample in _samples(Path(file), in_place):
        fields = _fields(sample)
        if fields["image"] is None:
            without += 1
        else:
            yield {name: fields.get(name) for name in ("image", *columns)}
    if without:
        logger.warning("%s: skipped %d samples without a photo", file, without)


def _samples(file: Path, in_place: bool) -> Iterator[dict]:
    """Groups of members {"name", "members": {suffix: content}} in the shard's order."""
    name, members = None, {}
    try:
        for member_name, content in _members(file, in_place):
            folder, _, base = member_name.rpartition("/")
            stem, _, suffix = base.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if key != name and members:
                yield {"name": name, "members": members}
                members = {}
            name = key
            members[suffix.lower()] = content
    except CutShort as cut:
        logger.warning("%s is cut short (%s); its last samples are lost", file, cut)
        return
    if members:
        yield {"name": name, "members": members}


def _members(file: Path, in_place: bool) -> Iterator[tuple[str, bytes | str]]:
    """Names and contents; in place a photo's content is the path of its cell."""
    try:
        shard = tarfile.open(file, "r:*", encoding="utf-8", errors="replace")
    except (tarfile.TarError, OSError, EOFError) as error:
        reason = str(error).splitlines()[-1].removeprefix("- method tar: ")
        raise ValueError(f"{file} cannot be read as a tar shard: {reason}. Download or pack it again.") from error
    with shard:
        plain, length = isinstance(shard.fileobj, io.BufferedReader), file.stat().st_size
        if in_place and not plain:
            logger.warning("%s is compressed: its photos are copied to the cache. gunzip it to spare that.", file)
        while (member := _next(shard)) is not None:
            shard.members = []  # tarfile remembers every header it met; a stream must not grow.
            _refuse(member, file)
            base = member.name.rpartition("/")[2]
            if not member.isfile() or base.startswith("."):
                continue
            is_photo = base.partition(".")[2].lower() in PHOTOS
            if is_photo and in_place and plain:
                if member.offset_data + member.size > length:
                    raise CutShort(f"in {member.name!r}")
                yield member.name, tar_place(file, member.offset_data, member.size, member.name)
            else:
                yield member.name, _content(shard, member)
        if plain:
            _see_end(shard)


def _next(shard: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return shard.next()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise CutShort(str(error)) from error


def _content(shard: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    try:
        return shard.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise CutShort(f"in {member.name!r}") from error


def _see_end(shard: tarfile.TarFile) -> None:
    """Tell the end mark from a cut and from a damaged header, which `tarfile` takes for the end."""
    shard.fileobj.seek(shard.offset)
    if shard.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise CutShort(f"or damaged, at byte {shard.offset:,}")


def _refuse(member: tarfile.TarInfo, file: Path) -> None:
    refuse_climbing(member.name, f"shard {file}")
    if member.issym() or member.islnk():
        raise ValueError(
            f"shard {file}: member {member.name!r} is a link to {member.linkname!r}; wanted plain files. "
            "Pack the shard again with the files themselves (tar --dereference --hard-dereference)."
        )
    if member.issparse():
        raise ValueError(
            f"shard {file}: member {member.name!r} is stored with holes; wanted plain files. Pack the shard again "
            "without tar's --sparse."
        )
    if member.isfile() and member.size > LARGEST_MEMBER:
        raise ValueError(
            f"shard {file}: member {member.name!r} has {member.size:,} bytes; wanted at most {LARGEST_MEMBER:,}. "
            "Leave it out or make the photo smaller."
        )


def _fields(sample: dict) -> dict:
    members = sample["members"]
    fields = _json_fields(members.get("json"), sample["name"])
    text = next((members[suffix].decode("utf-8", "replace").strip() for suffix in TEXTS if suffix in members), None)
    text = text if text is not None else fields.get("text", fields.get("caption"))
    item = next((value for key, value in fields.items() if key.lower() == "item_id" and value), sample["name"])
    return {
        **{key: value for key, value in fields.items() if key.lower() not in ("image", "item_id")},
        "image": _cell(sample),
        "text": text,
        "item_id": item,
    }


def _cell(sample: dict) -> dict | None:
    """The sample's first photo as an undecoded cell."""
    for suffix, content in sample["members"].items():
        if suffix in PHOTOS:
            if isinstance(content, str):
                return {"bytes": None, "path": content}
            return {"bytes": content, "path": f"{sample['name']}.{suffix}"}
    return None


def _json_fields(content: bytes | None, name: str) -> dict[str, str | None]:
    """JSON values as strings, nested ones as JSON; a member that is no JSON object is warned of and left out."""
    if content is None:
        return {}
    try:
        fields = json.loads(content)
        if not isinstance(fields, dict):
            raise ValueError(f"it holds a {type(fields).__name__}, wanted an object")
    except ValueError as error:
        logger.warning("sample %s: its JSON cannot be read (%s)", name, error)
        return {}
    as_text = {key: json.dumps(value, ensure_ascii=False) for key, value in fields.items()}
    return {
        key: value if isinstance(value, str) else None if value is None else as_text[key]
        for key, value in fields.items()
    }
