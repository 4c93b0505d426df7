import numpy as np
import pytest
import torch
from scipy import sparse

from syncmask.training.batches import (
    batch_statistics,
    deal_rows,
    find_partner,
    is_conflict,
    random_batches,
    repeats,
    separate_rows,
)
from syncmask.training.grouping import (
    greedy_walk,
    group_batches,
    not_semi_hard,
    plan_epoch,
    same_item_or_text,
    similarities,
    too_alike,
)
from syncmask.training.partition import MOST_CLUSTERS, kmeans, small_clusters, split_into_parts


def features(rows, dim=16, *, items=None, seed=0):
    """Unit image and text features; photos of one item lie close to one another."""
    generator = torch.Generator().manual_seed(seed)
    item_ids = torch.arange(rows) if items is None else torch.arange(rows) % items
    centres = torch.randn(int(item_ids.max()) + 1, dim, generator=generator)[item_ids]
    noisy = [centres + 0.6 * torch.randn(rows, dim, generator=generator) for _ in range(2)]
    return *(torch.nn.functional.normalize(feats, dim=1) for feats in noisy), item_ids.numpy()


def random_text_rows(texts, words=60, *, seed=0):
    rng = np.random.default_rng(seed)
    dense = (rng.random((texts, words)) < 0.1) * rng.random((texts, words))
    dense[:, 0] += 0.1
    return sparse.csr_matrix(dense / np.linalg.norm(dense, axis=1, keepdims=True), dtype=np.float32)


def group(image_feats, text_feats, item_ids, text_ids=None, text_rows=None, **settings):
    text_ids = item_ids if text_ids is None else text_ids
    settings = {"seed": 0, "batch_size": 8, "tau": None if text_rows is None else 0.4} | settings
    return group_batches(image_feats, text_feats, item_ids, text_ids, text_rows, **settings)


def directions(image_feats, text_feats):
    """In memory larger than is needed, of another part before."""
    memory = torch.full((2, len(image_feats) ** 2 + 5), torch.nan)
    return similarities(image_feats, text_feats, memory)


def slow_grit_walk(image_feats, text_feats, start):
    """The published alternating walk, on plain similarities: one pair of rows at a time, no rules."""
    similarity = (image_feats @ text_feats.T).tolist()
    left, order, image_turn = set(range(len(similarity))) - {start}, [start], True
    while left:
        here = order[-1]
        score = {j: similarity[here][j] if image_turn else similarity[j][here] for j in sorted(left)}
        order.append(max(score, key=score.get))
        left.remove(order[-1])
        image_turn = not image_turn
    return order


def slow_ruled_walk(similarity, rule1, rules, batch_size, start):
    """The same walk, asking the rules of each row of the batch being filled."""
    rows, order, fallbacks, forced = len(similarity), [start], 0, 0
    while len(order) < rows:
        batch = order[len(order) // batch_size * batch_size :]
        here, image_turn = order[-1], len(order) % 2 == 1
        left = [j for j in range(rows) if j not in order]
        allowed = [j for j in left if not any(rules[i][j] for i in batch)]
        if not allowed:
            allowed = [j for j in left if not any(rule1[i][j] for i in batch)]
            fallbacks, forced = (fallbacks + 1, forced) if allowed else (fallbacks, forced + 1)
        scores = [similarity[here][j] if image_turn else similarity[j][here] for j in allowed or left]
        order.append((allowed or left)[int(np.argmax(scores))])
    return order, fallbacks, forced


@pytest.mark.parametrize("rows", [1, 2, 5, 33, 64])
def test_walk_without_rules_is_the_published_one(rows):
    image_feats, text_feats, ids = features(rows)
    nothing = same_item_or_text(ids, ids)
    walk = greedy_walk(directions(image_feats, text_feats), nothing, nothing, 8, start=rows // 2)
    assert walk.order.tolist() == slow_grit_walk(image_feats, text_feats, rows // 2)
    assert (walk.fallbacks, walk.forced) == (0, 0)


def test_one_part_and_one_batch_is_the_published_walk():
    image_feats, text_feats, ids = features(40)
    order = group(image_feats, text_feats, ids, batch_size=40).order
    assert order.tolist() == slow_grit_walk(image_feats, text_feats, int(order[0]))


@pytest.mark.parametrize(("batch_size", "seed"), [(6, 0), (12, 1), (24, 2), (48, 3)])
def test_ruled_walk_equals_the_loop(batch_size, seed):
    image_feats, text_feats, items = features(48, items=20, seed=seed)
    similarity = (image_feats @ text_feats.T).numpy()
    alike = np.random.default_rng(seed).random((48, 48)) < 0.06
    # A quarter of the rows forbids none but itself.
    alike[36:] = alike[:, 36:] = False
    items[36:] = range(100, 112)
    rule1 = same_item_or_text(items, items)
    rules = rule1 | alike | alike.T
    walk = greedy_walk((similarity, similarity.T), rule1, rules, batch_size, start=5)
    order, fallbacks, forced = slow_ruled_walk(similarity, rule1, rules, batch_size, 5)
    assert walk.order.tolist() == order
    assert (walk.fallbacks, walk.forced) == (fallbacks, forced)
    assert fallbacks + forced > 0, "the case is meant to reach the fallbacks"


@pytest.mark.parametrize("density", [0.02, 0.3, 0.6])
def test_ruled_walk_equals_the_loop_where_rules_are_dense_and_fallbacks_follow_one_another(density):
    """Several fallbacks in a batch, and none in the next: what is remembered of rule 1 must be of this batch."""
    image_feats, text_feats, items = features(60, items=12, seed=4)
    similarity = (image_feats @ text_feats.T).numpy()
    rule1 = same_item_or_text(items, items)
    fallbacks = 0
    for seed in range(4):
        alike = np.random.default_rng(seed).random((60, 60)) < density
        rules = rule1 | alike | alike.T
        walk = greedy_walk((similarity, similarity.T), rule1, rules, 12, start=seed)
        assert (walk.order.tolist(), walk.fallbacks, walk.forced) == slow_ruled_walk(similarity, rule1, rules, 12, seed)
        fallbacks += walk.fallbacks
    assert fallbacks, "the case is meant to reach them"


def test_rule_1_of_large_numbers_equals_the_definition():
    rng = np.random.default_rng(0)
    items, texts = (rng.integers(0, 9, 40) * 2**33 for _ in range(2))
    expected = [[items[i] == items[j] or texts[i] == texts[j] for j in range(40)] for i in range(40)]
    assert np.array_equal(same_item_or_text(items, texts), expected)


def test_similarities_are_the_product_and_its_transpose():
    image_feats, text_feats, _ = features(33)
    by_image, by_text = directions(image_feats, text_feats)
    assert np.array_equal(by_image, (image_feats @ text_feats.T).numpy())
    assert np.array_equal(by_text, by_image.T) and by_text.flags.c_contiguous


def test_an_extreme_scale_revisits_no_row():
    image_feats, text_feats, ids = features(200)
    nothing = same_item_or_text(ids, ids)
    plain = greedy_walk(directions(image_feats, text_feats), nothing, nothing, 8, 0).order
    assert np.array_equal(greedy_walk(directions(image_feats * 1024, text_feats), nothing, nothing, 8, 0).order, plain)


def test_overlap_rule_equals_the_definition():
    rows = random_text_rows(400, words=700)
    text_ids = np.random.default_rng(1).integers(0, 400, 90)
    overlap = (rows @ rows.T).toarray()
    for tau in (0.35, 0.15):
        expected = [[overlap[i, j] >= tau for j in text_ids] for i in text_ids]
        found = too_alike(text_ids, rows, tau)
        distinct = text_ids[:, None] != text_ids
        assert np.array_equal(found & distinct, np.array(expected) & distinct)
    assert (found & distinct).any()


def test_margin_rule_equals_the_definition(monkeypatch):
    monkeypatch.setattr("syncmask.training.grouping.FEW", 5)
    similarity = np.random.default_rng(0).random((12, 12)).astype(np.float32)
    found = not_semi_hard((similarity, similarity.T), 0.1)
    for i in range(12):
        for j in range(12):
            own = min(similarity[i, i], similarity[j, j]) - np.float32(0.1)
            assert found[i, j] == (similarity[i, j] >= own or similarity[j, i] >= own)


@pytest.mark.parametrize("rows", [1, 3, 7, 8, 9, 16, 100, 333])
@pytest.mark.parametrize("items", [1, 2, 50])
def test_order_is_a_permutation_at_any_size(rows, items):
    image_feats, text_feats, ids = features(rows, items=items)
    grouping = group(image_feats, text_feats, ids, text_rows=random_text_rows(50), part_size=32)
    assert sorted(grouping.order.tolist()) == list(range(rows))
    assert grouping.grouped == rows // 8 * 8


def test_same_order_again_and_another_with_another_seed():
    image_feats, text_feats, items = features(300)
    first, again, other = (group(image_feats, text_feats, items, part_size=64, seed=s).order for s in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert set(first[296:]) != set(other[296:]), "the tail must change"


def test_rules_hold_within_every_batch():
    image_feats, text_feats, items = features(960, items=320)
    rows = random_text_rows(320)
    grouping = group(image_feats, text_feats, items, text_rows=rows, tau=0.6, part_size=320)
    assert batch_statistics(grouping.order, items, items, 8)["same_item_pairs"] == 0
    assert grouping.conflicts == 0
    overlap = (rows @ rows.T).toarray()
    texts = items[grouping.order].reshape(-1, 8)
    close = sum(int((np.triu(overlap[np.ix_(batch, batch)], 1) >= 0.6).sum()) for batch in texts)
    without = items[group(image_feats, text_feats, items, part_size=320).order].reshape(-1, 8)
    free = sum(int((np.triu(overlap[np.ix_(batch, batch)], 1) >= 0.6).sum()) for batch in without)
    # What is left comes from fallbacks and from the swaps that keep rule 1.
    assert close <= 8 * (grouping.fallbacks + grouping.forced) and close < 0.3 * free


def test_what_the_walk_must_force_is_swapped_away():
    """Six photos an item: the last batch of a part is left with photos of few items."""
    image_feats, text_feats, items = features(240, items=40)
    grouping = group(image_feats, text_feats, items, batch_size=16)
    assert grouping.forced > 0 and grouping.conflicts == 0
    assert slow_conflicts(grouping.order, items, items, 16) == 0


def test_margin_keeps_batches_apart():
    image_feats, text_feats, items = features(480, items=480)

    def too_hard(order):
        similarity = (image_feats @ text_feats.T).numpy()
        rule = not_semi_hard((similarity, similarity.T), 0.2)
        return sum(int(np.triu(rule[np.ix_(batch, batch)], 1).sum()) for batch in order.reshape(-1, 8))

    plain, ruled = group(image_feats, text_feats, items), group(image_feats, text_feats, items, margin=0.2)
    assert too_hard(ruled.order) < 0.3 * too_hard(plain.order)


def test_grouped_batches_are_harder_than_random_ones():
    image_feats, text_feats, items = features(960, items=480)

    def hardness(order):
        batches = torch.from_numpy(order[:960].reshape(-1, 8))
        similarity = image_feats[batches] @ text_feats[batches].mT
        return similarity.masked_fill(torch.eye(8, dtype=torch.bool), -2).amax(2).mean()

    shuffled = random_batches(items, items, seed=0, batch_size=8)
    assert hardness(group(image_feats, text_feats, items, part_size=320).order) > hardness(shuffled) + 0.1


def test_parts_are_whole_batches_of_about_the_size_asked():
    points = torch.cat(features(5000)[:2])
    parts = split_into_parts(points, 50, 1000, np.random.default_rng(0))
    assert sorted(np.concatenate(parts).tolist()) == list(range(10000))
    assert all(len(part) % 50 == 0 and len(part) <= 1500 for part in parts)
    assert np.median([len(part) for part in parts]) > 500


def test_parts_of_equal_points_and_of_batches_above_the_part_size():
    equal = torch.ones(4000, 4)
    parts = split_into_parts(equal, 10, 100, np.random.default_rng(0))
    assert max(len(part) for part in parts) <= 200 and sum(len(part) for part in parts) == 4000
    large = split_into_parts(features(4096)[0], 512, 100, np.random.default_rng(0))
    assert all(len(part) % 512 == 0 and len(part) <= 3 * 512 for part in large)
    with pytest.raises(ValueError, match="no multiple"):
        split_into_parts(equal[:15], 10, 100, np.random.default_rng(0))


def test_some_rows_of_a_corpus_are_ordered_as_if_they_were_all():
    """Numbers of rows in place of a copy of their features: the same order, and untouched rows may hold anything."""
    image_feats, text_feats, items = features(120, items=40)
    rows = np.random.default_rng(0).permutation(120)[:67]
    alone = group(image_feats[rows], text_feats[rows], items[rows])
    image_feats[np.setdiff1d(np.arange(120), rows)] = torch.nan
    among = group(image_feats, text_feats, items, rows=rows)
    assert np.array_equal(among.order, rows[alone.order])
    assert (among.fallbacks, among.forced) == (alone.fallbacks, alone.forced)


def test_half_precision_in_a_mapped_file_gives_the_order_of_the_same_numbers(tmp_path):
    image_feats, text_feats, items = features(400, items=200)
    mapped = []
    for name, feats in {"image": image_feats, "text": text_feats}.items():
        np.save(tmp_path / f"{name}.npy", feats.half().numpy())
        mapped.append(np.load(tmp_path / f"{name}.npy", mmap_mode="c"))
    order = group(*mapped, items, batch_size=40, part_size=1000).order
    rounded = [feats.half().float() for feats in (image_feats, text_feats)]
    assert np.array_equal(order, group(*rounded, items, batch_size=40, part_size=1000).order)
    assert sorted(group(*mapped, items, part_size=64).order.tolist()) == list(range(400))


def test_many_clusters_are_made_in_two_levels(monkeypatch):
    asked = []

    def recorded(points, clusters, rng):
        asked.append((len(points), clusters))
        return kmeans(points, clusters, rng)

    monkeypatch.setattr("syncmask.training.partition.kmeans", recorded)
    rows = 8 * (MOST_CLUSTERS + 33)
    pieces = small_clusters(features(rows)[0], np.arange(rows), 8, np.random.default_rng(0))
    assert asked[0] == (rows, 17) and max(clusters for _, clusters in asked[1:]) < 60
    assert sorted(np.concatenate([piece for piece, _ in pieces]).tolist()) == list(range(rows))


def test_plan_puts_unseen_rows_in_random_batches_and_all_rows_somewhere():
    image_feats, text_feats, items = features(500, items=250)
    seen = np.ones(500, dtype=bool)
    seen[:100] = False
    image_feats[:100] = text_feats[:100] = 0
    plan = make_plan(image_feats, text_feats, seen, items)
    assert sorted(plan.order.tolist()) == list(range(500))
    assert plan.grouped == 392 and plan.conflicts == 0
    assert seen[plan.order[496:]].all(), "unseen rows must not be dropped again"


def make_plan(image_feats, text_feats, seen, items, *, epoch=1, batch_size=8):
    settings = {"seed": 0, "epoch": epoch, "batch_size": batch_size, "tau": None, "part_size": 128}
    return plan_epoch(image_feats, text_feats, seen, items, items, None, **settings)


def test_no_row_is_left_out_for_ever():
    """Rows dropped in the first epoch have no features; the tail must not drop them again and again."""
    image_feats, text_feats, items = features(100, items=60)
    seen = torch.zeros(100, dtype=torch.bool)
    for epoch in range(2):
        seen[make_plan(image_feats, text_feats, seen, items, epoch=epoch, batch_size=32).order[:96]] = True
    assert seen.all()


def test_plan_without_any_features_is_random_and_differs_by_epoch():
    image_feats, text_feats, items = features(64, items=40)
    unseen = np.zeros(64, dtype=bool)
    first, second = (make_plan(image_feats, text_feats, unseen, items, epoch=e) for e in (0, 1))
    assert first.grouped == 0 and first.conflicts == 0
    assert not np.array_equal(first.order, second.order)
    assert make_plan(image_feats[:5], text_feats[:5], unseen[:5], items[:5]).order.shape == (5,)


def test_batches_of_the_plan_are_shuffled_together():
    image_feats, text_feats, items = features(800, items=800)
    seen = np.arange(800) >= 400
    order = make_plan(image_feats, text_feats, seen, items).order.reshape(-1, 8)
    at_random = [batch for batch, rows in enumerate(order) if (rows < 400).all()]
    assert len(at_random) == 50 and max(at_random) > 70 and min(at_random) < 30


def test_features_that_diverged_are_refused():
    image_feats, text_feats, items = features(16)
    image_feats[3, 2] = torch.nan
    with pytest.raises(ValueError, match="image features hold NaN"):
        group(image_feats, text_feats, items)
    with pytest.raises(ValueError, match=r"must both be \(16, D\)"):
        group(text_feats[:4], text_feats, items)
    with pytest.raises(ValueError, match="go together"):
        group(text_feats, text_feats, items, text_rows=random_text_rows(16), tau=None)


def slow_conflicts(order, items, texts, batch_size):
    used = len(order) // batch_size * batch_size or len(order)
    conflicts = 0
    for start in range(0, used, batch_size):
        batch = order[start : min(used, start + batch_size)]
        for k, row in enumerate(batch):
            conflicts += any(items[row] == items[other] or texts[row] == texts[other] for other in batch[:k])
    return conflicts


def test_nine_thousand_rows_of_three_thousand_items_have_no_conflict():
    items = np.arange(9000) % 3000
    order = random_batches(items, items, seed=0, batch_size=64)
    assert sorted(order.tolist()) == list(range(9000))
    assert batch_statistics(order, items, items, 64)["same_item_pairs"] == 0


@pytest.mark.parametrize(("photos", "items_count", "batch_size"), [(10, 64, 64), (4, 16, 16), (7, 33, 32)])
def test_tight_corpora_are_separated_where_that_is_possible(photos, items_count, batch_size):
    """As many photos of each item as batches: each batch must hold every item exactly once."""
    items = np.arange(photos * items_count) % items_count
    order = random_batches(items, items, seed=1, batch_size=batch_size)
    assert slow_conflicts(order, items, items, batch_size) == 0


def test_the_tail_takes_the_surplus_of_an_item_with_too_many_photos():
    items = np.array([0] * 7 + list(range(1, 29)))
    for seed in range(20):
        order = random_batches(items, items, seed=seed, batch_size=8)
        assert slow_conflicts(order, items, items, 8) == 0
        dealt = deal_rows(items, items, 8, np.random.default_rng(seed))
        assert slow_conflicts(dealt, items, items, 8) == 0 and sorted(dealt) == list(range(35))


def test_an_item_with_no_more_photos_than_batches_never_meets_itself():
    rng = np.random.default_rng(0)
    for seed in range(150):
        batch_size, batches = int(rng.choice([2, 3, 8])), int(rng.integers(2, 9))
        items = np.repeat(np.arange(batch_size * batches), rng.integers(1, batches + 1))[: batch_size * batches]
        order = random_batches(items, items, seed=seed, batch_size=batch_size)
        assert slow_conflicts(order, items, items, batch_size) == 0


def test_dealing_solves_what_swaps_do_not():
    """Every batch must hold each item once, and some photos bear the next item's text: swaps alone get stuck."""
    items = np.repeat(np.arange(4), 6)
    texts = np.where(np.arange(24) % 3 == 0, items + 1, items)
    stuck = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        stuck += separate_rows(rng.permutation(24), items, texts, 4, rng)[1] > 0
        order = random_batches(items, texts, seed=seed, batch_size=4)
        assert slow_conflicts(order, items, texts, 4) == 0
    assert stuck > 10, "the case is meant to need dealing"


def test_a_partner_is_found_exactly_where_one_swap_helps():
    rng = np.random.default_rng(0)
    found = missing = 0
    for _ in range(60):
        items, texts = rng.integers(0, 14, 35), rng.integers(0, 20, 35)
        for position in np.flatnonzero([is_conflict(place, items, texts, 8) for place in range(32)]):
            partner = find_partner(position, items, texts, 8, rng)
            helpful = []
            for other in range(35):
                if other // 8 == position // 8:
                    continue
                after = np.arange(35)
                after[[position, other]] = other, position
                ends = [place for place in (position, other) if place < 32]
                if not any(is_conflict(place, items[after], texts[after], 8) for place in ends):
                    helpful.append(other)
            assert partner in helpful or (partner == -1 and not helpful)
            found, missing = found + bool(helpful), missing + (not helpful)
    assert found and missing


def test_texts_shared_by_items_are_separated_too():
    rng = np.random.default_rng(0)
    items = np.repeat(np.arange(300), 2)
    texts = rng.integers(0, 150, 300)[items]
    order = random_batches(items, texts, seed=0, batch_size=16)
    assert slow_conflicts(order, items, texts, 16) == 0


def test_what_cannot_be_separated_is_counted_right():
    items = np.array([0] * 30 + [1] * 10)
    order, conflicts = separate_rows(np.arange(40), items, np.arange(40), 8, np.random.default_rng(0))
    assert conflicts == slow_conflicts(order, items, np.arange(40), 8) > 0
    assert sorted(order.tolist()) == list(range(40))


@pytest.mark.parametrize(("rows", "batch_size"), [(50, 8), (5, 8), (0, 8), (24, 8)])
def test_repeats_are_the_later_ones_of_a_batch(rows, batch_size):
    items, texts = np.random.default_rng(0).integers(0, 6, (2, rows))
    found = repeats(items, texts, batch_size)
    used = rows // batch_size * batch_size or rows
    for position in range(rows):
        before = slice(position // batch_size * batch_size, position)
        again = items[position] in items[before] or texts[position] in texts[before]
        assert found[position] == (again and position < used)


def test_statistics_equal_a_loop():
    rng = np.random.default_rng(0)
    items, texts, order = rng.integers(0, 9, 50), rng.integers(0, 12, 50), rng.permutation(50)
    expected = {"batches": 6, "pairs": 6 * 28, "same_item_pairs": 0, "same_text_pairs": 0}
    for start in range(0, 48, 8):
        batch = order[start : start + 8]
        for k, row in enumerate(batch):
            expected["same_item_pairs"] += sum(items[row] == items[other] for other in batch[:k])
            expected["same_text_pairs"] += sum(texts[row] == texts[other] for other in batch[:k])
    assert batch_statistics(order, items, texts, 8) == expected


def test_a_hopeless_corpus_ends_with_a_permutation():
    """All rows of one item: without a limit the search for partners would take minutes here."""
    items = np.zeros(20000, dtype=np.int64)
    order = random_batches(items, items, seed=0, batch_size=64)
    assert len(np.unique(order)) == 20000
