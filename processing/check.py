"""The corpus check: what is wrong with a corpus, told before training. One pass over the rows, then counts.

`survey` reads (photos are looked at one by one and let go), `find_*` judge, `check_corpus` does both.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .check_photos import PhotoFacts, near_duplicates, probe
from .check_texts import near_identical
from .corpus import fold_text, open_streams
from .processing_syncmask import split_words
from .readers_folder import SPLITS, canonical_split
from .splits import place_items
from .streams import RowStream
from .tokenizer import LONGEST, train_tokenizer

CLASSES = ("category", "subcategory")
UNREADABLE_SHARE = 0.1  # more photos than that are a broken copy, which no training mends
CUT_SHARE = 0.05  # of the texts
ERROR, WARNING, NOTE = "error", "warning", "note"


@dataclass
class Survey:
    """What one pass over the rows brought; lists and arrays are by row.

    Attributes:
        source_split, row, piece: where the row is in the source.
        split: where `load_corpus` puts it, "" where it drops it (no text, no item).
        items, texts: numbers of `item_names` and `text_names`, -1 where the row has none.
        photos: what `probe` said, empty where photos were not looked at.
        classes: values by column of CLASSES that the corpus has.
    """

    source_split: list[str] = field(default_factory=list)
    row: list[int] = field(default_factory=list)
    piece: list[int] = field(default_factory=list)
    items: list[int] = field(default_factory=list)
    texts: list[int] = field(default_factory=list)
    photos: list[PhotoFacts] = field(default_factory=list)
    classes: dict[str, list[str | None]] = field(default_factory=dict)
    item_names: list[str] = field(default_factory=list)
    text_names: list[str] = field(default_factory=list)
    split: np.ndarray = field(default_factory=lambda: np.empty(0, dtype="U10"))

    def __len__(self) -> int:
        return len(self.row)

    def offender(self, row: int, why: str, **more) -> dict:
        """One line of the file of offending rows."""
        item = self.item_names[self.items[row]] if self.items[row] >= 0 else None
        place = {"source_split": self.source_split[row], "row": self.row[row], "split": str(self.split[row])}
        return {**place, "item_id": item, "why": why, **more, "place": row}


@dataclass(frozen=True)
class Finding:
    """One thing found: how bad, how often, what it means, and the rows that it is about."""

    name: str
    level: str
    count: int
    message: str
    rows: Sequence[dict] = ()


@dataclass(frozen=True)
class Report:
    """What `check_corpus` found; `may_start` says that no finding is an error."""

    source: str
    splits: dict[str, dict[str, int]]
    photos_an_item: dict[int, int]
    tokens: dict[str, int]
    classes: dict[str, dict[str, dict[str, int]]]
    findings: list[Finding]

    @property
    def may_start(self) -> bool:
        """Whether training may start on this corpus."""
        return not any(finding.level == ERROR for finding in self.findings)


def check_corpus(
    source: str | os.PathLike,
    *,
    tokenizer=None,
    max_text_length: int | None = None,
    photos: bool = True,
    seed: int = 0,
    shares: tuple[float, float, float] = (0.75, 0.1, 0.15),
    on_row: Callable[[], None] = lambda: None,
    **columns,
) -> tuple[Report, Survey, dict[str, RowStream]]:
    """Check a corpus as `load_corpus(source, ...)` would give it; neither a bad row nor a bad photo stops it.

    Args:
        source, columns: as for `load_corpus`.
        tokenizer: that training will use; without one, what training would train on these texts.
        max_text_length: tokens of a text before it is cut; by default the tokenizer's own limit, at most 128.
        photos: False leaves the photos unopened.
        seed, shares: of the item-wise split, where the source has no splits.
        on_row: called after each row.

    Returns:
        the report, and the survey and the streams that a sheet of the offenders is drawn from.

    Raises:
        FileNotFoundError, ValueError, ImportError: a source that cannot be read at all, as for `load_corpus`.
    """
    heard = _Ear()
    logger = logging.getLogger(__package__)
    logger.addHandler(heard)
    try:
        streams = open_streams(source, seed=seed, **columns)
        found = survey(streams, photos=photos, on_row=on_row)
    finally:
        logger.removeHandler(heard)
    found.split = placed(found, list(streams), seed, shares)
    tokens, long_texts = find_long_texts(found, tokenizer, max_text_length)
    findings = [
        *find_few(found),
        *(Finding("reading", WARNING, 1, message) for message in heard.messages),
        *find_bad_photos(found),
        *find_dropped(found),
        *find_leaks(found),
        *find_twin_photos(found),
        *find_conflicts(found),
        *find_shared_texts(found),
        *long_texts,
        *find_unseen_classes(found),
    ]
    sizes = {name: _sizes(found, found.split == name) for name in SPLITS if (found.split == name).any()}
    return Report(str(source), sizes, _photos_an_item(found), tokens, class_counts(found), findings), found, streams


class _Ear(logging.Handler):
    """Keeps what the readers warn of, each message once."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.messages[record.getMessage()] = None


# ------------------------------------------------------------------------------------------- the one pass
def survey(streams: dict[str, RowStream], *, photos: bool, on_row: Callable[[], None]) -> Survey:
    """Read every row once, a photo in memory at a time."""
    found = Survey()
    items: dict[str, int] = {}
    texts: dict[str, int] = {}
    found.classes = {name: [] for name in CLASSES if all(name in stream.features for stream in streams.values())}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of large photos and odd tags: `probe` says it in a row's words.
        for split, stream in streams.items():
            number = 0
            for place, piece in enumerate(stream.pieces):
                for row in stream.read(*piece):
                    _take(found, row, items, texts, photos)
                    found.source_split.append(split)
                    found.row.append(number)
                    found.piece.append(place)
                    number += 1
                    on_row()
    found.item_names = list(items)
    found.classes = {name: values for name, values in found.classes.items() if any(values)}
    return found


def _take(found: Survey, row: dict, items: dict[str, int], texts: dict[str, int], photos: bool) -> None:
    item, text = (row["item_id"] or "").strip(), row["text"] or ""
    found.items.append(items.setdefault(row["item_id"], len(items)) if item else -1)
    if split_words(text):
        number = texts.setdefault(fold_text(text), len(texts))
        if number == len(found.text_names):
            found.text_names.append(text)
        found.texts.append(number)
    else:
        found.texts.append(-1)
    for name, values in found.classes.items():
        values.append(None if row[name] is None else str(row[name]))
    if photos:
        found.photos.append(probe(row["image"]))


def placed(found: Survey, splits: Sequence[str], seed: int, shares: Sequence[float]) -> np.ndarray:
    """(rows,) where `load_corpus` puts each row; "" for those that it drops."""
    source = np.array([canonical_split(name) for name in found.source_split], dtype="U10")
    kept = np.flatnonzero((np.array(found.items, int) >= 0) & (np.array(found.texts, int) >= 0))
    place = np.full(len(found), "", dtype="U10")
    place[kept] = source[kept]
    if len(splits) == 1:
        cut, among = dict(zip(SPLITS, shares, strict=True)), kept
    elif "validation" not in {canonical_split(name) for name in splits}:
        cut, among = {"train": 1 - shares[1], "validation": shares[1]}, kept[source[kept] == "train"]
    else:
        return place
    items = [found.item_names[found.items[row]] for row in among]
    place[among] = np.array(list(cut), dtype="U10")[place_items(items, seed, cut)] if len(items) else ""
    return place


# ------------------------------------------------------------------------------------------------ counts
def _sizes(found: Survey, rows: np.ndarray) -> dict[str, int]:
    items, texts = np.array(found.items, int)[rows], np.array(found.texts, int)[rows]
    return {"rows": int(rows.sum()), "items": len(np.unique(items)), "texts": len(np.unique(texts))}


def _photos_an_item(found: Survey) -> dict[int, int]:
    items = np.array(found.items, int)
    counts = np.bincount(items[items >= 0]) if (items >= 0).any() else np.empty(0, int)
    return {int(photos): int(items) for photos, items in zip(*np.unique(counts, return_counts=True), strict=True)}


def class_counts(found: Survey) -> dict[str, dict[str, dict[str, int]]]:
    """Rows by column, class and split, most frequent class first; rows without a class count as "(none)"."""
    counts = {}
    for name, values in found.classes.items():
        by_class: dict[str, Counter] = defaultdict(Counter)
        for value, split in zip(values, found.split, strict=True):
            if split:
                by_class[value or "(none)"][str(split)] += 1
        ranked = sorted(by_class.items(), key=lambda entry: (-entry[1].total(), entry[0]))
        counts[name] = {value: dict(splits) for value, splits in ranked}
    return counts


# ---------------------------------------------------------------------------------------------- findings
def _finding(name: str, level: str, rows: Sequence[dict], message: str, count: int | None = None) -> list[Finding]:
    count = len(rows) if count is None else count
    return [Finding(name, level, count, message, rows)] if count else []


def find_few(found: Survey) -> list[Finding]:
    """Too little to train on."""
    train = found.split == "train"
    items = len(np.unique(np.array(found.items, int)[train]))
    few = f"train has {int(train.sum())} rows of {items} items; wanted 2 items at least, with a text and an item id"
    empty = "no rows for validation: the best checkpoint cannot be told; add items or a validation split"
    return [
        *_finding("train is empty", ERROR, (), few, int(items < 2)),
        *_finding("validation is empty", WARNING, (), empty, int(not (found.split == "validation").any())),
    ]


def find_bad_photos(found: Survey) -> list[Finding]:
    """Photos that are not there, broken, tiny or huge."""
    rows = defaultdict(list)
    for row, photo in enumerate(found.photos):
        if photo.problem:
            rows[photo.problem].append(found.offender(row, f"{photo.problem}: {photo.reason}"))
    bad = sum(len(rows[name]) for name in ("missing", "unreadable", "huge"))
    level = ERROR if bad > UNREADABLE_SHARE * max(len(found), 1) else WARNING
    mend = "mend them, or leave them out by `syncmask corpus convert --verify`"
    small = "the smallest side is under 32 pixels: enlarged, they show nothing"
    return [
        *_finding("missing photos", level, rows["missing"], f"no file where the row says; {mend}"),
        *_finding("unreadable photos", level, rows["unreadable"], f"training puts other rows in their place; {mend}"),
        *_finding("huge photos", level, rows["huge"], f"over 50 million pixels, not opened here; {mend}"),
        *_finding("tiny photos", WARNING, rows["tiny"], small),
    ]


def find_dropped(found: Survey) -> list[Finding]:
    """Rows that `load_corpus` leaves out."""
    texts = [found.offender(row, "no text") for row, text in enumerate(found.texts) if text < 0]
    items = [found.offender(row, "no item id") for row, item in enumerate(found.items) if item < 0]
    return [
        *_finding("empty texts", WARNING, texts, "rows without a word; they are left out of training"),
        *_finding("rows without an item", WARNING, items, "no item_id; they are left out of training"),
    ]


def find_leaks(found: Survey) -> list[Finding]:
    """Items in more than one split."""
    splits: dict[int, set[str]] = defaultdict(set)
    for item, split in zip(found.items, found.split, strict=True):
        if item >= 0 and split:
            splits[item].add(str(split))
    leaking = {item for item, names in splits.items() if len(names) > 1}
    rows = [
        found.offender(row, f"item is in {' and '.join(sorted(splits[item]))}")
        for row, item in enumerate(found.items)
        if item in leaking
    ]
    mend = "scores there would be too good; give the item to one split, or read one split by --split"
    return _finding("items across splits", ERROR, rows, f"{len(leaking)} items are in several splits: {mend}")


def find_twin_photos(found: Survey) -> list[Finding]:
    """Photos of validation and test that look the same as one of train."""
    if not found.photos:
        return []
    looks = np.array([photo.look for photo in found.photos], dtype=np.uint64)
    colours = np.frombuffer(b"".join(photo.colours for photo in found.photos), np.uint8).reshape(-1, 48)
    decoded = np.array([photo.problem in (None, "tiny") for photo in found.photos])
    train = np.flatnonzero(decoded & (found.split == "train"))
    held = np.flatnonzero(decoded & np.isin(found.split, ("validation", "test")))
    twins = near_duplicates(looks[held], colours[held], looks[train], colours[train])
    rows = []
    for row, twin in zip(held[twins >= 0], train[twins[twins >= 0]], strict=True):
        other = found.offender(int(twin), "")
        why = f"looks the same as row {other['row']} of {other['source_split']} (item {other['item_id']}, train)"
        rows.append(found.offender(int(row), why, other=int(twin)))
    return _finding("near-duplicate photos across splits", WARNING, rows, "of validation or test, and in train too")


def find_conflicts(found: Survey) -> list[Finding]:
    """Items with more than one text."""
    texts: dict[int, set[int]] = defaultdict(set)
    for item, text in zip(found.items, found.texts, strict=True):
        if item >= 0 and text >= 0:
            texts[item].add(text)
    rows = [
        found.offender(row, f"its item has {len(texts[item])} texts; this one: {found.text_names[text][:200]}")
        for row, (item, text) in enumerate(zip(found.items, found.texts, strict=True))
        if text >= 0 and len(texts.get(item, ())) > 1
    ]
    items = sum(len(some) > 1 for some in texts.values())
    message = f"{items} items; wanted one text an item: is item_id really what its photos share?"
    return _finding("items with conflicting texts", WARNING, rows, message)


def find_shared_texts(found: Survey) -> list[Finding]:
    """Equal and near-identical texts of different items: candidates for false negatives."""
    first: dict[int, int] = {}
    owners: dict[int, set[int]] = defaultdict(set)
    for row, (item, text) in enumerate(zip(found.items, found.texts, strict=True)):
        if text >= 0:
            first.setdefault(text, row)
            owners[text].add(item)
    shared = [
        found.offender(first[text], f"{len(items)} items share this text: {found.text_names[text][:200]}")
        for text, items in owners.items()
        if len(items) > 1
    ]
    owner = np.array([found.items[first[text]] for text in range(len(found.text_names))], dtype=np.int64)
    rows = []
    for one, other in near_identical(found.text_names, owner).tolist():
        why = f"nearly the text of {found.offender(first[other], '')['item_id']}: {found.text_names[one][:200]}"
        rows.append(found.offender(first[one], why, other_text=found.text_names[other][:200]))
    kept = "training never makes them each other's negatives"
    return [
        *_finding("texts of several items", NOTE, shared, f"equal up to case and spaces; {kept}"),
        *_finding("near-identical texts", NOTE, rows, "pairs of different items with 9 of 10 words in common; " + kept),
    ]


def find_long_texts(found: Survey, tokenizer, limit: int | None) -> tuple[dict[str, int], list[Finding]]:
    """Token lengths of the distinct texts (median, p99, longest, limit, number cut), and the texts that are cut."""
    if not found.text_names:
        return {}, []
    tokenizer = tokenizer or train_tokenizer(found.text_names)
    limit = limit or min(tokenizer.model_max_length, LONGEST)
    lengths = np.array([len(ids) for ids in _token_ids(tokenizer, found.text_names)])
    first: dict[int, int] = {}
    for row, text in enumerate(found.texts):
        first.setdefault(text, row)
    cut = np.flatnonzero(lengths > limit)
    rows = [found.offender(first[int(text)], f"{lengths[text]} tokens, {limit} are read") for text in cut]
    figures = {
        "median": int(np.median(lengths)),
        "p99": int(np.ceil(np.quantile(lengths, 0.99))),
        "longest": int(lengths.max()),
        "limit": int(limit),
        "cut": len(cut),
    }
    level = WARNING if len(cut) > CUT_SHARE * len(lengths) else NOTE
    return figures, _finding(
        "texts over the limit", level, rows, f"of {len(lengths)} texts; what is behind is not read"
    )


def _token_ids(tokenizer, texts: Sequence[str], batch: int = 2000) -> Iterable[list[int]]:
    for start in range(0, len(texts), batch):
        yield from tokenizer(list(texts[start : start + batch]), truncation=False, verbose=False).input_ids


def find_unseen_classes(found: Survey) -> list[Finding]:
    """Classes of validation and test that train never shows."""
    findings = []
    for name, values in found.classes.items():
        values = np.array([value or "" for value in values], dtype=object)
        seen = set(values[found.split == "train"])
        rows = [
            found.offender(int(row), f"{name} {values[row]!r} is not in train")
            for row in np.flatnonzero(np.isin(found.split, ("validation", "test")))
            if values[row] not in seen
        ]
        kinds = len({row["why"] for row in rows})
        message = f"{kinds} classes of validation or test; they will always be wrong"
        findings += _finding(f"{name} unseen in train", WARNING, rows, message)
    return findings
