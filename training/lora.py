"""Low-rank adapters (LoRA) in towers and fusion encoder, by peft: the model's class, and all that uses it, stay."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn
from transformers import PreTrainedModel

from syncmask.evaluation.loading import merge_adapters

from .optim import tower_layers

EXPLAIN = (
    "lora_rank needs the package peft; install it with: pip install 'peft>=0.21' (or pip install 'syncmask[lora]'), or "
    "leave lora_rank at none"
)


def add_adapters(model: PreTrainedModel, rank: int, alpha: float, towers: bool = True) -> None:
    """Put an adapter on every linear map of the layers, in place; only adapters and heads stay trainable.

        W x + b  ->  W x + b + alpha / rank * B A x,  A: (rank, in), B: (out, rank) = 0 at the start

    What is above towers and fusion encoder (projections, temperature, heads, MIM decoder) is trained whole.

    Args:
        model: any SyncMask class. rank, alpha: of the adapters. towers: False puts none into the towers.

    Source: Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models"; adapters on all linear maps as in
        Dettmers et al. 2023 (QLoRA).

    Raises:
        SystemExit: without peft.
    """
    if importlib.util.find_spec("peft") is None:
        raise SystemExit(EXPLAIN)
    from peft import LoraConfig, inject_adapter_in_model

    heads = [parameter for parameter in head_parameters(model) if parameter.requires_grad]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=linear_maps(model, towers)), model)
    for parameter in heads:
        parameter.requires_grad_(True)


def linear_maps(model: PreTrainedModel, towers: bool = True) -> list[str]:
    """Name the linear maps of the fusion encoder's and, unless they are left out, of the towers' layers.

    They are found by kind, since each family of towers calls them otherwise.
    """
    base = model.base_model
    stacks = [base.fusion_encoder.layers]
    if towers:
        stacks += [tower_layers(base.vision_model), tower_layers(base.text_model)]
    wanted = {id(module) for stack in stacks for module in stack.modules() if isinstance(module, nn.Linear)}
    return [name for name, module in model.named_modules() if id(module) in wanted]


def head_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the parameters that are neither a tower's nor the fusion encoder's (a tied matrix is the text tower's)."""
    base = model.base_model
    parts = (base.vision_model, base.text_model, base.fusion_encoder)
    inside = {id(parameter) for part in parts for parameter in part.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in inside]


def merged_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return a model's `state_dict` as its class has it, adapters merged; that of a model without any as it is."""
    adapted = [module for module in model.modules() if hasattr(module, "lora_A")]
    return merge_adapters(model.state_dict(), adapted[0].scaling["default"]) if adapted else model.state_dict()
