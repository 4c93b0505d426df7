"""Who is asked and what is ranked, drawn with a seed and frozen: the part of a protocol that decides its numbers.

A retrieval among 1 + 100 candidates depends on which 100. They are other products of the same subcategory first, and
of others only where these do not suffice; the product that is asked for is never among its own negatives. Products and
photos are drawn in the order of their ids, so the order of a corpus's rows changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .archive import arrays_sha256, read_arrays, write_arrays

QUERIES, NEGATIVES, DRAWS = 1000, 100, 5
WAYS = ("image_to_text", "text_to_image")


@dataclass(frozen=True)
class Pool:
    """Products and their photos, both in the order of their ids.

    Attributes:
        items: (P,) str, the products' ids, ascending.
        photos: (I,) str, the photos' ids, ascending.
        item_of_photo: (I,) int, position in `items`.
        subcategories: (P,) str.
    """

    items: np.ndarray
    photos: np.ndarray
    item_of_photo: np.ndarray
    subcategories: np.ndarray

    def __post_init__(self):
        for name, ids in (("products", self.items), ("photos", self.photos)):
            if not (ids[1:] > ids[:-1]).all():
                raise ValueError(f"the ids of the {name} must be different and in ascending order")
        if len(np.unique(self.item_of_photo)) != len(self.items):
            raise ValueError(f"{len(self.items)} products, but only {len(np.unique(self.item_of_photo))} have a photo")

    def one_photo(self, rng: np.random.Generator, items: np.ndarray) -> np.ndarray:
        """Positions of one photo each, drawn among the photos of some products (...,)."""
        order, counts = np.argsort(self.item_of_photo, kind="stable"), np.bincount(self.item_of_photo)
        drawn = (rng.random(items.shape) * counts[items]).astype(np.int64)
        return order[(np.cumsum(counts) - counts)[items] + drawn]


@dataclass(frozen=True)
class Candidates:
    """Frozen lists by name, as PROTOCOL.candidates.npz.

    Lists of a sampled protocol, by direction: `image_to_text/queries` (draws, Q) positions in `photos`,
    `image_to_text/candidates` (draws, Q, 1 + negatives) positions in `items`, the right one first; in
    `text_to_image/...` photos and items change places. Lists of other protocols are the ids alone.
    """

    arrays: dict[str, np.ndarray]

    @property
    def sha256(self) -> str:
        """Hash of the contents, equal only for equal lists."""
        return arrays_sha256(self.arrays)

    def save(self, path: str | Path) -> str:
        """Write the file; returns the hash."""
        return write_arrays(path, self.arrays)

    @classmethod
    def load(cls, path: str | Path) -> Candidates:
        """Read what `save` wrote; FileNotFoundError or ValueError where it is not there or something else."""
        return cls(read_arrays(path))


# -------------------------------------------------------------------------------------------------------- drawing


def draw_by_item(
    pool: Pool, *, queries: int = QUERIES, negatives: int = NEGATIVES, draws: int = DRAWS, seed: int = 0
) -> Candidates:
    """Products against products: each with one photo, its negatives other products with one photo each.

    One list serves both directions: the query photo is ranked against the products' texts, the query text against the
    products' photos. Fewer queries or negatives where the pool has not as many.
    """
    queries, negatives = min(queries, len(pool.items)), min(negatives, len(pool.items) - 1)
    _check_size(negatives)
    texts = np.empty((draws, queries, 1 + negatives), dtype=np.int64)
    photos = np.empty_like(texts)
    for draw in range(draws):
        rng = np.random.default_rng([seed, draw])
        for place, item in enumerate(np.sort(rng.choice(len(pool.items), size=queries, replace=False))):
            texts[draw, place] = item, *_negatives(rng, pool.subcategories, item, np.arange(len(pool.items)), negatives)
        photos[draw] = pool.one_photo(rng, texts[draw])
    return _frozen(pool, photos[:, :, 0], texts, texts[:, :, 0], photos)


def draw_by_view(
    pool: Pool, *, queries: int = QUERIES, negatives: int = NEGATIVES, draws: int = DRAWS, seed: int = 0
) -> Candidates:
    """Photos against products and texts against photos: a photo's negatives are products, a text's are photos.

    Queries are photos of any view, and texts with one photo of theirs as the right one. Several photos of one other
    product can be among a text's negatives. Fewer queries or negatives where the pool has not as many.
    """
    most = np.bincount(pool.item_of_photo).max()
    negatives = min(negatives, len(pool.items) - 1, len(pool.photos) - most)
    _check_size(negatives)
    photos, items = min(queries, len(pool.photos)), min(queries, len(pool.items))
    asked_photos = np.empty((draws, photos), dtype=np.int64)
    texts = np.empty((draws, photos, 1 + negatives), dtype=np.int64)
    asked_texts = np.empty((draws, items), dtype=np.int64)
    gallery = np.empty((draws, items, 1 + negatives), dtype=np.int64)
    for draw in range(draws):
        rng = np.random.default_rng([seed, draw])
        asked_photos[draw] = np.sort(rng.choice(len(pool.photos), size=photos, replace=False))
        for place, item in enumerate(pool.item_of_photo[asked_photos[draw]]):
            texts[draw, place] = item, *_negatives(rng, pool.subcategories, item, np.arange(len(pool.items)), negatives)
        asked_texts[draw] = np.sort(rng.choice(len(pool.items), size=items, replace=False))
        gallery[draw, :, 0] = pool.one_photo(rng, asked_texts[draw])
        for place, item in enumerate(asked_texts[draw]):
            gallery[draw, place, 1:] = _negatives(rng, pool.subcategories, item, pool.item_of_photo, negatives)
    return _frozen(pool, asked_photos, texts, asked_texts, gallery)


def _negatives(rng, subcategories: np.ndarray, item: int, item_of: np.ndarray, count: int) -> np.ndarray:
    """Entries (count,) of a gallery, given the item of each entry: of the same subcategory first, then others."""
    other, alike = item_of != item, subcategories[item_of] == subcategories[item]
    near = np.flatnonzero(other & alike)
    if len(near) >= count:
        return rng.choice(near, size=count, replace=False)
    far = rng.choice(np.flatnonzero(other & ~alike), size=count - len(near), replace=False)
    return np.concatenate([near, far])


def _check_size(negatives: int) -> None:
    if negatives < 1:
        raise ValueError("a retrieval needs at least two products with a photo each; give a larger split")


def _frozen(pool: Pool, photos, texts, asked_texts, gallery) -> Candidates:
    lists = {
        "image_to_text/queries": photos,
        "image_to_text/candidates": texts,
        "text_to_image/queries": asked_texts,
        "text_to_image/candidates": gallery,
    }
    ids = {"items": pool.items, "photos": pool.photos}
    return Candidates({name: array.astype(np.int32) for name, array in lists.items()} | ids)


# -------------------------------------------------------------------------------------------------------- reading


def check_candidates(candidates: Candidates, pool: Pool) -> None:
    """Raises a ValueError unless the lists fit the pool: the same ids, and every right one there once.

    Frozen lists come from a file, and so are not taken on trust.
    """
    arrays = candidates.arrays
    for name, ids in (("items", pool.items), ("photos", pool.photos)):
        if name not in arrays or not np.array_equal(arrays[name], ids):
            raise ValueError(
                f"the candidate lists are of another corpus: their {name} are not those of this one "
                f"({len(arrays.get(name, ()))} and {len(ids)}); draw them anew, or evaluate their own corpus"
            )
    for way, sizes in zip(WAYS, ((len(pool.photos), len(pool.items)), (len(pool.items), len(pool.photos)))):
        queries, listed = (_positions(arrays, f"{way}/{kind}", n) for kind, n in zip(("queries", "candidates"), sizes))
        asked = pool.item_of_photo[queries] if way == "image_to_text" else queries
        found = listed if way == "image_to_text" else pool.item_of_photo[listed]
        right = found == asked[:, :, None]
        if not right[:, :, 0].all() or right[:, :, 1:].any():
            raise ValueError(f"{way}: the right candidate must come first and only once; these lists are damaged")


def _positions(arrays: dict[str, np.ndarray], name: str, size: int) -> np.ndarray:
    if name not in arrays or arrays[name].dtype.kind not in "iu":
        raise ValueError(f"the candidate lists lack {name}, or it holds no positions; draw them anew")
    if arrays[name].min() < 0 or arrays[name].max() >= size:
        raise ValueError(f"{name} holds positions outside 0 ... {size - 1}; these lists are damaged")
    return arrays[name]


def same_subcategory_share(candidates: Candidates, pool: Pool) -> float:
    """Share of the negatives, over both directions, that are of the query's own subcategory; the rest filled up."""
    alike = []
    for way in WAYS:
        listed = candidates.arrays[f"{way}/candidates"]
        items = listed if way == "image_to_text" else pool.item_of_photo[listed]
        kinds = pool.subcategories[items]
        alike.append((kinds[:, :, 1:] == kinds[:, :, :1]).mean())
    return float(np.mean(alike))


def ordered(ids: Sequence[str]) -> np.ndarray:
    """Distinct ids (n,) as an array of str in ascending order."""
    return np.unique(np.asarray(ids, dtype=str))
