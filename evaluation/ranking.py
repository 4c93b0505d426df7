"""Ranking queries against galleries by features, in chunks, and re-ranking the best by the matching head. Pure numpy.

Cosines are summed in double precision. In single precision they differ in the seventh place with the size of the chunk
they were computed in, which is enough to change a rank; in double precision equal features tie whatever the chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .metrics import ranks

# Features that are equal but were computed in other batches give cosines that differ by this much; it still is a tie.
TIE = 1e-6
CHUNK_SCORES = 4_000_000  # 32 MB of scores at a time

Relevance = Callable[[np.ndarray], np.ndarray]  # query positions (q,) -> (q, gallery) bool
Matching = Callable[[np.ndarray, np.ndarray], np.ndarray]  # image and text positions (n,), (n,) -> scores (n,)


@dataclass(frozen=True)
class Direction:
    """One way of searching: features of queries and gallery, and what counts as right.

    Attributes:
        queries: (Q, D) unit-length features.
        gallery: (G, D) unit-length features.
        relevant: by the name of a reading, "" the strict one, what is right for some queries.
        itself: (Q,) gallery position of the query photo, which is no candidate; None where it is not in the gallery.
    """

    queries: np.ndarray
    gallery: np.ndarray
    relevant: dict[str, Relevance]
    itself: np.ndarray | None = None

    def chunks(self, rows: np.ndarray):
        """Some of the rows at a time with their cosines (q, G): `yield rows, scores`."""
        gallery = self.gallery.astype(np.float64).T
        step = max(1, CHUNK_SCORES // max(gallery.shape[1], 1))
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            yield part, self.queries[part].astype(np.float64) @ gallery

    def ignored(self, rows: np.ndarray) -> np.ndarray | None:
        """The query's own place (q, G), or None."""
        return None if self.itself is None else self.itself[rows, None] == np.arange(len(self.gallery))

    def sizes(self) -> tuple[np.ndarray, int]:
        """Positives of each query (Q,) under the strict reading, and how many candidates each has."""
        queries, own = np.arange(len(self.queries)), 0 if self.itself is None else 1
        step = max(1, CHUNK_SCORES // max(len(self.gallery), 1))
        parts = [queries[start : start + step] for start in range(0, len(queries), step)]
        return np.concatenate([self.relevant[""](part).sum(axis=1) for part in parts]) - own, len(self.gallery) - own


def every_rank(way: Direction, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Ranks (q,) of the queries `rows` by reading."""
    parts: dict[str, list[np.ndarray]] = {reading: [] for reading in way.relevant}
    for part, scores in way.chunks(rows):
        for reading, relevance in way.relevant.items():
            parts[reading].append(ranks(scores, relevance(part), way.ignored(part), tie=TIE))
    return {reading: np.concatenate(part) for reading, part in parts.items()}


def rerank(way: Direction, rows: np.ndarray, matching: Matching, k: int) -> dict[str, np.ndarray]:
    """Ranks by reading after the `k` best by cosine are put in the order of the matching head.

    Candidates outside the k best keep their order by cosine behind them. `matching` gets gallery positions second.
    """
    k, parts = min(k, len(way.gallery)), {reading: [] for reading in way.relevant}
    for part, scores in way.chunks(rows):
        scores = reordered(
            scores, way.relevant[""](part), k, lambda best, part=part: matching(np.repeat(part, k), best)
        )
        for reading, relevance in way.relevant.items():
            parts[reading].append(ranks(scores, relevance(part), tie=TIE))
    return {reading: np.concatenate(part) for reading, part in parts.items()}


def reordered(
    scores: np.ndarray, relevant: np.ndarray, k: int, matching: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Scores (Q, G) whose `k` best a query were replaced by what `matching` says, above all the others.

    Args:
        scores: cosines.
        relevant: (Q, G) bool; at the border of the k best, ties go against these.
        k: how many are looked at again, at most G.
        matching: candidate positions (Q k,), query by query -> scores (Q k,).
    """
    best = np.argsort(-(scores - TIE * relevant), axis=1, kind="stable")[:, :k]
    matched = np.asarray(matching(best.reshape(-1)), dtype=np.float64).reshape(best.shape)
    result = scores.copy()
    # Above every cosine (at most 1), whatever the range of the head's logits.
    np.put_along_axis(result, best, matched - matched.min() + 2, axis=1)
    return result
