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
        itc_loss, itm_loss, mlm_loss, mim_loss, wpa_loss: scalars.
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
    wpa_loss: torch.Tensor | None = None
    itm_logits: torch.Tensor | None = None
    mlm_logits: torch.Tensor | None = None
    mim_predictions: torch.Tensor | None = None
    image_feats: torch.Tensor | None = None
    text_feats: torch.Tensor | None = None


@dataclass
class SyncMaskForImageTextRetrievalOutput(ModelOutput):
    """Output of [`SyncMaskForImageTextRetrieval`].

    Args:
        loss: itc_loss + itm_loss, when losses are asked for. itm_loss is None without negatives.
        logits_per_image: (Bi, Bt), cosines over the learned temperature. logits_per_text: (Bt, Bi).
        itm_logits: (B, 2) of the pairs, row by row, column 1 = match; None when there are not as many photos as texts.
            With negatives (3B, 2): the pairs, each text with its negative photo, each photo with its negative text.
        image_feats: (Bi, P), text_feats: (Bt, P), projected, unit length.
    """

    loss: torch.Tensor | None = None
    itc_loss: torch.Tensor | None = None
    itm_loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    itm_logits: torch.Tensor | None = None
    image_feats: torch.Tensor | None = None
    text_feats: torch.Tensor | None = None


@dataclass
class SyncMaskForComposedImageRetrievalOutput(ModelOutput):
    """Output of [`SyncMaskForComposedImageRetrieval`].

    Args:
        loss: contrast of queries and photos, both directions; None without target photos.
        logits: (B, 2B), queries against this slice's target photos and, behind them, its reference photos.
        query_feats: (B, P), unit length, in the space of the image features.
        image_feats: (B, P) of the target photos.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    query_feats: torch.Tensor | None = None
    image_feats: torch.Tensor | None = None


@dataclass
class SyncMaskForImageTextClassificationOutput(ModelOutput):
    """Output of [`SyncMaskForImageTextClassification`].

    Args:
        loss: sum of `losses`. losses: a scalar for each label set, in the order of the configuration.
        logits: (B, C) of the first label set. logits_by_set: name -> (B, C), in the order of the configuration; a
            ModelOutput, since pipelines can take no other dictionary of a batch apart.
    """

    loss: torch.Tensor | None = None
    losses: tuple[torch.Tensor, ...] | None = None
    logits: torch.Tensor | None = None
    logits_by_set: ModelOutput | None = None
