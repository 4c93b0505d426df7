"""Metrics against slow oracles and known values."""

import itertools
import math

import numpy as np
import pytest

from syncmask.evaluation import classification as c
from syncmask.evaluation import metrics as m


def slow_rank(scores, positives, ignored):
    best = max(s for s, p, i in zip(scores, positives, ignored) if p and not i)
    return 1 + sum(1 for s, p, i in zip(scores, positives, ignored) if not p and not i and s >= best)


def test_ranks_match_a_slow_count_with_ties_positives_and_ignored():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, size=(200, 9)).astype(float)  # few values: many ties
    positives = rng.random((200, 9)) < 0.3
    ignored = rng.random((200, 9)) < 0.2
    positives[:, 0], ignored[:, 0] = True, False
    expected = [slow_rank(*row) for row in zip(scores, positives, ignored)]
    assert m.ranks(scores, positives, ignored).tolist() == expected


def test_a_collapsed_model_gets_no_luck():
    rank = m.ranks(np.zeros((5, 20)), np.eye(5, 20, dtype=bool))
    assert rank.tolist() == [20] * 5
    assert m.recall_at_k(rank, 10)["value"] == 0


def test_ranks_refuse_what_would_look_perfect():
    with pytest.raises(ValueError, match="NaN"):
        m.ranks(np.array([[np.nan, 1.0]]), np.array([[True, False]]))
    with pytest.raises(ValueError, match="no positive"):
        m.ranks(np.zeros((1, 2)), np.zeros((1, 2), dtype=bool))
    with pytest.raises(ValueError, match="no positive"):
        m.ranks(np.zeros((1, 2)), np.array([[True, False]]), np.array([[True, False]]))
    with pytest.raises(ValueError, match="queries, gallery"):
        m.ranks(np.zeros((1, 2)), np.zeros((2, 1), dtype=bool))


def test_recall_and_mean_recall():
    rank = np.array([1, 2, 6, 11])
    assert [m.recall_at_k(rank, k)["value"] for k in (1, 5, 10)] == [0.25, 0.5, 0.75]
    both = m.mean_recall([rank, np.array([1, 1])])
    assert both["value"] == pytest.approx((0.5 + 1) / 2) and both["n"] == 6
    assert both["low"] <= both["value"] <= both["high"]


def test_no_hit_at_all_still_has_an_interval():
    none = m.recall_at_k(np.full(50, 99), 10)
    assert none["low"] == 0 and none["high"] == pytest.approx(1 - 0.025 ** (1 / 50))
    every = m.recall_at_k(np.ones(50), 10)
    assert every["high"] == 1 and every["low"] == pytest.approx(0.025 ** (1 / 50))


def test_bootstrap_is_seeded_and_near_the_binomial_error():
    hits = np.arange(400) % 4 == 0
    one, again, other = (m.bootstrap_mean(hits, seed=seed) for seed in (1, 1, 2))
    assert one == again and one["low"] != other["low"]
    wide = 2 * 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert one["high"] - one["low"] == pytest.approx(wide, rel=0.15)


def test_chunked_resampling_covers_every_draw():
    values = [np.arange(10.0), np.ones(10)]
    sums = m._resample(values, seed=0, draws=17, chunk=30)
    assert sums.shape == (17, 2) and (sums[:, 1] == 10).all() and np.unique(sums[:, 0]).size > 5


def test_bootstrap_leaves_out_nan_and_empty():
    assert m.bootstrap_mean([1.0, np.nan, 0.0])["n"] == 2
    nothing = m.bootstrap_mean([np.nan])
    assert nothing["n"] == 0 and math.isnan(nothing["value"])
    ratio = m.bootstrap_ratio(np.array([1.0, 5.0, 0.0]), np.array([2.0, 10.0, 0.0]))
    assert ratio["value"] == 0.5 and ratio["n"] == 2 and ratio["low"] == ratio["high"] == 0.5


def test_chance_is_the_share_of_draws_that_hit():
    for positives, gallery, k in [(1, 5, 2), (2, 6, 3), (3, 4, 2), (2, 3, 10)]:
        draws = list(itertools.combinations(range(gallery), min(k, gallery)))
        expected = np.mean([any(place < positives for place in draw) for draw in draws])
        assert m.chance_recall(np.array([positives]), gallery, k) == pytest.approx(expected)
    assert m.chance_recall(np.array([1, 3]), np.array([10, 10]), 1) == pytest.approx(0.2)


def slow_expected(measure, scores, relevant):
    """Mean of a measure of a strict ranking over all orders that agree with the scores."""
    found = []
    for order in itertools.permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)):
            found.append(measure([relevant[place] for place in order]))
    return np.mean(found)


def slow_ap(ranked):
    hits = [place for place, good in enumerate(ranked, 1) if good]
    return sum((number / place) for number, place in enumerate(hits, 1)) / len(hits)


@pytest.mark.parametrize("seed", range(8))
def test_average_precision_and_precision_are_means_over_orders_of_ties(seed):
    rng = np.random.default_rng(seed)
    scores, relevant = rng.integers(0, 3, size=6), rng.random(6) < 0.5
    relevant[0] = True
    assert m.average_precision(scores, relevant) == pytest.approx(slow_expected(slow_ap, scores, relevant))
    k = m.count_at_rate(6, 0.4)
    expected = slow_expected(lambda ranked: sum(ranked[:k]) / k, scores, relevant)
    assert m.precision_at_rate(scores, relevant, 0.4) == pytest.approx(expected)


def test_a_constant_score_is_exactly_random():
    relevant = np.array([True, False, False, True, False])
    assert m.precision_at_rate(np.zeros(5), relevant, 0.3) == pytest.approx(0.4)


def test_the_hard_top_is_at_least_one_and_never_all():
    assert [m.count_at_rate(n, 0.3) for n in (0, 1, 2, 3, 10)] == [0, 0, 1, 1, 3]
    assert m.count_at_rate(4, 0.99) == 3
    assert math.isnan(m.precision_at_rate(np.ones(1), np.ones(1, bool), 0.3))
    assert math.isnan(m.average_precision(np.ones(3), np.zeros(3, bool)))
    with pytest.raises(ValueError, match="NaN"):
        m.average_precision(np.array([np.nan, 1]), np.array([True, False]))


def test_the_count_is_that_of_the_masks():
    import torch

    from syncmask.masks import ChoiceRule, choose

    for n in range(2, 60):
        rule = ChoiceRule(rate=0.3, temperature=0, random_share=0)
        mask = choose(torch.randn(1, n), torch.ones(1, n, dtype=torch.bool), rule).mask
        assert int(mask.sum()) == m.count_at_rate(n, 0.3), n


def slow_auc(scores, shown, groups):
    wins = pairs = 0.0
    for a, b in itertools.product(range(len(scores)), repeat=2):
        if groups[a] == groups[b] and shown[a] and not shown[b]:
            wins += 1.0 if scores[a] > scores[b] else 0.5 if scores[a] == scores[b] else 0.0
            pairs += 1
    return wins / pairs


@pytest.mark.parametrize("seed", range(5))
def test_auc_matches_the_count_of_pairs(seed):
    rng = np.random.default_rng(seed)
    scores, shown = rng.integers(0, 4, size=60).astype(float), rng.random(60) < 0.5
    groups = rng.integers(0, 12, size=60) * 7 - 3
    assert m.auc_pairs(scores, shown, groups)["value"] == pytest.approx(slow_auc(scores, shown, groups))
    units = groups // 2
    assert m.auc_pairs(scores, shown, groups, units)["value"] == pytest.approx(slow_auc(scores, shown, groups))


def test_a_score_by_word_is_blind_and_pairs_stay_in_their_group():
    words = np.repeat(np.arange(5), 4)
    shown = np.tile([True, True, False, False], 5)
    blind = m.auc_pairs(words.astype(float), shown, words)
    assert blind["value"] == blind["low"] == blind["high"] == 0.5 and blind["n"] == 5
    # Groups of different levels, each perfectly ordered inside.
    assert m.auc_pairs(10 * words + shown, shown, words)["value"] == 1
    # A group with one kind alone makes no pair, and no unit.
    assert m.auc_pairs(np.zeros(3), np.array([True, True, False]), np.array([0, 0, 1]))["n"] == 0


def test_a_tie_within_rounding_counts_against():
    scores, right = np.array([[0.5, 0.5 - 1e-7, 0.4]]), np.array([[True, False, False]])
    assert m.ranks(scores, right).tolist() == [1] and m.ranks(scores, right, tie=1e-6).tolist() == [2]


def test_resampling_by_value_is_the_same_bootstrap():
    hits, weights = (np.arange(400) % 5 == 0).astype(float), np.ones(400)
    by_value = m._resample([hits, weights], seed=0, draws=4000)
    by_row = m._resample([hits + np.arange(400) * 1e-9, weights], seed=0, draws=4000)
    assert (by_value[:, 1] == 400).all() and by_value[:, 0].mean() == pytest.approx(80, rel=0.02)
    assert np.percentile(by_value[:, 0], [2.5, 50, 97.5]) == pytest.approx(
        np.percentile(by_row[:, 0], [2.5, 50, 97.5]), abs=1.5
    )


def test_groups_with_one_seed_are_resampled_together():
    hits, ones = np.arange(200) % 2 == 0, np.ones(200)
    opposite = m.bootstrap_mean_of_ratios([(hits, ones), (~hits, ones)], seeds=[0, 0])
    assert opposite["low"] == opposite["high"] == opposite["value"] == 0.5
    apart = m.bootstrap_mean_of_ratios([(hits, ones), (~hits, ones)])
    assert apart["low"] < 0.48 and apart["high"] > 0.52


def slow_f1(truth, predicted, label):
    right = sum(t == p == label for t, p in zip(truth, predicted))
    wrong = sum((t == label) != (p == label) for t, p in zip(truth, predicted))
    return 2 * right / (2 * right + wrong) if right or wrong else 0.0


@pytest.mark.parametrize("seed", range(6))
def test_macro_f1_matches_loops(seed):
    rng = np.random.default_rng(seed)
    truth, predicted = rng.integers(0, 5, size=40), rng.integers(0, 8, size=40)
    expected = np.mean([slow_f1(truth, predicted, label) for label in set(truth.tolist())])
    assert c.macro_f1(truth, predicted, 9) == pytest.approx(expected)
    union = set(truth.tolist()) | set(predicted.tolist())
    expected = np.mean([slow_f1(truth, predicted, label) for label in union])
    assert c.macro_f1_union(truth, predicted, 9) == pytest.approx(expected)
    metric = c.bootstrap_f1(c.macro_f1, truth, predicted, 9)
    assert metric["low"] <= metric["value"] <= metric["high"] and metric["n"] == 40
    weights = rng.integers(0, 3, size=40)
    repeated = (np.repeat(truth, weights), np.repeat(predicted, weights))
    assert c.macro_f1(truth, predicted, 9, weights) == pytest.approx(c.macro_f1(*repeated, 9))


def test_labels_are_never_silently_class_0():
    with pytest.raises(ValueError, match="1 rows have labels that are not in the list"):
        c.label_ids(["a", "z"], ["a", "b"])
    ids, every = c.label_ids(["b", "z", "y"], ["a", "b"], unknown="wrong")
    assert ids.tolist() == [1, 3, 2] and every == ["a", "b", "y", "z"]
    with pytest.raises(ValueError, match="more than once"):
        c.label_ids(["a"], ["a", "a"])
    with pytest.raises(ValueError, match="wanted 'error' or 'wrong'"):
        c.label_ids(["a"], ["a"], unknown="ignore")


def test_a_tie_with_the_true_class_is_wrong():
    logits = np.array([[1, 1, 0], [2, 1, 0], [0, 0, 5], [3, 1, 1]], dtype=np.float32)
    assert c.predicted_ids(logits, np.array([0, 0, 2, 7])).tolist() == [1, 0, 2, 0]
    with pytest.raises(ValueError, match="NaN"):
        c.predicted_ids(np.array([[np.nan, 1]]), np.array([0]))
    with pytest.raises(ValueError, match="rows, classes"):
        c.predicted_ids(np.zeros((2, 3)), np.zeros(3, int))
