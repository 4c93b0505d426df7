"""FashionIQ: a reference photo, two sentences of how the target differs, the target photo; and its two galleries.

The photos are downloaded one by one from shop links of which many are dead. What is missing is counted and named,
because scores on a gallery with holes cannot be compared with anybody's.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets

from .readers_tabular import ASIDE, PLAN, read_parquet
from .safe_paths import inside

logger = logging.getLogger(__name__)

CATEGORIES = ("dress", "shirt", "toptee")
SPLITS = {"train": "train", "val": "validation"}  # The test split's targets were never published.
GALLERIES = ("original", "val")
NAMED = 5  # missing photos that a message names
PHOTOS = {".jpg", ".jpeg", ".png", ".webp"}
TRIPLET = datasets.Features(
    {
        "image": datasets.Image(),
        "text": datasets.Value("string"),
        "item_id": datasets.Value("string"),
        "candidate": datasets.Image(),
        "candidate_id": datasets.Value("string"),
        "captions": datasets.List(datasets.Value("string")),
        "category": datasets.Value("string"),
    }
)
GALLERY = datasets.Features(
    {
        "image": datasets.Image(),
        "item_id": datasets.Value("string"),
        "category": datasets.Value("string"),
        "original": datasets.Value("bool"),
        "val": datasets.Value("bool"),
    }
)


@dataclass(frozen=True)
class FashionIQ:
    """Triplets and galleries whose photos are there, undecoded.

    Attributes:
        triplets: "train" and "validation"; rows are `image` and `item_id` (the target), `candidate` and
            `candidate_id` (the reference), `captions` (one or two), `text` (the captions joined by " and ") and
            `category`. Rows whose target or candidate has no photo are left out.
        photos: every gallery photo once a category: image, item_id, category, and whether it is in the gallery
            `original` (the split file) and in `val` (the validation triplets' candidates and targets).
        missing: ids without a photo, by "category/split".
        leaks: gallery photos that another category's train split holds, by "category in other category".
    """

    triplets: dict[str, datasets.Dataset]
    photos: datasets.Dataset
    missing: dict[str, list[str]]
    leaks: dict[str, int]

    def gallery(self, name: str, category: str) -> datasets.Dataset:
        """The photos of one category's gallery, "original" or "val"; ValueError for another name."""
        if name not in GALLERIES or category not in CATEGORIES:
            raise ValueError(f"gallery {name!r} of {category!r}; wanted {GALLERIES} of {CATEGORIES}.")
        wanted = zip(self.photos["category"], self.photos[name], strict=True)
        return self.photos.select([row for row, (kind, held) in enumerate(wanted) if held and kind == category])

    @property
    def comparable(self) -> bool:
        """Whether the validation photos are complete, so that scores mean what others' scores mean."""
        return not any(ids for name, ids in self.missing.items() if name.endswith("/val"))

    def warnings(self) -> list[str]:
        """What a reader of scores must know: photos missing, gallery photos that training sees."""
        found = [
            f"{name}: {len(ids)} photos are missing ({_some(ids)}); scores with missing photos are not comparable"
            for name, ids in self.missing.items()
            if ids
        ]
        return found + [
            f"{count} gallery photos of {pair}'s train split: training on all categories sees them"
            for pair, count in self.leaks.items()
        ]


def join_captions(captions: Sequence[str], *, swapped: bool = False) -> str:
    """The captions that are not empty, joined by " and "; `swapped` puts the last one first.

    Example:
        >>> join_captions(["is blue", "has long sleeves"], swapped=True)
        'has long sleeves and is blue'
    """
    kept = [caption.strip() for caption in captions if caption and caption.strip()]
    return " and ".join(kept[::-1] if swapped else kept)


def load_fashioniq(root: Path) -> FashionIQ:
    """FashionIQ from its own folder or from what `syncmask corpus convert` made of it.

    Raises:
        FileNotFoundError, ValueError: neither of them, or as `read_fashioniq`.

    Example:
        >>> load_fashioniq("fashion_iq").gallery("original", "dress")  # doctest: +SKIP
    """
    root = Path(root).expanduser()
    if holds_fashioniq(root):
        return read_fashioniq(root)
    if not is_converted(root):
        raise FileNotFoundError(
            f"{root} is not FashionIQ: wanted captions/, image_splits/ and images/, or a conversion of them "
            f"with its {PLAN} and {ASIDE}/."
        )
    plan = json.loads((root / PLAN).read_text(encoding="utf-8"))
    (photos,) = read_parquet(root / ASIDE).values()
    return _report(FashionIQ(read_parquet(root), photos, plan["missing"], plan["leaks"]))


def is_converted(root: Path) -> bool:
    """Whether a folder is what `syncmask corpus convert` made of FashionIQ, with its galleries."""
    return (root / PLAN).is_file() and (root / ASIDE).is_dir()


def holds_fashioniq(root: Path) -> bool:
    """Whether a folder has FashionIQ's layout."""
    return (root / "captions").is_dir() and any((root / "captions").glob("cap.*.json"))


def read_fashioniq(root: Path) -> FashionIQ:
    """Read captions/, image_splits/ and images/ of a folder; no photo is opened.

    Raises:
        FileNotFoundError: no images/ folder, or none of the split files.
        ValueError: a file that is not what it should be, or an id that is no file's name.
    """
    folder = root / "images"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{root} has captions but no images/ folder. Put the photos there as images/ID.jpg or .png."
        )
    splits = {key: _read_split(root, *key) for key in _keys(root)}
    triplets = {key: _read_triplets(root, *key) for key in splits}
    photos = _photo_paths(folder)
    used = {key: set(ids) | _used(triplets[key]) for key, ids in splits.items()}
    missing = {f"{kind}/{split}": sorted(ids - photos.keys()) for (kind, split), ids in used.items()}
    return _report(
        FashionIQ(_triplet_tables(triplets, photos), _gallery_table(splits, triplets, photos), missing, _leaks(splits))
    )


def _report(found: FashionIQ) -> FashionIQ:
    for warning in found.warnings():
        logger.warning("FashionIQ: %s", warning)
    return found


def _keys(root: Path) -> list[tuple[str, str]]:
    keys = [(kind, split) for kind in CATEGORIES for split in SPLITS]
    found = [key for key in keys if (root / "captions" / f"cap.{key[0]}.{key[1]}.json").is_file()]
    if not found:
        raise FileNotFoundError(f"{root / 'captions'} has no cap.{{dress,shirt,toptee}}.{{train,val}}.json.")
    return found


def _read_json(file: Path) -> list:
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; FashionIQ has it beside its captions. Add it.")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}. Download it again.") from error
    if not isinstance(found, list):
        raise ValueError(f"{file} holds a {type(found).__name__}; wanted a list.")
    return found


def _read_split(root: Path, kind: str, split: str) -> list[str]:
    file = root / "image_splits" / f"split.{kind}.{split}.json"
    return _checked_ids(_read_json(file), file)


def _read_triplets(root: Path, kind: str, split: str) -> list[dict]:
    file = root / "captions" / f"cap.{kind}.{split}.json"
    rows = _read_json(file)
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not {"candidate", "target", "captions"} <= row.keys():
            raise ValueError(f"{file}, entry {number} is {str(row)[:80]}; wanted candidate, target and captions.")
        if not isinstance(row["captions"], list) or not all(isinstance(one, str) for one in row["captions"]):
            raise ValueError(f"{file}, entry {number}: captions is {row['captions']!r}; wanted a list of strings.")
    _checked_ids([row[role] for row in rows for role in ("candidate", "target")], file)
    return rows


def _checked_ids(ids: Sequence, file: Path) -> list[str]:
    for one in ids:
        if not isinstance(one, str) or not re.fullmatch(r"[\w-]+", one):
            raise ValueError(f"{file} names the photo {one!r}; wanted an id of letters and digits, no path. Mend it.")
    return list(ids)


def _photo_paths(folder: Path) -> dict[str, str]:
    """Paths by id; a link out of the folder is refused, an empty file is as good as none."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PHOTOS)
    paths = inside(folder, [file.name for file in files], "images/")
    there = [path for path in map(Path, paths) if path.is_file() and path.stat().st_size]
    return {path.stem: str(path) for path in there}


def _used(rows: Iterable[dict]) -> set[str]:
    return {row[role] for row in rows for role in ("candidate", "target")}


def _triplet_tables(triplets: dict, photos: dict[str, str]) -> dict[str, datasets.Dataset]:
    tables = {}
    for split, name in SPLITS.items():
        rows, dropped, empty = [], 0, 0
        for (kind, own), entries in triplets.items():
            for entry in entries if own == split else ():
                row = _triplet(entry, kind, photos)
                dropped += row is None
                empty += sum(not caption.strip() for caption in entry["captions"])
                rows += [row] if row else []
        if dropped or empty:
            logger.warning(
                "FashionIQ %s: left out %d triplets without both photos or any caption, and %d empty captions",
                name,
                dropped,
                empty,
            )
        if rows:
            tables[name] = _table(rows, TRIPLET)
    if not tables:
        raise FileNotFoundError("FashionIQ: no triplet has both its photos; put them into images/ as ID.jpg or .png.")
    return tables


def _triplet(entry: dict, kind: str, photos: dict[str, str]) -> dict | None:
    target, candidate = photos.get(entry["target"]), photos.get(entry["candidate"])
    captions = [caption.strip() for caption in entry["captions"] if caption.strip()]
    if not (target and candidate and captions):
        return None
    return {
        "image": target,
        "text": join_captions(captions),
        "item_id": entry["target"],
        "candidate": candidate,
        "candidate_id": entry["candidate"],
        "captions": captions,
        "category": kind,
    }


def _gallery_table(splits: dict, triplets: dict, photos: dict[str, str]) -> datasets.Dataset:
    rows = []
    for (kind, split), ids in splits.items():
        if split != "val":
            continue
        original, used = set(ids), _used(triplets[kind, split])
        for one in [*dict.fromkeys(ids), *sorted(used - original)]:
            if one in photos:
                row = {"image": photos[one], "item_id": one, "category": kind}
                rows.append(row | {"original": one in original, "val": one in used})
    return _table(rows, GALLERY)


def _table(rows: list[dict], features: datasets.Features) -> datasets.Dataset:
    columns = {name: [row[name] for row in rows] for name in features}
    return datasets.Dataset.from_dict(columns, features=features)


def _leaks(splits: dict[tuple[str, str], list[str]]) -> dict[str, int]:
    shared = {
        f"{kind} in {other}": len(set(ids) & set(others))
        for (kind, split), ids in splits.items()
        for (other, other_split), others in splits.items()
        if split == "val" and other_split == "train" and other != kind
    }
    return {pair: count for pair, count in shared.items() if count}


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:NAMED]) + (", ..." if len(ids) > NAMED else "")
