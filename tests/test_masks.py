import math

import pytest
import torch

from syncmask.masks import (
    ChoiceRule,
    attention_word_scores,
    blend,
    choose,
    corrupt,
    gumbel_noise,
    pool_pieces,
    relative_patch_scores,
    standardise,
    synchronised_masks,
    valid_words,
    word_attention,
    words_to_tokens,
)

HARD = {"temperature": 0, "random_share": 0}


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def texts():
    """Word ids (3, 9) with several pieces, punctuation between words and padding, and the attention mask."""
    word_ids = torch.tensor(
        [[-1, 0, 0, 1, 2, 2, 2, 3, -1], [-1, 0, 1, -1, 2, -1, -1, -1, -1], [-1, 0, -1, -1, -1, -1, -1, -1, -1]]
    )
    lengths = torch.tensor([9, 6, 3])
    return word_ids, (torch.arange(9) < lengths[:, None]).long()


def pieces_of(word_ids, row, word):
    return [token for token in range(word_ids.shape[1]) if word_ids[row, token] == word]


# ------------------------------------------------------------------------------------------------------ slow oracles


def softmax(values):
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    return [power / sum(powers) for power in powers]


def slow_attention_word_scores(scores, attention_mask, word_ids):
    """C[w, p] = mean_h softmax_p(S) softmax_w(S) over real tokens; the best patch of a word's best piece."""
    batch, heads, length, patches = scores.shape
    width = int(word_ids.max()) + 1
    result = [[0.0] * width for _ in range(batch)]
    for b in range(batch):
        real = [t for t in range(length) if attention_mask[b, t] == 1]
        total = {(t, p): 0.0 for t in real for p in range(patches)}
        for h in range(heads):
            rows = {t: softmax(scores[b, h, t].tolist()) for t in real}
            for p in range(patches):
                column = softmax([scores[b, h, t, p].item() for t in real])
                for place, t in enumerate(real):
                    total[t, p] += rows[t][p] * column[place] / heads
        for w in range(width):
            for t in pieces_of(word_ids, b, w):
                result[b][w] = max(result[b][w], *[total[t, p] for p in range(patches)])
    return torch.tensor(result)


def slow_word_attention(scores, word_ids):
    batch, heads, _, patches = scores.shape
    width = int(word_ids.max()) + 1
    result = torch.zeros(batch, width, patches)
    for b in range(batch):
        for w in range(width):
            pieces = pieces_of(word_ids, b, w)
            for t in pieces:
                for h in range(heads):
                    result[b, w] += torch.tensor(softmax(scores[b, h, t].tolist())) / heads / len(pieces)
    return result


def slow_relative(attention, chosen, valid):
    """Sum over chosen words of A[w, p] / mean over words of A[., p]."""
    batch, width, patches = attention.shape
    result = torch.zeros(batch, patches)
    for b in range(batch):
        words = [w for w in range(width) if valid[b, w]]
        for p in range(patches):
            everybody = sum(attention[b, w, p].item() for w in words) / len(words)
            result[b, p] = sum(attention[b, w, p].item() / everybody for w in words if chosen[b, w])
    return result


def slow_choose(scores, valid, rule, noise):
    """The choice spelt out row by row: which are hidden, and which of them by score."""
    masks, by_scores = [], []
    for b in range(len(scores)):
        candidates = [w for w in range(scores.shape[1]) if valid[b, w]]
        budget = min(max(1, round(rule.rate * len(candidates))), max(0, len(candidates) - 1))
        at_random = math.floor(rule.random_share * budget + noise[b, 0, 0].item())

        def key(w, b=b):
            if rule.temperature == 0:
                return scores[b, w].item()
            gumbel = -math.log(-math.log(noise[b, 1 + w, 0].item()))
            return rule.strength * scores[b, w].item() / rule.temperature + gumbel

        first = sorted(candidates, key=key, reverse=True)[: budget - at_random]
        rest = [w for w in candidates if w not in first]
        second = sorted(rest, key=lambda w, b=b: noise[b, 1 + w, 1].item(), reverse=True)[:at_random]
        masks.append([w in first or w in second for w in range(scores.shape[1])])
        by_scores.append([w in first for w in range(scores.shape[1])])
    return torch.tensor(masks), torch.tensor(by_scores)


# ---------------------------------------------------------------------------------------------------- words of a text


def test_words_and_pieces_equal_the_loops(texts):
    word_ids, _ = texts
    values = normal(3, 9, 5)
    valid = valid_words(word_ids)
    assert valid.tolist() == [[True] * 4, [True] * 3 + [False], [True] + [False] * 3]
    for reduce, slow in {"sum": torch.sum, "mean": torch.mean, "amax": torch.amax}.items():
        pooled, flat = pool_pieces(values, word_ids, reduce), pool_pieces(values[..., 0], word_ids, reduce)
        for b in range(3):
            for w in range(4):
                pieces = pieces_of(word_ids, b, w)
                wanted = slow(values[b, pieces], dim=0) if pieces else torch.zeros(5)
                torch.testing.assert_close(pooled[b, w], wanted)
                torch.testing.assert_close(flat[b, w], wanted[0])


def test_the_maximum_of_negative_pieces_is_negative():
    assert pool_pieces(torch.tensor([[-3.0, -2.0]]), torch.tensor([[0, 0]]), "amax").item() == -2.0


def test_a_batch_without_words_has_one_invalid_column():
    nothing = torch.full((2, 3), -1)
    assert valid_words(nothing).tolist() == [[False], [False]]
    assert not words_to_tokens(torch.ones(2, 1, dtype=torch.bool), nothing).any()


def test_whole_words_are_hidden(texts):
    word_ids, _ = texts
    word_mask = uniform(3, 4) < 0.5
    tokens = words_to_tokens(word_mask, word_ids)
    for b in range(3):
        for t in range(9):
            word = int(word_ids[b, t])
            assert tokens[b, t] == (word >= 0 and bool(word_mask[b, word]))


# ------------------------------------------------------------------------------------------------------------- scores


def test_attention_word_scores_equal_the_loops(texts):
    word_ids, mask = texts
    scores = normal(3, 2, 9, 6) * 3
    torch.testing.assert_close(
        attention_word_scores(scores, mask, word_ids), slow_attention_word_scores(scores, mask, word_ids)
    )


def test_dual_softmax_of_known_scores():
    # Two tokens and two patches that pick each other out entirely, and then not at all.
    sharp = torch.tensor([[[[50.0, 0.0], [0.0, 50.0]]]])
    mask, word_ids = torch.ones(1, 2), torch.tensor([[0, 1]])
    torch.testing.assert_close(attention_word_scores(sharp, mask, word_ids), torch.ones(1, 2))
    torch.testing.assert_close(attention_word_scores(sharp * 0, mask, word_ids), torch.full((1, 2), 0.25))
    # Both words look at the first patch alone: it cannot tell them apart.
    same = torch.tensor([[[[50.0, 0.0], [50.0, 0.0]]]])
    torch.testing.assert_close(attention_word_scores(same, mask, word_ids), torch.full((1, 2), 0.5))


def test_padding_changes_no_word_score(texts):
    word_ids, mask = texts
    scores = normal(3, 2, 9, 6)
    longer = torch.cat([scores, 40 * normal(3, 2, 4, 6, seed=1).abs()], dim=2)
    longer_mask = torch.cat([mask, mask.new_zeros(3, 4)], dim=1)
    longer_ids = torch.cat([word_ids, word_ids.new_full((3, 4), -1)], dim=1)
    torch.testing.assert_close(
        attention_word_scores(longer, longer_mask, longer_ids), attention_word_scores(scores, mask, word_ids)
    )
    torch.testing.assert_close(word_attention(longer, longer_ids), word_attention(scores, word_ids))


def test_word_attention_equals_the_loops_and_sums_to_one(texts):
    word_ids, _ = texts
    scores = normal(3, 2, 9, 6) * 2
    attention = word_attention(scores, word_ids)
    torch.testing.assert_close(attention, slow_word_attention(scores, word_ids))
    torch.testing.assert_close(attention.sum(dim=-1), valid_words(word_ids).float())


def test_relative_patch_scores_equal_the_loops(texts):
    word_ids, _ = texts
    attention, valid = word_attention(normal(3, 2, 9, 6) * 2, word_ids), valid_words(word_ids)
    chosen = (uniform(3, 4) < 0.5) & valid
    torch.testing.assert_close(relative_patch_scores(attention, chosen, valid), slow_relative(attention, chosen, valid))


def test_what_all_words_look_at_says_nothing():
    own = uniform(1, 4, 6) + 0.1
    chosen, valid = torch.tensor([[True, False, True, False]]), torch.ones(1, 4, dtype=torch.bool)
    plain = relative_patch_scores(own, chosen, valid)
    # A patch that draws every word's eyes ten times as much gets no higher score.
    drawn = own * torch.tensor([1, 10.0, 1, 0.1, 1, 1])
    torch.testing.assert_close(relative_patch_scores(drawn, chosen, valid), plain)
    # All words chosen: no patch is preferred.
    torch.testing.assert_close(relative_patch_scores(own, valid, valid), torch.full((1, 6), 4.0))
    assert (relative_patch_scores(own, torch.zeros_like(valid), valid) == 0).all()


def test_standardise_has_mean_0_and_deviation_1_over_valid_entries():
    scores, valid = normal(5, 8) * 3 + 2, uniform(5, 8, seed=1) < 0.7
    result = standardise(scores, valid)
    for b in range(5):
        row = scores[b][valid[b]]
        torch.testing.assert_close(
            result[b][valid[b]], (row - row.mean()) / row.std(correction=0), atol=1e-4, rtol=1e-4
        )
    assert (result[~valid] == 0).all()


def test_standardise_ignores_scale_and_what_is_not_valid():
    scores, valid = normal(3, 6), torch.arange(6) < torch.tensor([[6], [4], [2]])
    wanted = standardise(scores, valid)
    for scale in (1e-8, 1e8):
        torch.testing.assert_close(standardise(scores * scale, valid), wanted)
    torch.testing.assert_close(standardise(scores.masked_fill(~valid, float("inf")), valid), wanted)


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e-6, 1e6])
@pytest.mark.parametrize("width", [1, 7, 196, 1000])
def test_a_constant_row_becomes_zeros(value, width):
    row = torch.full((1, width), value)
    assert standardise(row, torch.ones_like(row, dtype=torch.bool)).abs().max() < 1e-3


def test_a_row_without_valid_entries_becomes_zeros():
    assert (standardise(normal(1, 4), torch.zeros(1, 4, dtype=torch.bool)) == 0).all()


def test_blend_equals_its_formula():
    valid = torch.arange(6) < torch.tensor([[6], [4], [5]])
    scores, means, measured = standardise(normal(3, 6), valid), normal(3, 6, seed=1), torch.tensor([True, True, False])
    result = blend(scores, means, 0.3, measured, valid)
    for b in range(3):
        row = [
            (means[b, w] + 0.3 * (scores[b, w] - means[b, w]) if measured[b] else means[b, w]).item()
            for w in range(6)
            if valid[b, w]
        ]
        middle = sum(row) / len(row)
        spread = math.sqrt(sum((value - middle) ** 2 for value in row) / len(row))
        torch.testing.assert_close(
            result[b][valid[b]], torch.tensor([(value - middle) / spread for value in row]), atol=1e-4, rtol=1e-4
        )


def test_blend_with_weight_1_is_the_pair_alone_and_0_the_word_alone():
    valid, measured = torch.ones(2, 6, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    scores, means = standardise(normal(2, 6), valid), standardise(normal(2, 6, seed=1), valid)
    torch.testing.assert_close(blend(scores, means, 1.0, measured, valid), scores, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(blend(scores, means, 0.0, measured, valid), means, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------ choosing


@pytest.mark.parametrize("temperature", [0, 0.25, 5.0])
@pytest.mark.parametrize("random_share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.7, 1.0])
def test_choice_equals_the_loop(temperature, random_share, rate):
    scores, valid = normal(20, 12), uniform(20, 12, seed=1) < torch.linspace(0, 1, 20)[:, None]
    rule, noise = ChoiceRule(rate, temperature, random_share), uniform(20, 15, 2, seed=2)
    choice = choose(scores, valid, rule, noise)
    mask, by_score = slow_choose(scores, valid, rule, noise)
    assert torch.equal(choice.mask, mask) and torch.equal(choice.by_score, by_score)


def test_the_budget_is_exact_and_never_everything():
    valid = torch.arange(12) < torch.arange(13)[:, None]
    for rate in (0.0, 0.1, 0.3, 0.5, 0.9, 1.0):
        mask = choose(normal(13, 12), valid, ChoiceRule(rate), uniform(13, 13, 2)).mask
        assert not (mask & ~valid).any()
        for count in range(13):
            wanted = 0 if count < 2 else min(max(round(rate * count), 1), count - 1)
            assert mask[count].sum() == wanted, (rate, count)


def test_rounding_noise_at_its_end_keeps_the_budget():
    # 1 - 2^-24, the largest number that torch.rand gives: budget + it rounds up to budget + 1 in fp32.
    noise = uniform(2, 41, 2)
    noise[:, 0, 0] = 1 - 2**-24
    for share in (0.25, 1.0):
        choice = choose(normal(2, 40), torch.ones(2, 40, dtype=torch.bool), ChoiceRule(0.4, random_share=share), noise)
        assert choice.mask.sum(dim=1).tolist() == [16, 16]


def test_temperature_0_takes_the_best():
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    choice = choose(scores, torch.ones(1, 4, dtype=torch.bool), ChoiceRule(0.5, **HARD))
    assert choice.mask.tolist() == choice.by_score.tolist() == [[True, True, False, False]]


def test_noise_is_asked_for_where_chance_decides():
    scores, valid = normal(1, 4), torch.ones(1, 4, dtype=torch.bool)
    for rule in (ChoiceRule(0.5, random_share=0), ChoiceRule(0.5, temperature=0)):
        with pytest.raises(ValueError, match="noise"):
            choose(scores, valid, rule)


@pytest.mark.parametrize("temperature", [0.25, 0])
def test_strength_0_is_uniform(temperature):
    """The warm-up looks at no score, not even at the order of the words."""
    rows = 4000
    scores = torch.tensor([3.0, 1.0, 0.0, -1.0, -3.0]).expand(rows, 5)
    for these in (scores, torch.zeros(rows, 5)):
        rule = ChoiceRule(0.4, temperature=temperature, strength=0.0)
        mask = choose(these, torch.ones(rows, 5, dtype=torch.bool), rule, uniform(rows, 6, 2)).mask
        # 2 of 5 each: the deviation of a frequency is .0077; five of them are allowed.
        assert (mask.float().mean(dim=0) - 0.4).abs().max() < 0.04


def test_by_score_follows_the_softmax_of_the_keys():
    rows, scores = 20000, torch.tensor([0.5, 0.0, -0.5])
    choice = choose(
        scores.expand(rows, 3),
        torch.ones(rows, 3, dtype=torch.bool),
        ChoiceRule(0.3, temperature=0.5, random_share=0),
        uniform(rows, 4, 2),
    )
    drawn = choice.mask.float().mean(dim=0)
    assert (drawn - (scores / 0.5).softmax(0)).abs().max() < 0.02


def test_the_random_share_is_exact_in_expectation_and_uniform_over_the_rest():
    rows, width = 8000, 10
    scores = torch.arange(width, 0, -1.0).expand(rows, width)
    rule = ChoiceRule(0.5, temperature=0, random_share=0.25)  # 5 of 10, of which 1.25 at random on average
    choice = choose(scores, torch.ones(rows, width, dtype=torch.bool), rule, uniform(rows, width + 1, 2))
    by_score, total = choice.by_score.sum(dim=1), choice.mask.sum(dim=1)
    assert (total == 5).all() and set(by_score.tolist()) == {3, 4}
    assert abs((total - by_score).float().mean() - 1.25) < 0.03
    at_random = (choice.mask & ~choice.by_score).float().mean(dim=0)
    assert (at_random[4:] - at_random[4:].mean()).abs().max() < 0.03 and at_random[4:].min() > 0.1


def test_a_slice_of_the_noise_gives_the_same_masks_and_longer_noise_too():
    scores, valid, noise = normal(8, 6), uniform(8, 6, seed=1) < 0.8, uniform(8, 20, 2)
    rule = ChoiceRule(0.4)
    whole = choose(scores, valid, rule, noise).mask
    halves = [choose(scores[rows], valid[rows], rule, noise[rows]).mask for rows in (slice(0, 4), slice(4, 8))]
    assert torch.equal(torch.cat(halves), whole)
    padded = choose(torch.cat([scores, normal(8, 5)], 1), torch.cat([valid, valid[:, :5] & False], 1), rule, noise)
    assert torch.equal(padded.mask[:, :6], whole) and not padded.mask[:, 6:].any()


def test_gumbel_noise_is_finite_at_both_ends():
    ends = gumbel_noise(torch.tensor([0.0, 0.5, 1 - 2**-24, 1.0]))
    assert torch.isfinite(ends).all() and (ends.diff() >= 0).all()
    assert math.isclose(ends[1], -math.log(math.log(2)), rel_tol=1e-6)


def test_synchronised_masks_are_words_first_then_their_patches(texts):
    word_ids, _ = texts
    attention, valid = word_attention(normal(3, 2, 9, 6) * 3, word_ids), valid_words(word_ids)
    scores = standardise(normal(3, 4), valid)
    word_rule, patch_rule = ChoiceRule(0.5), ChoiceRule(0.4)
    word_noise, patch_noise = uniform(3, 30, 2), uniform(3, 7, 2, seed=1)
    text_mask, patch_mask, words = synchronised_masks(
        scores, attention, word_ids, word_rule, patch_rule, word_noise, patch_noise
    )
    chosen, by_score = slow_choose(scores, valid, word_rule, word_noise)
    patch_scores = slow_relative(attention, by_score, valid)  # the words drawn at random are not followed
    everything = torch.ones(3, 6, dtype=torch.bool)
    patches, _ = slow_choose(standardise(patch_scores, everything), everything, patch_rule, patch_noise)
    assert torch.equal(words.mask, chosen) and torch.equal(patch_mask, patches)
    assert torch.equal(text_mask, words_to_tokens(chosen, word_ids))
    assert patch_mask.sum(dim=1).tolist() == [2, 2, 2]


def test_patches_follow_the_words_hard_choice():
    # Word 0 looks at patches 0 and 1, word 1 at 2 and 3; all look at patch 4 alike.
    attention = torch.tensor([[[0.3, 0.3, 0.0, 0.0, 0.4], [0.0, 0.0, 0.3, 0.3, 0.4]]])
    hard = ChoiceRule(0.4, **HARD)
    noise = uniform(1, 6, 2)
    _, patches, _ = synchronised_masks(
        torch.tensor([[-1.0, 1.0]]), attention, torch.tensor([[0, 1]]), hard, hard, noise, noise
    )
    assert patches.tolist() == [[False, False, True, True, False]]


# ---------------------------------------------------------------------------------------------------------- corrupting


def test_corrupt_decides_word_by_word(tiny_config, pairs):
    ids, word_ids = pairs["input_ids"], pairs["word_ids"]
    text_mask = words_to_tokens(uniform(4, 6) < 0.7, word_ids)
    noise = uniform(4, 40, 2, seed=3)
    result = corrupt(ids, word_ids, text_mask, noise, tiny_config)
    for b in range(4):
        for t in range(12):
            wanted = int(ids[b, t])
            if text_mask[b, t]:
                fate = noise[b, word_ids[b, t], 0]
                if fate < 0.8:
                    wanted = tiny_config.mask_token_id
                elif fate < 0.9:
                    wanted = int(noise[b, t, 1] * 60)
            assert result[b, t] == wanted


def test_corrupt_is_80_10_10_and_whole_words(tiny_config):
    rows, ids = 5000, 30
    word_ids = torch.tensor([[0, 0, 0, 1]]).expand(rows, 4)
    result = corrupt(
        torch.full((rows, 4), ids), word_ids, torch.ones(rows, 4, dtype=torch.bool), uniform(rows, 4, 2), tiny_config
    )
    hidden = result == tiny_config.mask_token_id
    assert abs(hidden.float().mean() - 0.8) < 0.02
    # A kept token may also have been drawn at random, once in 60.
    assert abs((result == ids).float().mean() - 0.1) < 0.02
    # Pieces share their word's fate, but are drawn one by one (a drawn piece is [MASK] once in 60).
    pieces = result[:, :3]
    all_hidden, none_hidden = hidden[:, :3].all(dim=1), (~hidden[:, :3]).all(dim=1)
    assert (all_hidden | none_hidden).float().mean() > 0.99
    drawn = pieces[none_hidden & (pieces != ids).any(dim=1)]
    assert drawn.unique().numel() > 50 and (drawn[:, 0] != drawn[:, 1]).float().mean() > 0.9


def test_corrupt_leaves_its_input_alone(tiny_config, pairs):
    before = pairs["input_ids"].clone()
    corrupt(pairs["input_ids"], pairs["word_ids"], pairs["word_ids"] >= 0, uniform(4, 12, 2), tiny_config)
    assert torch.equal(pairs["input_ids"], before)
