import math

import pytest
import torch
from torch import nn

from syncmask.training import optim
from syncmask.training.optim import lr_factor, make_optimizer, make_schedule, parameter_groups


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.word_embeddings = nn.Embedding(5, 4)
        self.position_embeddings = nn.Embedding(5, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.log_temperature = nn.Parameter(torch.zeros(1, 1))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def group_names(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [sorted(names[id(parameter)] for parameter in group["params"]) for group in groups]


def test_what_decays_and_what_does_not():
    model = Model()
    groups = parameter_groups(model, 0.02)
    decaying, still = group_names(model, groups)
    assert decaying == ["linear.weight", "word_embeddings.weight"]
    assert still == [
        "cls_token",
        "linear.bias",
        "log_temperature",
        "norm.bias",
        "norm.weight",
        "position_embeddings.weight",
    ]
    assert [group["weight_decay"] for group in groups] == [0.02, 0.0]


def test_tied_parameters_are_listed_once():
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    assert [len(group["params"]) for group in parameter_groups(model, 0.1)] == [1]


def test_a_frozen_model_is_refused():
    with pytest.raises(ValueError, match="no parameter is trainable"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), 0.1)


def test_without_gradient_only_decaying_weights_shrink():
    model = Model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, 0.1, 0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        share = 1 - 0.1 * 0.5 if name in ("linear.weight", "word_embeddings.weight") else 1.0
        torch.testing.assert_close(parameter.data, before[name] * share)


def test_adamw_is_fused_and_falls_back_where_that_is_not_supported(monkeypatch):
    assert make_optimizer(Model(), 0.1, 0.1).defaults["fused"]

    class Unfused(torch.optim.AdamW):
        def __init__(self, *args, fused=False, **settings):
            if fused:
                raise RuntimeError("`fused=True` requires all the params to be ...")
            super().__init__(*args, **settings)

    monkeypatch.setattr(optim, "AdamW", Unfused)
    assert not make_optimizer(Model(), 0.1, 0.1).defaults["fused"]


def test_schedule_equals_its_definition():
    warmup, total, floor = 4, 20, 0.1
    assert [lr_factor(step, warmup, total, floor) for step in range(4)] == [0.2, 0.4, 0.6, 0.8]
    assert lr_factor(4, warmup, total, floor) == 1.0
    assert lr_factor(12, warmup, total, floor) == pytest.approx((1 + floor) / 2)
    assert lr_factor(20, warmup, total, floor) == lr_factor(500, warmup, total, floor) == floor
    for step in range(4, 20):
        cosine = (1 + math.cos(math.pi * (step - 4) / 16)) / 2
        assert lr_factor(step, warmup, total, floor) == pytest.approx(floor + (1 - floor) * cosine)
        assert lr_factor(step + 1, warmup, total, floor) < lr_factor(step, warmup, total, floor)


@pytest.mark.parametrize(("warmup", "total"), [(0, 0), (0, 1), (5, 5), (9, 3)])
def test_schedules_with_no_room_for_a_cosine_stay_in_bounds(warmup, total):
    for step in range(12):
        assert 0 <= lr_factor(step, warmup, total) <= 1
    assert lr_factor(0, warmup, total) > 0


def test_the_scheduler_sets_every_group():
    optimizer = make_optimizer(Model(), 0.5, 0.1)
    schedule = make_schedule(optimizer, 1, 5)
    seen = []
    for _ in range(3):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert seen[0] == [0.25, 0.25] and seen[1] == [0.5, 0.5]
    assert seen[2][0] == pytest.approx(0.5 * lr_factor(2, 1, 5))
