"""The order of an epoch in blocks: a permutation, local, with the rules of batches kept, resumed bit for bit."""

import io
import json
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import sparse

from syncmask.processing.corpus import CorpusIndex, load_corpus
from syncmask.training.batches import batch_statistics, random_batches
from syncmask.training.blocks import block_order, cut_blocks
from syncmask.training.grouping import Grouping
from syncmask.training.planning import EpochPlanner
from syncmask.training.sampler import FeatureBank, GroupedBatchSampler


def order(rows, buffer, *, batch_size=8, seed=5, epoch=2, items=None, shards=None):
    """Random batches in blocks; each row is an item of its own unless `items` says otherwise."""
    items = np.arange(rows) if items is None else items

    def order_rows(some, block_seed):
        return random_batches(items[some], items[some], seed=(block_seed, epoch), batch_size=batch_size)

    return block_order(cut_blocks(rows, buffer, shards), order_rows, seed=seed, epoch=epoch, batch_size=batch_size)


# ---------------------------------------------------------------------------------------------- blocks
@pytest.mark.parametrize(("rows", "buffer"), [(1, 1), (10, 3), (12, 4), (7, 100)])
def test_blocks_are_all_rows_in_a_row(rows, buffer):
    blocks = cut_blocks(rows, buffer)
    assert np.concatenate(blocks).tolist() == list(range(rows))
    assert [len(block) for block in blocks[:-1]] == [buffer] * (len(blocks) - 1) and 0 < len(blocks[-1]) <= buffer


def test_blocks_are_of_whole_shards_where_they_fit():
    def sizes(lengths, buffer):
        shards = np.repeat(np.arange(len(lengths)), lengths)
        blocks = cut_blocks(len(shards), buffer, shards)
        assert np.concatenate(blocks).tolist() == list(range(len(shards)))
        return [len(block) for block in blocks]

    assert sizes([3, 3, 3, 3], 7) == [6, 6]
    assert sizes([3, 3, 3, 3], 6) == [6, 6]
    assert sizes([5, 9, 2], 5) == [
        5,
        5,
        4,
        2,
    ]  # a shard larger than a block is cut; its rest goes alone or with whole ones
    assert sizes([5, 9, 2], 6) == [5, 6, 5]
    assert sizes([4], 9) == [4] and sizes([1] * 6, 4) == [4, 2]
    apart = np.array([0, 1, 0, 1, 0])  # rows that were shuffled: each stretch counts as a shard
    assert [len(block) for block in cut_blocks(5, 2, apart)] == [2, 2, 1]


# ----------------------------------------------------------------------------------------------- order
@pytest.mark.parametrize(("rows", "buffer"), [(1, 8), (7, 8), (64, 8), (100, 13), (203, 40), (203, 2000)])
def test_an_order_is_a_permutation_that_follows_from_seed_and_epoch(rows, buffer):
    found = order(rows, buffer)
    assert found.dtype == np.int64 and sorted(found.tolist()) == list(range(rows))
    assert np.array_equal(found, order(rows, buffer))
    if rows > 10:
        assert not np.array_equal(found, order(rows, buffer, epoch=3))
        assert not np.array_equal(found, order(rows, buffer, seed=6))


@pytest.mark.parametrize("rows", [5, 8, 100])
def test_one_block_is_the_order_without_blocks(rows):
    ids = np.arange(rows)
    assert np.array_equal(order(rows, 100), random_batches(ids, ids, seed=(5, 2), batch_size=8))


@pytest.mark.parametrize(("rows", "buffer"), [(200, 8), (204, 13), (220, 40)])
def test_batches_are_made_of_one_block_and_less_than_a_batch_left_over(rows, buffer):
    batch_size, asked = 8, []

    def order_rows(some, seed):
        asked.append(some)
        return np.random.default_rng(seed).permutation(len(some))

    blocks = cut_blocks(rows, buffer)
    found = block_order(blocks, order_rows, seed=0, epoch=0, batch_size=batch_size)
    place, done = 0, set()
    for some in asked:
        (number,) = [n for n, block in enumerate(blocks) if n not in done and np.isin(block, some).all()]
        assert len(some) - len(blocks[number]) < batch_size
        full = len(some) // batch_size * batch_size
        assert set(found[place : place + full]) <= set(some.tolist())
        place, done = place + full, done | {number}
    assert len(done) == len(blocks) and place == rows // batch_size * batch_size


def test_leftovers_are_trained_on_and_only_less_than_a_batch_is_dropped():
    """With blocks of 13 rows and batches of 8, five rows a block would be lost if leftovers were dropped."""
    sampler = GroupedBatchSampler(203, 8)
    dropped = []
    for epoch in range(30):
        sampler.set_order(epoch, order(203, 13, epoch=epoch))
        trained = [row for batch in sampler for _, row in batch]
        assert len(trained) == len(set(trained)) == 200
        dropped.append(set(range(203)) - set(trained))
    assert len(set().union(*dropped)) > 40, "other rows each time"


def test_blocks_smaller_than_a_batch_are_put_together():
    shards = np.repeat(np.arange(20), 3)
    called = []

    def order_rows(rows, seed):
        called.append(len(rows))
        return np.arange(len(rows))

    found = block_order(cut_blocks(60, 4, shards), order_rows, seed=0, epoch=0, batch_size=8)
    assert sorted(found.tolist()) == list(range(60)) and min(called) >= 8 - 4
    with pytest.raises(ValueError, match="got no blocks"):
        block_order([], order_rows, seed=0, epoch=0, batch_size=8)


def test_blocks_of_one_size_are_not_ordered_alike():
    seeds = []
    block_order(
        cut_blocks(60, 10), lambda rows, seed: seeds.append(seed) or np.arange(len(rows)), seed=3, epoch=0, batch_size=5
    )
    assert len(set(seeds)) == 6 and 3 in seeds


def test_blocks_come_in_an_order_of_their_own_each_epoch_and_run():
    def first_rows(seed, epoch):
        found = block_order(
            cut_blocks(80, 8), lambda rows, _: np.arange(len(rows)), seed=seed, epoch=epoch, batch_size=8
        )
        return tuple(found[::8].tolist())

    orders = {first_rows(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9 and {tuple(sorted(one)) for one in orders} == {tuple(range(0, 80, 8))}


def test_no_batch_holds_an_item_twice_though_shards_are_sorted_by_item():
    items = np.arange(400) // 4
    for buffer in (80, 100, 1000):
        found = order(400, buffer, items=items)
        assert batch_statistics(found, items, items, 8)["same_item_pairs"] == 0
    assert batch_statistics(np.arange(400), items, items, 8)["same_item_pairs"] > 0


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_resumed_in_a_block_goes_on_bit_for_bit(world_size):
    whole, resumed = [], []
    for rank in range(world_size):
        sampler = GroupedBatchSampler(203, 8, rank=rank, world_size=world_size)
        sampler.set_order(2, order(203, 40))
        whole.append(list(sampler))
        for _ in range(7):
            sampler.advance()
        state = json.loads(json.dumps(sampler.state_dict()))
        other = GroupedBatchSampler(203, 8, rank=rank, world_size=world_size)
        other.load_state_dict(state, sampler.state_tensors())
        resumed.append(list(other))
    assert [batches[7:] for batches in whole] == resumed and len(resumed[0]) == 18


# --------------------------------------------------------------------------------------------- planner
def planner(rows, index, buffer, *, batch_size=8, seen=1.0, seed=0):
    """An EpochPlanner over random features; texts without common words, so that rule 2 forbids nothing."""
    bank = FeatureBank(len(rows), 16)
    generator = torch.Generator().manual_seed(1)
    images, texts = (torch.randn(len(rows), 16, generator=generator) for _ in range(2))
    known = torch.arange(len(rows))[: int(seen * len(rows))]
    normal = torch.nn.functional.normalize
    bank.update(known, normal(images[known], dim=1), normal(texts[known], dim=1))
    words = sparse.identity(len(index.texts), dtype=np.float32, format="csr")
    data = SimpleNamespace(rows=rows, index=index, texts=words, tau=0.5)
    return EpochPlanner(data, bank, seed, batch_size, None, 1.0, buffer)


@pytest.fixture
def plain(garments):
    rows = garments.select_columns(["image", "text", "item_id"])
    return rows, CorpusIndex.from_dataset(rows)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("seen", [1.0, 0.5])
def test_planner_without_buffer_and_with_a_large_one_agree(grouped, seen, plain):
    rows, index = plain
    without, figures = planner(rows, index, None, seen=seen)(3, grouped)
    within, same_figures = planner(rows, index, len(rows), seen=seen)(3, grouped)
    assert np.array_equal(without, within) and figures == same_figures
    assert ("fallbacks" in figures) == grouped
    for buffer in (8, 9, 40, len(rows) - 1):  # 8 and the last leave less than a batch
        blocked, _ = planner(rows, index, buffer, seen=seen)(3, grouped)
        assert sorted(blocked.tolist()) == list(range(len(rows))) and not np.array_equal(blocked, without)


def test_planner_groups_inside_blocks_by_the_rules(plain):
    rows, index = plain
    plan = planner(rows, index, 40)
    found, figures = plan(1, True)
    assert figures["same_item_pairs"] == 0
    assert np.array_equal(found, plan(1, True)[0]) and not np.array_equal(found, plan(2, True)[0])
    similarity = (plan.bank.image_feats @ plan.bank.text_feats.T).numpy()

    def closeness(rows_in_order):
        batches = rows_in_order[: len(rows_in_order) // 8 * 8].reshape(-1, 8)
        return np.mean([similarity[np.ix_(batch, batch)].mean() for batch in batches])

    assert closeness(found) > closeness(plan(1, False)[0]) + 0.02
    with pytest.raises(ValueError, match="a shuffle buffer of 7 rows holds no global batch of 8; wanted many batches"):
        planner(rows, index, 7)


@pytest.mark.parametrize("grouped", [False, True])
def test_planner_asks_with_what_is_known_of_a_blocks_rows(grouped, plain, monkeypatch):
    rows, index = plain
    plan, calls = planner(rows, index, 40), []
    plan.bank.seen[::3] = False
    row_of = {feats.tobytes(): row for row, feats in enumerate(plan.bank.image_feats.numpy())}

    def grouping(image_feats, text_feats, seen, items, texts, text_rows, **settings):
        some = [row_of[feats.tobytes()] for feats in image_feats.numpy()]
        assert torch.equal(text_feats, plan.bank.text_feats[some]) and torch.equal(seen, plan.bank.seen[some])
        return Grouping(at_random(items, texts, some=some), fallbacks=2)

    def at_random(items, texts, some=None, **settings):
        # Several rows share an item or a text, but no two rows both.
        some = some or [pairs.index(pair) for pair in zip(items.tolist(), texts.tolist(), strict=True)]
        assert np.array_equal(items, index.item_ids[some]) and np.array_equal(texts, index.text_ids[some])
        calls.append(len(some))
        return np.arange(len(some))

    index = CorpusIndex(index.item_ids, np.arange(len(rows)) // 2, [str(n) for n in range(len(rows))])
    index.item_ids[1::2] += 1000
    plan.data.index, pairs = index, list(zip(index.item_ids.tolist(), index.text_ids.tolist(), strict=True))
    monkeypatch.setattr("syncmask.training.planning.plan_epoch", grouping)
    monkeypatch.setattr("syncmask.training.planning.random_batches", at_random)
    _, figures = plan(0, grouped)
    assert len(calls) == 3 and figures.get("fallbacks") == (6 if grouped else None)


def test_planner_keeps_shards_whole(tmp_path):
    photo = io.BytesIO()
    Image.new("RGB", (4, 4)).save(photo, "PNG")
    for number in range(4):
        with tarfile.open(tmp_path / f"train-{number}.tar", "w") as shard:
            for row in range(15):
                for name, content in ((f"{number}-{row}.png", photo.getvalue()), (f"{number}-{row}.txt", b"a hat")):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))
    rows = load_corpus(tmp_path, shares=(1, 0, 0))["train"]
    index = CorpusIndex.from_dataset(rows)
    blocks = planner(rows, index, 32).blocks
    assert [len(block) for block in blocks] == [30] * (len(rows) // 30) + [len(rows) % 30] * bool(len(rows) % 30)
    assert planner(rows, index, None).blocks is None
