import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from syncmask.training.sampler import FeatureBank, GroupedBatchSampler


def make(rows, batch_size, *, rank=0, world_size=1, epoch=3, seed=0):
    sampler = GroupedBatchSampler(rows, batch_size, rank=rank, world_size=world_size)
    sampler.set_order(epoch, np.random.default_rng(seed).permutation(rows))
    return sampler


class Rows(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return self.rows

    def __getitem__(self, key):
        return key


def test_batches_are_stretches_of_the_order_and_the_tail_is_dropped():
    sampler = make(11, 4)
    batches = list(sampler)
    assert len(sampler) == len(batches) == 2
    assert [row for batch in batches for _, row in batch] == sampler.order[:8].tolist()
    assert {epoch for batch in batches for epoch, _ in batch} == {3}
    assert sampler.global_batch() == sampler.order[:4].tolist()


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_hold_contiguous_slices_of_each_global_batch(world_size):
    whole = list(make(29, 8))
    parts = [list(make(29, 8, rank=rank, world_size=world_size)) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        assert [entry for part in parts for entry in part[step]] == batch
        assert {len(part[step]) for part in parts} == {8 // world_size}


def test_length_tells_what_is_left():
    sampler = make(12, 4)
    assert len(sampler) == 3
    sampler.advance()
    assert len(sampler) == len(list(sampler)) == 2
    sampler.advance()
    sampler.advance()
    assert len(sampler) == 0 and list(sampler) == []
    with pytest.raises(RuntimeError, match="no batch left"):
        sampler.advance()
    sampler.set_order(4, np.arange(12))
    assert len(sampler) == 3 and next(iter(sampler))[0] == (4, 0)


def test_without_an_order_there_is_nothing():
    sampler = GroupedBatchSampler(8, 4)
    assert len(sampler) == 0 and list(sampler) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_yields_the_batches_not_used_up_though_workers_fetched_ahead(workers):
    sampler = make(40, 4)
    everything = list(sampler)
    loader = DataLoader(Rows(40), batch_sampler=sampler, collate_fn=list, num_workers=workers)
    used = []
    for batch in loader:
        used.append(batch)
        sampler.advance()
        if len(used) == 3:
            break
    state, tensors = json.loads(json.dumps(sampler.state_dict())), sampler.state_tensors()

    resumed = GroupedBatchSampler(40, 4)
    resumed.load_state_dict(state, tensors)
    assert resumed.epoch == 3 and len(resumed) == 7
    assert used + list(resumed) == everything


def test_advancing_while_iterating_skips_nothing():
    sampler = make(16, 4)
    everything, seen = list(sampler), []
    for batch in sampler:
        seen.append(batch)
        sampler.advance()
    assert seen == everything


def test_resuming_on_another_number_of_processes_keeps_the_global_batches():
    sampler = make(40, 8)
    sampler.advance()
    remaining = list(sampler)
    halves = [GroupedBatchSampler(40, 8, rank=rank, world_size=2) for rank in range(2)]
    for half in halves:
        half.load_state_dict(sampler.state_dict(), sampler.state_tensors())
    assert [first + second for first, second in zip(*map(list, halves))] == remaining


def test_resuming_with_another_corpus_or_batch_is_refused():
    state, tensors = make(40, 8).state_dict(), make(40, 8).state_tensors()
    with pytest.raises(ValueError, match="batch_size is 8, this run's 4"):
        GroupedBatchSampler(40, 4).load_state_dict(state, tensors)
    with pytest.raises(ValueError, match="rows is 40, this run's 41"):
        GroupedBatchSampler(41, 8).load_state_dict(state, tensors)


def test_a_state_before_the_first_order_loads():
    fresh = GroupedBatchSampler(8, 4)
    other = GroupedBatchSampler(8, 4)
    other.load_state_dict(fresh.state_dict(), fresh.state_tensors())
    assert len(other) == 0


def test_fewer_rows_than_a_batch_make_one_smaller_batch():
    for rows in (1, 5):
        sampler = make(rows, 8)
        assert len(sampler) == 1
        assert [len(batch) for batch in sampler] == [rows]
        sampler.advance()
        assert list(sampler) == []


@pytest.mark.parametrize(
    ("rows", "batch_size", "rank", "world_size", "said"),
    [
        (5, 8, 0, 2, "5 rows do not fill one global batch of 8"),
        (0, 8, 0, 1, "0 rows"),
        (40, 9, 0, 2, "cannot be cut evenly for 2"),
        (40, 8, 2, 2, "rank is 2"),
    ],
)
def test_impossible_shapes_are_refused(rows, batch_size, rank, world_size, said):
    with pytest.raises(ValueError, match=said):
        GroupedBatchSampler(rows, batch_size, rank=rank, world_size=world_size)


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 4], [1, 2, 3, 4]])
def test_an_order_that_is_no_permutation_is_refused(order):
    with pytest.raises(ValueError, match="no permutation of 4 rows"):
        GroupedBatchSampler(4, 2).set_order(0, np.array(order))


def test_bank_holds_the_last_features_and_round_trips():
    bank = FeatureBank(6, 4)
    first, second = torch.randn(3, 4), torch.randn(2, 4, dtype=torch.bfloat16)
    bank.update(torch.tensor([0, 3, 5]), first, -first)
    bank.update(torch.tensor([5, 1]), second, second)
    assert bank.seen.tolist() == [True, True, False, True, False, True]
    assert torch.equal(bank.image_feats[3], first[1]) and torch.equal(bank.text_feats[3], -first[1])
    assert torch.equal(bank.image_feats[5], second[0].float())
    assert bank.image_feats.dtype == torch.float32

    other = FeatureBank(6, 4)
    other.load_state_tensors({name: tensor.clone() for name, tensor in bank.state_tensors().items()})
    assert all(torch.equal(other.state_tensors()[name], bank.state_tensors()[name]) for name in bank.state_tensors())


def test_bank_keeps_no_gradient_and_refuses_another_corpus():
    bank = FeatureBank(2, 3)
    feats = torch.ones(1, 3, requires_grad=True)
    bank.update(torch.tensor([0]), feats * 2, feats)
    assert not bank.image_feats.requires_grad
    with pytest.raises(ValueError, match=r"image_feats is \(3, 3\), this run's \(2, 3\)"):
        bank.load_state_tensors(FeatureBank(3, 3).state_tensors())
