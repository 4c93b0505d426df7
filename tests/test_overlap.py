"""Word overlap of texts against loops."""

import math

import numpy as np
import pytest

from syncmask.processing.overlap import overlap_tau, text_rows
from syncmask.processing.processing_syncmask import split_words

WORDS = "red blue green v-neck cotton silk dress shirt zip hood with and the long short".split()


def random_texts(count, seed=0):
    rng = np.random.default_rng(seed)
    return ["The " + ", ".join(rng.choice(WORDS, size=rng.integers(1, 7))) + "." for _ in range(count)]


def slow_overlap(texts):
    """The definition, word by word."""
    sets = [{text[a:b].lower() for a, b in split_words(text)} for text in texts]
    idf = {w: max(0.0, math.log(len(texts) / (1 + sum(w in s for s in sets)))) for s in sets for w in s}
    table = np.zeros((len(texts), len(texts)))
    for i, one in enumerate(sets):
        for j, other in enumerate(sets):
            norm = sum(idf[w] for w in one) * sum(idf[w] for w in other)
            if norm > 0:
                table[i, j] = sum(idf[w] for w in one & other) / math.sqrt(norm)
    return table


def test_rows_against_loops():
    texts = random_texts(60) + ["THE!", "", "unique words only here"]
    rows = text_rows(texts)
    fast = (rows @ rows.T).toarray()
    np.testing.assert_allclose(fast, slow_overlap(texts), atol=1e-6)
    assert rows.dtype == np.float32 and rows.has_sorted_indices
    norms = np.sqrt(rows.multiply(rows).sum(axis=1))
    assert set(np.round(np.asarray(norms).ravel(), 5)) == {0.0, 1.0}


def test_texts_without_telling_words_overlap_nothing():
    rows = text_rows(["the red", "the blue", "the", "..."])
    assert rows[2:].nnz == 0
    assert text_rows([]).shape == (0, 0)


def test_known_value():
    rows = text_rows(["red shirt", "Red (skirt)", "blue skirt", "green coat"])
    red, rare = math.log(4 / 3), math.log(4 / 2)
    assert (rows @ rows.T)[0, 1] == pytest.approx(red / math.sqrt((red + rare) * (red + red)), abs=1e-6)


def test_tau_against_all_pairs():
    texts = random_texts(50)
    items = np.repeat(np.arange(25), 2)
    table = slow_overlap(texts)
    pairs = [table[i, j] for i in range(50) for j in range(50) if items[i] != items[j]]
    tau = overlap_tau(text_rows(texts), items, seed=0)
    assert abs(tau - np.quantile(pairs, 0.98)) < 0.03
    assert tau == overlap_tau(text_rows(texts), items, seed=0)


def test_tau_ignores_pairs_of_one_item_and_has_a_floor():
    texts = ["red shirt", "red shirt one", "blue skirt", "blue skirt two", "long coat", "zip hood"]
    assert overlap_tau(text_rows(texts), np.array([0, 0, 1, 1, 2, 3]), seed=0) == 0.05
    assert overlap_tau(text_rows(texts), np.arange(6), seed=0) > 0.05
    assert overlap_tau(text_rows(["one item"]), np.zeros(1, int), seed=0) == 0.05
    with pytest.raises(ValueError, match="one each"):
        overlap_tau(text_rows(texts), np.arange(3), seed=0)
