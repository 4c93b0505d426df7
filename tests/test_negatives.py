import math

import pytest
import torch

from syncmask.negatives import choose_negatives, forbidden_pairs, gumbel_noise


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def symmetric_overlap(rows, seed=0):
    values = uniform(rows, rows, seed=seed)
    return (values + values.T) / 2


def slow_choice(similarity, rule1, all_rules, noise, temperature, margin):
    """The rules and the softmax draw, spelt out one anchor at a time."""
    rows = len(similarity)
    chosen, fell_back = [], []
    for i in range(rows):
        allowed = [j for j in range(rows) if not all_rules[i, j]]
        if margin is not None:
            allowed = [j for j in allowed if similarity[i, j] < similarity[i, i] - margin]
        fallback = [j for j in range(rows) if not rule1[i, j]]
        fell_back.append(not allowed and bool(fallback))
        pool = allowed or fallback
        keys = [similarity[i, j].item() / temperature - math.log(-math.log(noise[i, j].item())) for j in pool]
        chosen.append(pool[keys.index(max(keys))] if pool else -1)
    return chosen, fell_back


def test_rules_equal_their_definition():
    items = torch.tensor([0, 0, 1, 2, 3])
    texts = torch.tensor([0, 1, 2, 2, 4])
    overlap = symmetric_overlap(5)
    rule1, rules = forbidden_pairs(items, texts, overlap, 0.6)
    for i in range(5):
        for j in range(5):
            same = items[i] == items[j] or texts[i] == texts[j]
            assert rule1[i, j] == same
            assert rules[i, j] == (same or overlap[i, j] >= 0.6)
    assert rule1[0, 1] and rule1[2, 3] and not rule1[0, 2]
    assert rule1.diagonal().all() and torch.equal(rules, rules.T)


def test_overlap_exactly_tau_is_forbidden():
    _, rules = forbidden_pairs(torch.arange(2), torch.arange(2), torch.full((2, 2), 0.5), 0.5)
    assert rules.all()


@pytest.mark.parametrize("margin", [None, 0.0, 0.3])
def test_choice_equals_the_loop(margin):
    rows = 24
    items = torch.randint(0, 10, (rows,), generator=torch.Generator().manual_seed(1))
    rule1, rules = forbidden_pairs(items, items, symmetric_overlap(rows), 0.2)
    similarity = uniform(rows, rows, seed=2) * 2 - 1
    noise = uniform(rows, rows, seed=3).clamp_min(1e-6)
    index, fell_back = choose_negatives(similarity, None, rule1, rules, noise, 0.2, margin)
    slow_index, slow_back = slow_choice(similarity, rule1, rules, noise, 0.2, margin)
    assert index.tolist() == slow_index
    assert fell_back.tolist() == slow_back
    assert fell_back.any(), "the case is meant to reach the fallback"


def test_no_rule_is_broken_where_something_is_allowed():
    rows = 40
    items = torch.arange(rows) // 2
    rule1, rules = forbidden_pairs(items, items, symmetric_overlap(rows), 0.7)
    similarity = uniform(rows, rows, seed=4)
    for side in (similarity, similarity.T):
        index, fell_back = choose_negatives(side, None, rule1, rules, uniform(rows, rows, seed=5), 0.01)
        assert not rules[torch.arange(rows), index].any()
        assert not fell_back.any()


def test_draws_follow_the_softmax():
    similarity = torch.tensor([[0.9, 0.3, 0.1, 0.2]]).repeat(4000, 1)
    forbidden = torch.zeros(4000, 4, dtype=torch.bool)
    forbidden[:, 0] = True
    index, _ = choose_negatives(similarity, similarity[:, 0], forbidden, forbidden, uniform(4000, 4, seed=6), 0.1)
    frequency = torch.bincount(index, minlength=4) / 4000
    expected = torch.softmax(torch.tensor([-torch.inf, 3.0, 1.0, 2.0]), 0)
    torch.testing.assert_close(frequency, expected, atol=0.025, rtol=0)


def test_a_small_temperature_takes_the_most_similar():
    similarity = uniform(8, 8, seed=7)
    rule1, rules = forbidden_pairs(torch.arange(8), torch.arange(8))
    index, _ = choose_negatives(similarity, None, rule1, rules, uniform(8, 8), 1e-6)
    assert torch.equal(index, similarity.masked_fill(torch.eye(8, dtype=torch.bool), -2).argmax(1))


def test_margin_reads_the_positives_given():
    similarity = torch.tensor([[0.0, 0.5, 0.2], [0.1, 0.0, 0.2], [0.1, 0.2, 0.0]])
    rule1, rules = forbidden_pairs(torch.arange(3), torch.arange(3))
    positives = torch.tensor([0.4, 0.15, 0.05])
    index, fell_back = choose_negatives(similarity, positives, rule1, rules, uniform(3, 3), 1e-6, margin=0.0)
    assert index.tolist() == [2, 0, 1]
    assert fell_back.tolist() == [False, False, True]


def test_nothing_allowed_gives_minus_one_and_is_no_fallback():
    for items in (torch.zeros(1, dtype=torch.long), torch.zeros(5, dtype=torch.long)):
        rule1, rules = forbidden_pairs(items, torch.arange(len(items)))
        index, fell_back = choose_negatives(
            torch.zeros(len(items), len(items)), None, rule1, rules, uniform(len(items), len(items)), 0.07
        )
        assert (index == -1).all() and not fell_back.any()


def test_noise_of_exactly_zero_or_nearly_one_stays_finite():
    assert torch.isfinite(gumbel_noise(torch.tensor([0.0, 1.0, 1 - 2**-24]))).all()


def test_a_learned_temperature_gets_no_gradient():
    temperature = torch.tensor([0.07], requires_grad=True)
    rule1, rules = forbidden_pairs(torch.arange(3), torch.arange(3))
    index, _ = choose_negatives(uniform(3, 3), None, rule1, rules, uniform(3, 3), temperature)
    assert not index.requires_grad


def test_refusals_say_what_is_wrong():
    ids = torch.arange(3)
    with pytest.raises(ValueError, match="go together"):
        forbidden_pairs(ids, ids, torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"3 rows need \(3, 3\)"):
        forbidden_pairs(ids, ids, torch.zeros(2, 2), 0.4)
    with pytest.raises(ValueError, match="must both be"):
        forbidden_pairs(ids, torch.arange(2))
    rule1, rules = forbidden_pairs(ids, ids)
    with pytest.raises(TypeError, match="float32"):
        choose_negatives(torch.zeros(3, 3, dtype=torch.bfloat16), None, rule1, rules, uniform(3, 3), 0.07)
