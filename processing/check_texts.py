"""Near-identical texts among very many, without comparing all pairs: min-hashing finds candidates, words decide."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix

from .processing_syncmask import split_words

ALIKE = 0.9
BANDS, DEPTH = 16, 8
NEIGHBOURS = 4


def near_identical(texts: Sequence[str], items: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Pairs of texts of different items that share at least 9 of 10 of their words.

        J(a, b) = |words that both have| / |words that one of them has| >= .9, words as sets, lower-cased

    128 min-hashes in 16 bands of 8: a pair of J = .9 is met with probability .9999, and the time grows with the texts,
    not with their pairs. Texts of one band's bucket are compared to the next 4 of them only, so of a hundred alike
    not all pairs are listed, but nearly every one of them is. Our choice; what is listed was compared word by word.

    Args:
        texts: distinct.
        items: (texts,) an item that has the text; pairs of one item are left out.
        seed: of the hash functions.

    Returns:
        (pairs, 2) int64, sorted, first < second.

    Example:
        >>> words = "one two three four five six seven eight nine"
        >>> near_identical([words, words + " ten", "red shirt"], np.arange(3)).tolist()
        [[0, 1]]
    """
    words = _word_sets(texts)
    signatures = _min_hashes(words, seed)
    pairs = [_bucket_pairs(signatures[:, band * DEPTH : (band + 1) * DEPTH], items) for band in range(BANDS)]
    codes = np.unique(np.concatenate([part[:, 0] * len(texts) + part[:, 1] for part in pairs]))
    pairs = np.stack(np.divmod(codes, max(len(texts), 1)), axis=1)
    alike = [_jaccard(words, part) >= ALIKE for part in np.array_split(pairs, len(pairs) // 100_000 + 1)]
    return pairs[np.concatenate(alike)]


def _word_sets(texts: Sequence[str]) -> csr_matrix:
    """(texts, words) of ones; columns in order of first appearance."""
    vocabulary: dict[str, int] = {}
    indices, indptr = [], [0]
    for text in texts:
        words = dict.fromkeys(text[start:end].lower() for start, end in split_words(text))
        indices += [vocabulary.setdefault(word, len(vocabulary)) for word in words]
        indptr.append(len(indices))
    ones = np.ones(len(indices), dtype=np.int32)
    return csr_matrix((ones, np.array(indices, np.int64), indptr), shape=(len(texts), max(len(vocabulary), 1)))


def _min_hashes(words: csr_matrix, seed: int) -> np.ndarray:
    """(texts, 128) uint64: the least hash of each text's words under 128 random functions of the words."""
    rng = np.random.default_rng(seed)
    signatures = np.full((words.shape[0], BANDS * DEPTH), np.iinfo(np.uint64).max, dtype=np.uint64)
    filled = np.flatnonzero(np.diff(words.indptr))
    if not len(filled):
        return signatures
    for column in range(BANDS * DEPTH):
        of_word = rng.integers(0, np.iinfo(np.int64).max, words.shape[1], dtype=np.int64).astype(np.uint64)
        signatures[filled, column] = np.minimum.reduceat(of_word[words.indices], words.indptr[filled])
    return signatures


def _bucket_pairs(band: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Pairs of rows of equal signatures, each with the next few of another item, (pairs, 2)."""
    bucket = band[:, 0].copy()
    for column in band.T[1:]:  # One number for the 8: chance collisions only add candidates, which words decide on.
        bucket = (bucket ^ (bucket >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15) + column
    order = np.argsort(bucket, kind="stable")
    rows, owner = bucket[order], items[order]
    pairs = [np.empty((0, 2), np.int64)]
    for step in range(1, min(NEIGHBOURS, len(order) - 1) + 1):
        same = (rows[step:] == rows[:-step]) & (owner[step:] != owner[:-step])
        first, second = order[:-step][same], order[step:][same]
        pairs.append(np.stack([np.minimum(first, second), np.maximum(first, second)], axis=1))
    return np.concatenate(pairs)


def _jaccard(words: csr_matrix, pairs: np.ndarray) -> np.ndarray:
    if not len(pairs):
        return np.empty(0)
    sizes = np.diff(words.indptr)
    both = np.asarray(words[pairs[:, 0]].multiply(words[pairs[:, 1]]).sum(axis=1)).ravel()
    return both / np.maximum(sizes[pairs[:, 0]] + sizes[pairs[:, 1]] - both, 1)
