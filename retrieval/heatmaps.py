"""Where each word looks: cross-attention of one fusion layer, and the same weighted by what the match gains from it.

Tensors in, tensors out. Letters: B pairs, L tokens, W words, H heads, N patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from syncmask.masks import EPSILON, pool_pieces, valid_words, word_attention
from syncmask.scores import attention_scores


def attention_maps(
    model, image_embeds: torch.Tensor, text_embeds: torch.Tensor, attention_mask, word_ids, layer: int | None = None
) -> torch.Tensor:
    """Where each word looks: A (B, W, N), mean over heads and pieces, each existing word's row sums to 1.

    Args:
        model: any SyncMask model with a `.syncmask` base model.
        image_embeds: (B, prefix + N, Dv).
        text_embeds: (B, L, D).
        attention_mask: (B, L).
        word_ids: (B, L), -1 = no word.
        layer: fusion layer; `config.mask_layer` when None.

    Raises:
        ValueError: the model has no such layer.
    """
    scores = attention_scores(model.syncmask, image_embeds, text_embeds, attention_mask, layer)
    return word_attention(scores, word_ids)


def gradient_maps(
    model, image_embeds: torch.Tensor, text_embeds: torch.Tensor, attention_mask, word_ids, layer: int | None = None
) -> torch.Tensor:
    """Where looking raises the match: mean_h of A * max(0, d(match - no match) / dA), (B, W, N), at least 0.

    A is the attention as the model uses it, prefix tokens included in its softmax and dropped after. Rows are not
    normalised: a word on whose gaze the match does not depend has zeros. Source: Grad-CAM on cross-attention, as ALBEF
    shows it; the layer is our choice (an early one localises, see `config.mask_layer`).

    Args:
        model: with a matching head (`itm_head`), in eval mode; otherwise as `attention_maps`.

    Raises:
        ValueError: the model has no such layer, or it is the last one: there only [CLS] reaches the matching head, so
            that the gradient of every word is zero.
    """
    layer = resolve_layer(model, layer)
    fusion = model.syncmask.fusion_encoder
    if layer == len(fusion.layers) - 1:
        raise ValueError(
            f"layer {layer} is the last of the fusion encoder: the match does not depend on where words look there. "
            f"Give a layer from 0 to {layer - 1}"
            if layer
            else "the fusion encoder has one layer alone: the match does not depend on where words look there"
        )
    with torch.enable_grad(), _weights_kept(fusion):
        image_embeds = image_embeds.detach().requires_grad_()  # a graph even where all parameters are frozen
        fused = fusion(text_embeds, attention_mask, encoder_hidden_states=image_embeds, output_attentions=True)
        logits = model.itm_head(fused.last_hidden_state[:, 0])
        weights = fused.cross_attentions[layer]  # (B, H, L, prefix + N)
        gradient = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), weights)[0]
    gained = (weights * gradient.clamp(min=0)).detach().mean(dim=1)[..., model.syncmask.num_prefix_tokens :]
    return pool_pieces(gained.float(), word_ids, "mean")


def relative_maps(maps: torch.Tensor, word_ids: torch.Tensor) -> torch.Tensor:
    """Each word's map against the mean of all words of its text: (B, W, N) -> (B, W, N).

    What every word looks at says nothing of this one (as in `masks.relative_patch_scores`).
    """
    words = valid_words(word_ids).sum(dim=1)[:, None, None].clamp(min=1)
    everybody = maps.sum(dim=1, keepdim=True) / words  # rows of no word are zeros
    return maps / (everybody + EPSILON * everybody.amax(dim=-1, keepdim=True)).clamp(min=torch.finfo(maps.dtype).tiny)


def resolve_layer(model, layer: int | None) -> int:
    """The fusion layer itself, or `config.mask_layer` for None; a ValueError where there is no such layer."""
    layers = len(model.syncmask.fusion_encoder.layers)
    layer = model.config.mask_layer if layer is None else layer
    if not 0 <= layer < layers:
        raise ValueError(f"fusion layer {layer} does not exist: the fusion encoder has layers 0 to {layers - 1}")
    return layer


@contextmanager
def _weights_kept(fusion) -> Iterator[None]:
    """Attention written out while the context lasts: only so are its weights part of the graph."""
    before = fusion.config._attn_implementation
    fusion.set_attn_implementation("eager")
    try:
        yield
    finally:
        fusion.set_attn_implementation(before)
