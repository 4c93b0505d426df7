"""From a text, a photo or both to ranked items: nearest photos first, then the matching head on the best of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from PIL import Image

from syncmask.processing.processing_syncmask import open_image, to_rgb

from .encoder import Encoder, Photo
from .filters import Filter, filter_expression
from .snapshot import Snapshot, shown


@dataclass
class FoundPhoto:
    """A photo of a hit: its id, its cosine with the query, and the file it lies in (None: in the catalogue)."""

    photo_id: str
    score: float
    path: str | None
    _snapshot: Snapshot = field(repr=False)

    def open(self) -> Image.Image:
        """The photo, upright and RGB.

        Raises:
            ValueError: it is no longer where it was, or broken.
        """
        return _open(self._snapshot.sources([self.photo_id]).get(self.photo_id), self.photo_id)


@dataclass
class Hit:
    """An item that was found.

    Attributes:
        item_id: its id.
        text: of its best photo's row.
        vector: cosine of the query and its best photo.
        matching: logit of match less logit of no match; None where the item was not re-ranked.
        photos: its photos that meet the filter, best first.
        columns: all further columns of its best photo's row that have a value.
    """

    item_id: str
    text: str
    vector: float
    matching: float | None
    photos: list[FoundPhoto]
    columns: dict[str, object]

    def content(self) -> dict:
        """What goes into JSON."""
        photos = [{"photo_id": photo.photo_id, "score": photo.score, "path": photo.path} for photo in self.photos]
        plain = {name: getattr(self, name) for name in ("item_id", "text", "vector", "matching", "columns")}
        return plain | {"photos": photos}


@dataclass
class Ranking(Sequence):
    """Hits, best first, and what the searcher should know: a text that was cut, fewer items than asked for."""

    hits: list[Hit]
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.hits)

    def __getitem__(self, place):
        return self.hits[place]

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)

    def content(self) -> dict:
        """What goes into JSON."""
        return {"hits": [hit.content() for hit in self.hits], "notes": self.notes}


def search(
    snapshot: Snapshot,
    encoder: Encoder,
    text: str | None = None,
    image: Photo | None = None,
    filter: Filter | None = None,
    k: int = 10,
    rerank: int = 0,
) -> Ranking:
    """See `Catalogue.search`."""
    _check(text, image, k, rerank)
    where = filter_expression(filter, snapshot.schema)
    notes = _cut(encoder, text)
    query = _vector(encoder, text, image)
    hits = best_items(snapshot, query, max(k, rerank), where)
    if rerank:
        hits = _rerank(snapshot, encoder, hits, text, image, rerank, notes)
    if not snapshot.rows:
        notes.append("the catalogue is empty")
    elif len(hits) < k:
        notes.append(f"{k} items were asked for; {len(hits)} are there{' that meet the filter' if filter else ''}")
    return Ranking(hits[:k], notes)


def best_items(snapshot: Snapshot, query: np.ndarray, k: int, where) -> list[Hit]:
    """The k items whose best photo is nearest to a query (P,) of unit length."""
    wanted = 4 * k + 16
    while True:
        found = snapshot.nearest(query, wanted, where)
        items = list(dict.fromkeys(found))[:k]
        if len(items) == k or len(found) < wanted:
            break
        wanted *= 4  # items with many photos each took the places
    hits = _hits(snapshot, snapshot.photos_of(items, where), query)
    return sorted(hits, key=lambda hit: (-hit.vector, hit.item_id))


def _hits(snapshot: Snapshot, rows: pa.Table, query: np.ndarray) -> list[Hit]:
    vectors = rows["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, len(query))
    scores = (vectors @ query).clip(-1, 1).tolist()  # rounding may go a little beyond
    items: dict[str, list[tuple[float, dict]]] = {}
    for score, row in sorted(zip(scores, rows.drop_columns(["vector"]).to_pylist()), key=_best_first):
        items.setdefault(row["item_id"], []).append((score, row))
    return [_hit(snapshot, item_id, photos) for item_id, photos in items.items()]


def _best_first(scored: tuple[float, dict]) -> tuple[float, str]:
    return -scored[0], scored[1]["photo_id"]


def _hit(snapshot: Snapshot, item_id: str, photos: list[tuple[float, dict]]) -> Hit:
    score, best = photos[0]
    found = [FoundPhoto(row["photo_id"], score, row["photo_path"], snapshot) for score, row in photos]
    return Hit(item_id, best["text"], score, None, found, shown(best))


# ----------------------------------------------------------------------------------------------------- the query
def _check(text: str | None, image: Photo | None, k: int, rerank: int) -> None:
    if image is None and not (text or "").strip():
        raise ValueError("nothing to search for: give a text, a photo, or both.")
    if k < 1 or rerank < 0:
        raise ValueError(f"k is {k} and rerank {rerank}; wanted at least 1 and 0.")
    if rerank and text and image is not None:
        raise ValueError(
            "a photo and a text together cannot be re-ranked: the matching head judges a photo by a text that "
            "describes it, not by how it should differ from another photo. Leave rerank out."
        )


def _cut(encoder: Encoder, text: str | None) -> list[str]:
    if not text or not encoder.cut_texts([text]):
        return []
    return [f"the text is longer than the model reads: its end, after {encoder.max_tokens} tokens, was left out"]


def _vector(encoder: Encoder, text: str | None, image: Photo | None) -> np.ndarray:
    if image is None:
        return encoder.encode_text([text], as_numpy=True)[0]
    if not (text or "").strip():
        return encoder.encode_image([image], as_numpy=True)[0]
    return encoder.encode_composed([image], [text], as_numpy=True)[0]


# ---------------------------------------------------------------------------------------------------- re-ranking
def _rerank(
    snapshot: Snapshot,
    encoder: Encoder,
    hits: list[Hit],
    text: str | None,
    image: Photo | None,
    count: int,
    notes: list,
) -> list[Hit]:
    """The first `count` hits in the order of the matching head, those it could not judge behind, then the rest.

    A text is matched with each item's best photo; a photo with each item's text.
    """
    first, rest = hits[:count], hits[count:]
    pairs = (
        _photo_pairs(snapshot, first, text) if image is None else [(hit, image, hit.text) for hit in first if hit.text]
    )
    if pairs:
        judged, photos, texts = zip(*pairs)
        for hit, score in zip(judged, encoder.match(photos, texts)):
            hit.matching = float(score)
    if missing := len(first) - len(pairs):
        notes.append(
            f"{missing} of {len(first)} items were not re-ranked: their photo cannot be read or they have no text"
        )
    return sorted(first, key=lambda hit: np.inf if hit.matching is None else -hit.matching) + rest


def _photo_pairs(snapshot: Snapshot, hits: list[Hit], text: str) -> list[tuple[Hit, Image.Image, str]]:
    sources = snapshot.sources([hit.photos[0].photo_id for hit in hits])
    pairs = []
    for hit in hits:
        try:
            pairs.append((hit, _open(sources.get(hit.photos[0].photo_id), hit.photos[0].photo_id), text))
        except ValueError:
            continue
    return pairs


def _open(source: str | bytes | None, photo_id: str) -> Image.Image:
    try:
        return to_rgb(open_image(source or b""))
    except (OSError, ValueError) as error:
        raise ValueError(f"photo {photo_id!r} cannot be read any more ({error}); index its source again.") from error
