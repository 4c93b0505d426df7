"""AdamW's parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

# Parameters of two or more dimensions that are no matrices of a linear map; named as transformers names them.
NO_DECAY_NAMES = (
    *("position_embedding", "pos_embed", "temperature"),
    *("cls_token", "mask_token", "distillation_token", "register_tokens"),
)


def parameter_groups(
    model: nn.Module, weight_decay: float, learning_rate: float = 1.0, layer_decay: float = 1.0
) -> list[dict]:
    """Split trainable parameters into those that decay and those that do not, and by learning rate.

    Biases, norms and the temperature (one dimension or none), positions and learned tokens do not decay.

    Args:
        model: frozen parameters are left out.
        weight_decay: of what decays.
        learning_rate: the peak of what is above the towers. layer_decay: see `layer_scales`.

    Returns:
        Groups for an optimiser, the largest learning rate first, in the order of `named_parameters`; no empty ones.

    Raises:
        ValueError: where nothing is trainable.

    Example:
        >>> [len(group["params"]) for group in parameter_groups(nn.Linear(2, 2), 0.02)]
        [1, 1]
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise ValueError("no parameter is trainable: all have requires_grad=False")
    scales = layer_scales(model, layer_decay)
    groups = {
        (scale, decaying): {"params": [], "weight_decay": weight_decay * decaying, "lr": learning_rate * scale}
        for scale in sorted({1.0, *scales.values()}, reverse=True)
        for decaying in (True, False)
    }
    for name, parameter in named:
        groups[scales.get(name, 1.0), decays(name, parameter)]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def layer_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Return the factor of the learning rate for each parameter of the towers that does not have the full one.

        layer k of n (1 = the lowest):  layer_decay ** (n + 1 - k)
        embeddings (all that stands before the layers):  layer_decay ** (n + 1)

    What stands behind the layers, such as a last norm, the fusion encoder and the heads keep the full rate.

    Args:
        model: any SyncMask class. layer_decay: 1 = off, usual .65 to .95.

    Source: Clark et al. 2020 (ELECTRA); Bao et al. 2022 (BEiT) for image towers.

    Example: two layers and a decay of .5 give .125 to the embeddings, .25 to the first layer and .5 to the second.
    """
    if layer_decay == 1:
        return {}
    base, names = model.base_model, {id(parameter): name for name, parameter in model.named_parameters()}
    scales = {}
    for tower in (base.vision_model, base.text_model):
        layers = tower_layers(tower)
        depth_of = {id(one): number for number, layer in enumerate(layers, 1) for one in layer.parameters()}
        depth = 0
        for parameter in tower.parameters():  # in the order that the data walks them
            depth = depth_of.get(id(parameter), len(layers) + 1 if depth else 0)
            scales[names[id(parameter)]] = layer_decay ** (len(layers) + 1 - depth)
    return scales


def tower_layers(tower: PreTrainedModel) -> nn.ModuleList:
    """Find a tower's stack of layers, which each family of models calls otherwise.

    Raises:
        ValueError: where it has none.
    """
    for module in tower.modules():
        if isinstance(module, nn.ModuleList) and len(module) == tower.config.num_hidden_layers:
            return module
    raise ValueError(
        f"{type(tower).__name__} has no stack of {tower.config.num_hidden_layers} layers; leave layer_decay at 1 and "
        "lora_rank at none for this family."
    )


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Tell whether weight decay makes sense for a parameter of this name and shape."""
    return parameter.ndim > 1 and not any(part in name for part in NO_DECAY_NAMES)


def make_optimizer(model: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float = 1.0) -> AdamW:
    """Make AdamW over `parameter_groups`, fused (3 times as fast) where device and types allow it.

    Args:
        model: already on its device.
        learning_rate: the peak.
        weight_decay: for matrices only.
        layer_decay: of the learning rate, from each of a tower's layers to the one below it.
    """
    groups = parameter_groups(model, weight_decay, learning_rate, layer_decay)
    try:
        return AdamW(groups, lr=learning_rate, fused=True)
    except RuntimeError:
        return AdamW(groups, lr=learning_rate)


def lr_factor(step: int, warmup: int, total: int, floor: float = 0.0) -> float:
    """Share of the peak learning rate at a step: a linear warm-up, then half a cosine.

        step < warmup:  (step + 1) / (warmup + 1)
        else:           floor + (1 - floor) (1 + cos(pi (step - warmup) / (total - warmup))) / 2

    Args:
        step: steps done, from 0 on; from `total` on the factor stays `floor`.
        warmup: steps of the warm-up.
        total: steps of the schedule.
        floor: the factor at its end.

    Example:
        >>> [round(lr_factor(step, warmup=1, total=5), 2) for step in range(6)]
        [0.5, 1.0, 0.85, 0.5, 0.15, 0.0]
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2


def make_schedule(optimizer: Optimizer, warmup: int, total: int, floor: float = 0.0) -> LambdaLR:
    """Make a scheduler that follows `lr_factor`; call its `step` once after each optimiser step."""
    return LambdaLR(optimizer, lambda step: lr_factor(step, warmup, total, floor))
