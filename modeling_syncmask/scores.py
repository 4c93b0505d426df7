"""What a model says of a pair of photo and text, without gradient: attention scores, word evidence, word alignment.

Used by training (through the teacher), by evaluation and by whoever wants to see why a word and a photo go together.
"""

import math

import torch

from .masks import hidden_positions, pool_pieces, valid_words, word_attention
from .modeling_pretraining import SyncMaskForPreTraining
from .modeling_syncmask import SyncMaskModel

EVIDENCE_RANGE = (-2.0, 4.0)


@torch.no_grad()
def attention_scores(
    model: SyncMaskModel,
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    layer: int | None = None,
) -> torch.Tensor:
    """Return the raw cross-attention scores of word tokens on patches, S (B, H, L, N), fp32.

    Args:
        model: the base model. image_embeds: (B, prefix + N, Dv), text_embeds: (B, L, D), of an unmasked pair.
        attention_mask: (B, L). layer: index of the fusion layer, `config.mask_layer` when None.

    Raises:
        ValueError: when the model has no such layer.
    """
    layers = model.config.fusion_encoder_config.num_hidden_layers
    layer = model.config.mask_layer if layer is None else layer
    if not 0 <= layer < layers:
        raise ValueError(f"mask layer {layer} does not exist: the fusion encoder has layers 0 to {layers - 1}.")
    scores = model.fusion_encoder.cross_scores(text_embeds, attention_mask, image_embeds, layer)
    return scores[..., model.num_prefix_tokens :].float()


@torch.no_grad()
def word_evidence(
    model: SyncMaskForPreTraining,
    image_embeds: torch.Tensor,
    own_index: torch.Tensor,
    other_index: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    word_ids: torch.Tensor,
    span: int = 3,
    folds: int = 3,
    offset: int = 0,
) -> torch.Tensor:
    """Measure how much THIS photo raises the model's belief in each word.

    s[w] = clip(log p(w | text without the fold, own photo) - log p(w | the same, another item's photo), -2, 4)

    Spans of neighbouring words are hidden, one fold of spans at a time, so each word is measured once: hidden alone, a
    word would be guessed from its neighbours [ours]. Several other photos are averaged.

    Args:
        model: with an MLM head, in eval mode.
        image_embeds: (B, prefix + N, Dv). own_index: (R,), the photo of each text among them.
        other_index: (R, K), photos of other items.
        input_ids, attention_mask, word_ids: (R, L).
        span: words hidden together. folds: passes that share the words. offset: shifts where spans begin.

    Returns:
        (R, W), 0 where there is no word.
    """
    rows, others = other_index.shape
    images = torch.cat([own_index[:, None], other_index], dim=1)  # (R, 1 + K)
    evidence = torch.zeros_like(valid_words(word_ids), dtype=torch.float32)
    fold_of_token = ((word_ids + offset) // span) % folds
    for fold in range(folds):
        hidden = (word_ids >= 0) & (fold_of_token == fold)
        log_probs = _hidden_log_probs(model, image_embeds, images, input_ids, attention_mask, hidden)
        by_word = pool_pieces(log_probs.flatten(0, 1), word_ids.repeat_interleave(1 + others, dim=0), "sum")
        by_word = by_word.view(rows, 1 + others, -1)
        evidence += by_word[:, 0] - by_word[:, 1:].mean(dim=1)
    return evidence.clamp(*EVIDENCE_RANGE)


@torch.no_grad()
def word_alignment(
    model: SyncMaskForPreTraining, image_embeds: torch.Tensor, input_ids: torch.Tensor, word_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Measure how much better each word fits THIS photo than the batch's photos on average, and where it is found.

        s[w] = mean over the word's pieces u of (f[b, u] - log mean_b' exp f[b', u]),  f = max_p of `model.word_fits`
        A[w] = mean over the pieces of softmax_p of `model.word_fits` in the word's own photo

    Since f is trained by a softmax over photos, s is an estimate of the pointwise mutual information of photo and word
    (van den Oord et al. 2018, section 2.3). Pieces of a word repeat the same sight, hence their mean [ours].

    A stands in for cross-attention in `masks.relative_patch_scores`, so that words and patches of a pair are hidden by
    one opinion (our choice, measured on the generated corpus: a word's map peaks on its own part in 35 % against 25 %
    for another word's, cross-attention's in 30 % against 27 %).

    Args:
        model: with a word-patch head, in eval mode. image_embeds: (B, prefix + N, Dv). input_ids, word_ids: (B, L), or
            of the first few photos alone, the others being there to compare with.

    Returns:
        s (B, W) and A (B, W, N), 0 where there is no word.
    """
    token_ids, place = input_ids.unique(return_inverse=True)
    fits = model.word_fits(image_embeds, token_ids)  # (B, N, U)
    best = fits.amax(dim=1).float()
    relative = best - (best.logsumexp(dim=0) - math.log(len(best)))
    own = fits.transpose(1, 2).gather(1, place.unsqueeze(-1).expand(-1, -1, fits.shape[1])).float()  # (B, L, N)
    return pool_pieces(relative.gather(1, place), word_ids, "mean"), word_attention(own.unsqueeze(1), word_ids)


def _hidden_log_probs(model, image_embeds, images, input_ids, attention_mask, hidden) -> torch.Tensor:
    """Return log p of the hidden tokens given each photo: (R, 1 + K, L), 0 elsewhere."""
    rows, photos = images.shape
    masked_ids = input_ids.masked_fill(hidden, model.config.mask_token_id)
    # The text tower does not see the photo: one pass serves all photos of a row.
    text_embeds = model.syncmask.encode_text(masked_ids, attention_mask).repeat_interleave(photos, dim=0)
    positions, real = hidden_positions(hidden)
    logits = model.mlm_logits(
        text_embeds,
        attention_mask.repeat_interleave(photos, dim=0),
        image_embeds,
        positions.repeat_interleave(photos, dim=0),
        images.flatten(),
    )
    targets = input_ids.gather(1, positions).repeat_interleave(photos, dim=0)
    picked = logits.float().log_softmax(dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    picked = picked.view(rows, photos, -1) * real[:, None]
    spread = picked.new_zeros(rows, photos, input_ids.shape[1])
    return spread.scatter_add(2, positions[:, None].expand_as(picked), picked)
