"""The fast step and the plain one that it is timed against: equal losses, gradients and next weights."""

import pytest
import torch

from benchmarks.plain_step import PlainStep
from benchmarks.training_step import OurStep, count_flops, draw_inputs
from syncmask import SyncMaskConfig, SyncMaskForPreTraining


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SyncMaskForPreTraining(SyncMaskConfig.tiny(image_size=32, vocab_size=300))


@pytest.fixture
def sides(model):
    """Both from the same weights, a teacher that differs from them, and a batch with a padded text."""
    plain, ours = PlainStep(model, dropout=0.0), OurStep(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in ours.teacher.model.named_parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
            if name in plain.teacher:
                plain.teacher[name].copy_(parameter)
    inputs = draw_inputs(model, batch=5, length=12)
    inputs.attention_mask[3, 10:] = 0
    inputs.text_mask[3, 10:] = False
    return plain, ours, inputs


def test_losses_and_gradients_are_equal(sides, model):
    plain, ours, inputs = sides
    expected, found = plain.losses(inputs), ours.losses(inputs)
    assert found.keys() == expected.keys() == {"itc", "itm", "mlm"}
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)
    sum(expected.values()).backward()
    sum(found.values()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, weight in plain.student.items():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name
        torch.testing.assert_close(gradients[name], weight.grad, atol=1e-5, rtol=1e-4)


def test_a_teacher_that_is_left_out_changes_the_losses(sides):
    plain, ours, inputs = sides
    ours.alpha = 0.0
    found, expected = ours.losses(inputs), plain.losses(inputs)
    assert abs(found["mlm"] - expected["mlm"]) > 1e-4 and abs(found["itc"] - expected["itc"]) > 1e-4


def test_weights_and_teacher_after_a_step_are_equal(sides, model):
    plain, ours, inputs = sides
    plain.step(inputs)
    ours.step(inputs)
    after, teacher = dict(model.named_parameters()), dict(ours.teacher.model.named_parameters())
    for name, weight in plain.student.items():
        if after[name].ndim > 1 and "position" not in name and "cls_token" not in name:  # ours decays matrices alone
            torch.testing.assert_close(after[name], weight, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(teacher[name], plain.teacher[name], atol=2e-5, rtol=1e-4)


def test_the_counter_counts_attention():
    query = torch.randn(2, 3, 5, 8, requires_grad=True)

    def attend():
        torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()

    forward = 2 * 2 * 2 * 3 * 5 * 5 * 8  # two products of (5, 8, 5), two operations a multiply-add
    assert count_flops(attend) >= 3 * forward
