"""Output dataclasses of the models."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class SyncMaskOutput(ModelOutput):
    """Output of [`SyncMaskModel`].

    Args:
        image_feats, text_feats: (B, P), projected, unit length.
        logits_per_image, logits_per_text: (B, B), cosines over the learned temperature.
        image_embeds: (B, prefix + N, Dv), text_embeds: (B, L, D), the towers' tokens.
        fused: (B, L, D), text tokens after attending to their photo's tokens.
        vision_hidden_states, text_hidden_states, fusion_hidden_states, vision_attentions, text_attentions,
            fusion_attentions, cross_attentions: on request.
    """

    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    image_feats: torch.Tensor | None = None
    text_feats: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    fused: torch.Tensor | None = None
    vision_hidden_states: tuple[torch.Tensor, ...] | None = None
    text_hidden_states: tuple[torch.Tensor, ...] | None = None
    fusion_hidden_states: tuple[torch.Tensor, ...] | None = None
    vision_attentions: tuple[torch.Tensor, ...] | None = None
    text_attentions: tuple[torch.Tensor, ...] | None = None
    fusion_attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class SyncMaskForPreTrainingOutput(ModelOutput):
    """Output of [`SyncMaskForPreTraining`]; a term whose inputs were not given is None.

    Args:
        loss: sum of the terms, unweighted.
        itc_loss, itm_loss, mlm_loss, mim_loss: scalars.
        itm_logits: (3B, 2): positives, each text with its negative photo, each photo with its negative text;
            column 1 = match.
        mlm_logits: (M, V) at the hidden tokens, in row-major order.
        mim_predictions: (B, k, patch_dim), standardised pixels of the hidden patches, in ascending order.
        image_feats, text_feats: (B, P), projected, unit length.
    """

    loss: torch.Tensor | None = None
    itc_loss: torch.Tensor | None = None
    itm_loss: torch.Tensor | None = None
    mlm_loss: torch.Tensor | None = None
    mim_loss: torch.Tensor | None = None
    itm_logits: torch.Tensor | None = None
    mlm_logits: torch.Tensor | None = None
    mim_predictions: torch.Tensor | None = None
    image_feats: torch.Tensor | None = None
    text_feats: torch.Tensor | None = None
