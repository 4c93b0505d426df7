"""AdamW's parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

# Parameters of two or more dimensions that are no matrices of a linear map; named as transformers names them.
NO_DECAY_NAMES = ("position_embedding", "pos_embed", "cls_token", "mask_token", "distillation_token", "temperature")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Split trainable parameters into those that decay and those that do not.

    Biases, norms and the temperature (one dimension or none), positions and learned tokens do not decay.

    Args:
        model: frozen parameters are left out.
        weight_decay: of the first group.

    Returns:
        Two groups for an optimiser, in the order of `named_parameters`; an empty one is left out.

    Raises:
        ValueError: where nothing is trainable.

    Example:
        >>> [len(group["params"]) for group in parameter_groups(nn.Linear(2, 2), 0.02)]
        [1, 1]
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise ValueError("no parameter is trainable: all have requires_grad=False")
    still = [parameter for name, parameter in named if not decays(name, parameter)]
    decaying = [parameter for name, parameter in named if decays(name, parameter)]
    groups = [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": still, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Tell whether weight decay makes sense for a parameter of this name and shape."""
    return parameter.ndim > 1 and not any(part in name for part in NO_DECAY_NAMES)


def make_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> AdamW:
    """Make AdamW over `parameter_groups`, fused (3 times as fast) where device and types allow it.

    Args:
        model: already on its device.
        learning_rate: the peak.
        weight_decay: for matrices only.
    """
    groups = parameter_groups(model, weight_decay)
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
