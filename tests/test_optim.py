import math

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from syncmask.training import optim
from syncmask.training.optim import (
    layer_scales,
    lr_factor,
    make_optimizer,
    make_schedule,
    parameter_groups,
    tower_layers,
)


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


# -------------------------------------------------------------------------------------------- layer-wise learning rates

LAYERS = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
# Family -> the name of its stack of layers, of a parameter of its embeddings, and of one that stands behind the layers.
FAMILIES = {
    "vit": ("layers", "embeddings.cls_token", "layernorm.weight"),
    "deit": ("layers", "embeddings.distillation_token", "layernorm.weight"),
    "clip_vision_model": ("encoder.layers", "pre_layrnorm.weight", "post_layernorm.weight"),
    "siglip_vision_model": ("encoder.layers", "embeddings.position_embedding.weight", "post_layernorm.weight"),
    "dinov2": ("encoder.layer", "embeddings.position_embeddings", "layernorm.weight"),
    "bert": ("encoder.layer", "embeddings.word_embeddings.weight", None),
    "roberta": ("encoder.layer", "embeddings.word_embeddings.weight", None),
    "distilbert": ("transformer.layer", "embeddings.word_embeddings.weight", None),
    "modernbert": ("layers", "embeddings.tok_embeddings.weight", "final_norm.weight"),
}


class TwoTowers(nn.Module):
    """What `layer_scales` asks of a model: towers in its base, and something beside them."""

    def __init__(self, vision, text):
        super().__init__()
        self.vision_model, self.text_model, self.head = vision, text, nn.Linear(4, 2)

    @property
    def base_model(self):
        return self


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_of_a_tower_has_its_rate(family):
    """Two layers: .5 for the upper, .25 for the lower, .125 for the embeddings; a last norm and heads keep theirs."""
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48} if family == "distilbert" else LAYERS
    text = {"vocab_size": 60, "pad_token_id": 0} if family in ("bert", "roberta", "distilbert", "modernbert") else {}
    tower = AutoModel.from_config(AutoConfig.for_model(family, **sizes, **text))
    other = AutoModel.from_config(AutoConfig.for_model("bert", **LAYERS, vocab_size=60, pad_token_id=0))
    stack, first, last = FAMILIES[family]
    assert tower_layers(tower) is tower.get_submodule(stack)
    scales = layer_scales(TwoTowers(tower, other), 0.5)
    assert scales[f"vision_model.{first}"] == 0.125
    for number, scale in ((0, 0.25), (1, 0.5)):
        own = [value for name, value in scales.items() if name.startswith(f"vision_model.{stack}.{number}.")]
        assert len(own) > 3 and set(own) == {scale}
    assert last is None or scales[f"vision_model.{last}"] == 1.0
    assert scales["text_model.encoder.layer.0.output.dense.weight"] == 0.25
    assert scales["text_model.embeddings.position_embeddings.weight"] == 0.125
    assert "head.weight" not in scales


def test_rates_by_group_add_up_to_the_model(tiny_model):
    """Every parameter is in the group of its decay and its rate; the full rate comes first, as the log shows it."""
    groups = parameter_groups(tiny_model, 0.02, learning_rate=0.1, layer_decay=0.5)
    assert [group["lr"] for group in groups] == [0.1, 0.1, 0.05, 0.05, 0.025, 0.025, 0.0125, 0.0125]
    assert [group["weight_decay"] for group in groups] == [0.02, 0.0] * 4
    named = {id(parameter): name for name, parameter in tiny_model.named_parameters()}
    found = {named[id(one)]: group for group in groups for one in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(named)
    assert found["syncmask.fusion_encoder.layers.0.output.weight"]["lr"] == 0.1
    assert found["mim_decoder.embed.weight"]["lr"] == found["syncmask.temperature_logit"]["lr"] == 0.1
    assert found["syncmask.vision_model.layernorm.weight"]["lr"] == 0.1
    assert found["syncmask.vision_model.layers.1.mlp.fc1.weight"]["lr"] == 0.05
    words = found["syncmask.text_model.embeddings.word_embeddings.weight"]  # the MLM head's matrix too
    assert (words["lr"], words["weight_decay"]) == (0.0125, 0.02)


def test_with_one_rate_there_are_two_groups(tiny_model):
    groups = parameter_groups(tiny_model, 0.02, 0.1, layer_decay=1.0)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.1, 0.02), (0.1, 0.0)]


def test_frozen_towers_leave_no_empty_groups(tiny_model):
    tiny_model.syncmask.vision_model.requires_grad_(False)
    tiny_model.syncmask.text_model.requires_grad_(False)
    assert [group["lr"] for group in parameter_groups(tiny_model, 0.02, 0.1, layer_decay=0.5)] == [0.1, 0.1]


def test_the_schedule_scales_every_rate_and_a_step_follows_it(tiny_model):
    optimizer = make_optimizer(tiny_model, 0.1, 0.0, layer_decay=0.5)
    schedule = make_schedule(optimizer, 1, 5)
    assert [group["lr"] for group in optimizer.param_groups][::2] == [0.05, 0.025, 0.0125, 0.00625]
    names = (
        "syncmask.fusion_encoder.layers.0.output.weight",
        "syncmask.text_model.encoder.layer.0.output.dense.weight",
    )
    fused, text = (tiny_model.get_parameter(name) for name in names)
    before = fused.detach().clone(), text.detach().clone()
    fused.grad, text.grad = torch.ones_like(fused), torch.ones_like(text)
    optimizer.step()
    schedule.step()
    # AdamW's first step is the rate itself, whatever the gradient.
    torch.testing.assert_close(before[0] - fused, torch.full_like(fused, 0.05), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(before[1] - text, torch.full_like(text, 0.0125), atol=1e-5, rtol=1e-3)
    assert schedule.get_last_lr()[0] == 0.1


def test_a_tower_without_a_stack_of_layers_is_named():
    shared = AutoConfig.for_model("albert", hidden_size=32, num_attention_heads=4, intermediate_size=48, vocab_size=60)
    with pytest.raises(ValueError, match="AlbertModel has no stack of 12 layers; leave layer_decay at 1"):
        tower_layers(AutoModel.from_config(shared))
