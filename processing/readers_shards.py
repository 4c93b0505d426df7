"""Tar shards as WebDataset writes them: members of one sample share a name up to its first dot (`0001.jpg 0001.json`).

Nothing is unpacked to disk. `open_shards` is for checks and conversion, `ShardStream` for training on sets that do
not fit a disk: shuffled in blocks, resumed exactly.
"""

from __future__ import annotations

import json
import logging
import tarfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from .readers_folder import split_of_file
from .safe_paths import refuse_climbing
from .streams import RowStream, stamp_of

logger = logging.getLogger(__name__)

PHOTOS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
TEXTS = ("txt", "text", "caption")
SUFFIXES = (".tar", ".tar.gz", ".tgz")
PEEKED = 100  # samples whose JSON tells the columns
LARGEST_MEMBER = 256 * 2**20


def shard_files(path: Path) -> dict[str, list[Path]]:
    """Tar files by split, sorted; one file, or those of a folder and its train/ validation/ test/. {} if none."""
    if path.is_file():
        return {"all": [path]} if path.name.endswith(SUFFIXES) else {}
    groups: dict[str, list[Path]] = {}
    for file in sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES)):
        groups.setdefault(split_of_file(file, path), []).append(file)
    return groups


def open_shards(path: Path) -> dict[str, RowStream]:
    """Streams by split, one piece a shard. See `read_shard` for the columns.

    Raises:
        ValueError: a shard that is no tar, or a member that leads out of its folder.
    """
    return {split: _stream(files) for split, files in shard_files(path).items()}


def _stream(files: list[Path]) -> RowStream:
    columns = shard_columns(files[0])
    features = {"image": datasets.Image(), **{name: datasets.Value("string") for name in columns}}
    pieces = tuple((str(file), columns) for file in files)
    return RowStream(datasets.Features(features), pieces, read_shard, stamp_of(files))


def shard_columns(file: Path) -> tuple[str, ...]:
    """Columns beside the photo: text and item_id, then the JSON keys of the shard's first samples."""
    keys: dict[str, None] = dict.fromkeys(("text", "item_id"))
    for sample in islice(_samples(file), PEEKED):
        keys |= dict.fromkeys(key for key in _fields(sample) if key != "image")
    return tuple(keys)


def read_shard(file: str, columns: Sequence[str], skip: int = 0) -> Iterator[dict]:
    """Rows of one shard: image (undecoded cell), then `columns` as strings, None where a sample lacks one.

    The text is the member `.txt`, else the JSON's `text` or `caption`; the item is the JSON's `item_id` in any case,
    else the sample's own name. Samples without a photo are skipped and counted in a warning, and so is what follows
    the place where a shard is cut short.

    Args:
        skip: samples with a photo to pass over at the start.

    Raises:
        ValueError: no tar at all, or a member that leads out of its folder or is a link.
    """
    without = 0
    for number, sample in enumerate(_with_photo(_samples(Path(file)))):
        if sample is None:
            without += 1
        elif number - without >= skip:
            fields = _fields(sample)
            yield {"image": fields["image"], **{name: fields.get(name) for name in columns}}
    if without:
        logger.warning("%s: skipped %d samples without a photo", file, without)


def _with_photo(samples: Iterator[dict]) -> Iterator[dict | None]:
    for sample in samples:
        yield sample if any(suffix in PHOTOS for suffix in sample["members"]) else None


def _samples(file: Path) -> Iterator[dict]:
    """Groups of members {"name", "members": {suffix: bytes}} in the shard's order."""
    name, members = None, {}
    for member_name, content in _members(file):
        folder, _, base = member_name.rpartition("/")
        stem, _, suffix = base.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if key != name and members:
            yield {"name": name, "members": members}
            members = {}
        name = key
        members[suffix.lower()] = content
    if members:
        yield {"name": name, "members": members}


def _members(file: Path) -> Iterator[tuple[str, bytes]]:
    try:
        shard = tarfile.open(file, "r:*")
    except (tarfile.TarError, OSError, EOFError) as error:
        reason = str(error).splitlines()[-1].removeprefix("- method tar: ")
        raise ValueError(f"{file} cannot be read as a tar shard: {reason}. Download or pack it again.") from error
    with shard:
        while (member := _next(shard, file)) is not None:
            _refuse(member, file)
            if not member.isfile() or member.name.rpartition("/")[2].startswith("."):
                continue
            try:
                content = shard.extractfile(member).read()
            except (tarfile.TarError, OSError, EOFError):
                content = b""
            if len(content) < member.size:
                logger.warning("%s is cut short in %r; its samples from there on are lost", file, member.name)
                return
            shard.members = []  # tarfile remembers every header it met; a stream must not grow.
            yield member.name, content


def _next(shard: tarfile.TarFile, file: Path) -> tarfile.TarInfo | None:
    try:
        return shard.next()
    except (tarfile.TarError, OSError, EOFError) as error:
        logger.warning("%s is cut short (%s); its samples from there on are lost", file, error)
        return None


def _refuse(member: tarfile.TarInfo, file: Path) -> None:
    refuse_climbing(member.name, f"shard {file}")
    if member.issym() or member.islnk():
        raise ValueError(
            f"shard {file}: member {member.name!r} is a link to {member.linkname!r}; wanted plain files. "
            "Pack the shard again with the files themselves (tar --dereference --hard-dereference)."
        )
    if member.isfile() and member.size > LARGEST_MEMBER:
        raise ValueError(
            f"shard {file}: member {member.name!r} has {member.size:,} bytes; wanted at most {LARGEST_MEMBER:,}. "
            "Leave it out or make the photo smaller."
        )


def _fields(sample: dict) -> dict:
    members = sample["members"]
    photo = next(((suffix, members[suffix]) for suffix in members if suffix in PHOTOS), (None, None))
    fields = _json_fields(members.get("json"), sample["name"])
    text = next((members[suffix].decode("utf-8", "replace").strip() for suffix in TEXTS if suffix in members), None)
    text = text if text is not None else fields.get("text", fields.get("caption"))
    item = next((value for key, value in fields.items() if key.lower() == "item_id" and value), sample["name"])
    return {
        **{key: value for key, value in fields.items() if key.lower() not in ("image", "item_id")},
        "image": None if photo[1] is None else {"bytes": photo[1], "path": f"{sample['name']}.{photo[0]}"},
        "text": text,
        "item_id": item,
    }


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


Order = Callable[[list[dict], np.random.Generator], Sequence[int]]


def shuffled(rows: list[dict], rng: np.random.Generator) -> list[int]:
    """The order of a block: by chance. A trainer that groups rows hands `ShardStream` its own."""
    return rng.permutation(len(rows)).tolist()


class ShardStream(IterableDataset):
    """Rows of tar shards for training, shuffled in blocks of `buffer` rows, resumed exactly.

    Shards are put in an order that follows from (seed, epoch); each process and worker reads its own share of them.
    Rows are read into a block, and the block is given in the order that `order` says. `state_dict()` names the
    block's beginning, its order and how many of its rows were given, so a stream that loads it goes on with the very
    row that would have come next. With workers, use a loader that asks each worker's copy for its state.

    Args:
        shards: tar files.
        seed: of the orders.
        buffer: rows of a block.
        order: (rows of the block, generator) -> a permutation; a trainer groups here.
        rank, world_size: of the process.

    Raises:
        ValueError: no shards, or fewer than processes and workers.

    Example:
        >>> stream = ShardStream(["train-0000.tar"])  # doctest: +SKIP
        >>> row = next(iter(stream))  # doctest: +SKIP
    """

    def __init__(
        self,
        shards: Sequence[str | Path],
        *,
        seed: int = 0,
        buffer: int = 1000,
        order: Order = shuffled,
        rank: int = 0,
        world_size: int = 1,
    ):
        super().__init__()
        if not shards or len(shards) < world_size:
            raise ValueError(f"got {len(shards)} shards for {world_size} processes; wanted at least one each.")
        self.shards = [str(shard) for shard in shards]
        self.columns = shard_columns(Path(self.shards[0]))
        self.seed, self.buffer, self.order = seed, buffer, order
        self.rank, self.world_size = rank, world_size
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Start that epoch from its first row."""
        self._state = {"epoch": epoch, "block": 0, "shard": 0, "row": 0, "given": 0, "order": None}

    def state_dict(self) -> dict:
        """Where the stream stands, as plain numbers and lists."""
        return {**self._state, "seed": self.seed, "buffer": self.buffer, "shards": len(self.shards)}

    def load_state_dict(self, state: dict) -> None:
        """Go on from there; ValueError where seed, buffer or the number of shards are others."""
        for name, own in (("seed", self.seed), ("buffer", self.buffer), ("shards", len(self.shards))):
            if state[name] != own:
                raise ValueError(f"the state is of a stream with {name} = {state[name]}, this one has {own}.")
        self._state = {name: state[name] for name in self._state}

    def __iter__(self) -> Iterator[dict]:
        mine = self._own_shards()
        while True:
            state = self._state
            block, shard, row = self._block(mine, state["shard"], state["row"])
            if not block:
                self.set_epoch(state["epoch"] + 1)
                return
            if state["order"] is None:
                rng = np.random.default_rng(np.random.SeedSequence([self.seed, state["epoch"], 1, state["block"]]))
                state["order"] = [int(place) for place in self.order(block, rng)]
            while state["given"] < len(block):
                state["given"] += 1  # Before the row is given: the state counts it as soon as someone has it.
                yield block[state["order"][state["given"] - 1]]
            self._state = {**state, "block": state["block"] + 1, "shard": shard, "row": row, "given": 0, "order": None}

    def _own_shards(self) -> list[str]:
        worker = get_worker_info()
        readers = self.world_size * (worker.num_workers if worker else 1)
        if len(self.shards) < readers:
            raise ValueError(f"{len(self.shards)} shards for {readers} readers; use fewer workers or smaller shards.")
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, self._state["epoch"], 0]))
        place = self.rank * (worker.num_workers if worker else 1) + (worker.id if worker else 0)
        return [self.shards[number] for number in rng.permutation(len(self.shards))[place::readers]]

    def _block(self, mine: list[str], shard: int, row: int) -> tuple[list[dict], int, int]:
        """Rows from a place on, and the place behind them: (shard, samples read in it)."""
        block: list[dict] = []
        while shard < len(mine) and len(block) < self.buffer:
            more = list(islice(read_shard(mine[shard], self.columns, skip=row), self.buffer - len(block)))
            block += more
            row += len(more)
            if len(block) < self.buffer:
                shard, row = shard + 1, 0
        return block, shard, row
