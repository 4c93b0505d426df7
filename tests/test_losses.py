import math

import pytest
import torch
import torch.nn.functional as F

from syncmask.losses import itc_loss, itm_loss, match_targets, mim_loss, mlm_loss, soften_targets, wpa_loss


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(*shape, seed=0):
    return F.normalize(normal(*shape, seed=seed), dim=-1)


def assert_same(fast, slow, inputs):
    """Compare two scalars and their gradients with respect to `inputs`."""
    torch.testing.assert_close(fast, slow, check_dtype=False, atol=1e-6, rtol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(fast, inputs), torch.autograd.grad(slow, inputs)):
        torch.testing.assert_close(mine, theirs, check_dtype=False, atol=1e-6, rtol=1e-5)


def log_softmax(values):
    top = max(value.item() for value in values)
    total = sum((value - top).exp() for value in values)
    return [value - top - total.log() for value in values]


# ------------------------------------------------------------------------------------------------------------ targets


def test_match_targets_share_the_mass_of_items_and_texts():
    items, texts = torch.tensor([7, 7, 9, 4]), torch.tensor([0, 1, 2, 2])
    own = slice(1, 3)
    targets = match_targets(items[own], texts[own], items, texts)
    for row, i in enumerate((1, 2)):
        same = [items[i] == items[j] or texts[i] == texts[j] for j in range(4)]
        for j in range(4):
            assert targets[row, j].item() == pytest.approx(float(same[j]) / sum(same))
    assert targets.tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]


def test_rows_of_their_own_give_one_hot_targets():
    ids = torch.arange(5)
    assert torch.equal(match_targets(ids, ids, ids, ids), torch.eye(5))


def test_soft_targets_equal_the_loop_and_stay_distributions():
    targets, similarity = match_targets(*[torch.tensor([0, 1, 0])] * 4), normal(3, 3) * 4
    mixed = soften_targets(targets, similarity, 0.4)
    for i in range(3):
        powers = [math.exp(similarity[i, j]) for j in range(3)]
        for j in range(3):
            assert mixed[i, j].item() == pytest.approx(0.6 * targets[i, j].item() + 0.4 * powers[j] / sum(powers))
    torch.testing.assert_close(mixed.sum(dim=1), torch.ones(3))
    assert torch.equal(soften_targets(targets, similarity, 0.0), targets)


# ---------------------------------------------------------------------------------------------------------------- ITC


def slow_itc(images, texts, all_images, all_texts, temperature, image_targets, text_targets):
    total = 0
    for own, others, targets in ((images, all_texts, image_targets), (texts, all_images, text_targets)):
        for i in range(len(own)):
            logs = log_softmax([(own[i] * others[j]).sum() / temperature[0] for j in range(len(others))])
            total = total - sum(targets[i, j] * logs[j] for j in range(len(others))) / len(own)
    return total / 2


def test_itc_equals_the_loop_with_its_gradients():
    batch, everything = 3, 5
    inputs = [unit(batch, 4), unit(batch, 4, seed=1), unit(everything, 4, seed=2), unit(everything, 4, seed=3)]
    inputs = [tensor.requires_grad_() for tensor in [*inputs, torch.tensor([0.2], dtype=torch.float64)]]
    targets = [normal(batch, everything, seed=seed).softmax(dim=1) for seed in (4, 5)]
    assert_same(itc_loss(*inputs, *[t.float() for t in targets]), slow_itc(*inputs, *targets), inputs)


def test_itc_of_known_features():
    same, hard = torch.ones(4, 1), torch.eye(4)
    one = torch.tensor([1.0])
    assert itc_loss(same, same, same, same, one, hard, hard).item() == pytest.approx(math.log(4))
    apart = torch.eye(4)
    assert itc_loss(apart, apart, apart, apart, torch.tensor([0.01]), hard, hard).item() < 1e-6


def test_itc_is_symmetric_in_the_two_modalities():
    images, texts = unit(4, 3).float(), unit(4, 3, seed=1).float()
    first, second = normal(4, 4, seed=2).softmax(1).float(), normal(4, 4, seed=3).softmax(1).float()
    tau = torch.tensor([0.1])
    one = itc_loss(images, texts, images, texts, tau, first, second)
    torch.testing.assert_close(itc_loss(texts, images, texts, images, tau, second, first), one)


def test_photos_of_one_item_are_not_pushed_apart():
    """Two photos of an item whose text both fit: the loss is at its least when both are equally near."""
    texts = torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0]])
    targets = match_targets(*[torch.tensor([0, 0, 1])] * 4)
    images = texts.clone().requires_grad_()
    itc_loss(images, texts, images, texts, torch.tensor([0.1]), targets, targets).backward()
    torch.testing.assert_close(images.grad[0], images.grad[1])


def test_itc_compares_in_fp32_under_autocast():
    images, texts = unit(6, 8).float(), unit(6, 8, seed=1).float()
    arguments = (images, texts, images, texts, torch.tensor([0.01]), torch.eye(6), torch.eye(6))
    with torch.autocast("cpu", torch.bfloat16):
        inside = itc_loss(*arguments)
    assert inside.dtype == torch.float32 and torch.equal(inside, itc_loss(*arguments))


# ---------------------------------------------------------------------------------------------------------------- ITM


def slow_itm(logits, is_match, valid):
    losses = [-log_softmax(list(logits[r]))[int(is_match[r])] for r in range(len(logits)) if valid[r]]
    return sum(losses) / len(losses)


def test_itm_equals_the_loop_with_its_gradients():
    logits = normal(6, 2).requires_grad_()
    is_match, valid = torch.tensor([1, 1, 0, 0, 0, 0]).bool(), torch.tensor([1, 1, 1, 0, 1, 0]).bool()
    assert_same(itm_loss(logits, is_match, valid), slow_itm(logits, is_match, valid), [logits])


def test_pairs_that_do_not_exist_have_no_gradient():
    logits = normal(4, 2).requires_grad_()
    itm_loss(logits, torch.tensor([1, 0, 0, 0]).bool(), torch.tensor([1, 0, 1, 0]).bool()).backward()
    assert (logits.grad[[1, 3]] == 0).all() and (logits.grad[[0, 2]] != 0).all()
    assert itm_loss(logits, torch.ones(4).bool(), torch.zeros(4).bool()).item() == 0


def test_itm_of_flat_logits_is_ln_2():
    assert itm_loss(torch.zeros(3, 2), torch.tensor([1, 0, 0]).bool(), torch.ones(3).bool()).item() == pytest.approx(
        math.log(2)
    )


# --------------------------------------------------------------------------------------------------------- MLM and MIM


def test_mlm_equals_the_loop_with_its_gradients():
    logits, targets = normal(5, 7).requires_grad_(), torch.tensor([0, 6, 3, 3, 1])
    slow = -sum(log_softmax(list(logits[m]))[targets[m]] for m in range(5)) / 5
    assert_same(mlm_loss(logits, targets), slow, [logits])


def test_mlm_without_hidden_tokens_is_0_and_has_a_gradient():
    logits = torch.zeros(0, 7, requires_grad=True)
    loss = mlm_loss(logits, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None


def test_mim_equals_the_loop_with_its_gradients():
    predictions, targets = normal(2, 3, 4).requires_grad_(), normal(2, 3, 4, seed=1)
    slow = sum((predictions[b, k, d] - targets[b, k, d]) ** 2 for b in range(2) for k in range(3) for d in range(4))
    assert_same(mim_loss(predictions, targets), slow / 24, [predictions])


def test_losses_of_bf16_inputs_are_fp32():
    assert mlm_loss(torch.zeros(2, 7, dtype=torch.bfloat16), torch.tensor([1, 2])).dtype == torch.float32
    assert mim_loss(torch.zeros(1, 2, 3, dtype=torch.bfloat16), torch.zeros(1, 2, 3)).dtype == torch.float32
    logits = torch.zeros(2, 2, dtype=torch.bfloat16)
    assert itm_loss(logits, torch.tensor([True, False]), torch.ones(2).bool()).dtype == torch.float32


# ----------------------------------------------------------------------------------------------- word-patch alignment


def test_wpa_loss_equals_the_loop_over_words_and_photos():
    fits = normal(4, 3, seed=5).requires_grad_()
    # Word 0 is in two texts, word 1 in all of them and word 2 in one.
    present = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 1, 1], [0, 1, 0]]).bool()
    losses = []
    for word in (0, 2):
        logs = log_softmax(list(fits[:, word]))
        losses += [-logs[photo] for photo in range(4) if present[photo, word]]
    assert len(losses) == 3
    assert_same(wpa_loss(fits, present), sum(losses) / 3, [fits])


def test_wpa_loss_of_words_that_tell_no_photos_apart_is_0_and_differentiable():
    fits = normal(1, 3).requires_grad_()
    loss = wpa_loss(fits, torch.ones(1, 3, dtype=torch.bool))
    assert loss == 0 and torch.equal(torch.autograd.grad(loss, fits)[0], torch.zeros_like(fits))


def test_wpa_loss_at_chance_is_the_log_of_the_photos_and_does_not_see_a_words_level():
    present = torch.eye(5, 7).bool()
    assert wpa_loss(torch.zeros(5, 7), present).item() == pytest.approx(math.log(5))
    fits = normal(5, 7)
    torch.testing.assert_close(wpa_loss(fits + normal(1, 7, seed=1), present), wpa_loss(fits, present))
