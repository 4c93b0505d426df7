"""The objectives as pure functions: tensors and numbers in, a scalar out."""

import torch
import torch.nn.functional as F


def match_targets(
    item_ids: torch.Tensor, text_ids: torch.Tensor, all_item_ids: torch.Tensor, all_text_ids: torch.Tensor
) -> torch.Tensor:
    """Share each row's target mass among all candidates of the same item or with the same text.

    t[i, j] = m[i, j] / sum_j m[i, j],  m[i, j] = item_i == item_j or text_i == text_j

    Differs from the paper's family (ALBEF's one-hot targets): photos of one item share a text, so its other photos are
    positives too (our choice, as in ALBEF's fine-tuning).

    Args:
        item_ids, text_ids: (B,). all_item_ids, all_text_ids: (G,), the global batch, which holds the B rows.

    Returns:
        (B, G), rows sum to 1.

    Example: items [7, 7, 9] with texts [0, 0, 1] give [[.5, .5, 0], [.5, .5, 0], [0, 0, 1]].
    """
    same = (item_ids[:, None] == all_item_ids) | (text_ids[:, None] == all_text_ids)
    return same.float() / same.sum(dim=1, keepdim=True)


def soften_targets(targets: torch.Tensor, teacher_similarity: torch.Tensor, weight: float) -> torch.Tensor:
    """Mix hard targets with the teacher's belief: (1 - a) t + a softmax(s_teacher).

    Source: momentum distillation of ALBEF (section 3.4), the layout the paper builds on [reading].

    Args:
        targets: (B, G). teacher_similarity: (B, G), cosines over the teacher's own temperature. weight: a in [0, 1].
    """
    return (1 - weight) * targets + weight * teacher_similarity.float().softmax(dim=1)


def itc_loss(
    image_feats: torch.Tensor,
    text_feats: torch.Tensor,
    all_image_feats: torch.Tensor,
    all_text_feats: torch.Tensor,
    temperature: torch.Tensor,
    image_targets: torch.Tensor,
    text_targets: torch.Tensor,
) -> torch.Tensor:
    """Image-text contrast, both directions: mean of -sum_j t[i, j] log softmax_j(f_i . g_j / tau).

    Args:
        image_feats, text_feats: (B, P), unit length, this process's rows.
        all_image_feats, all_text_feats: (G, P), the global batch's.
        temperature: tau, shape (1,).
        image_targets: (B, G) over texts, text_targets: (B, G) over photos; rows sum to 1.

    Source: ITC of the paper [paper]; candidates are the global batch, no queue [ours].
    """
    # Similarities tie under autocast, so they are taken in fp32.
    with torch.autocast(image_feats.device.type, enabled=False):
        i2t = image_feats.float() @ all_text_feats.float().T / temperature.float()
        t2i = text_feats.float() @ all_image_feats.float().T / temperature.float()
        return (F.cross_entropy(i2t, image_targets) + F.cross_entropy(t2i, text_targets)) / 2


def itm_loss(logits: torch.Tensor, is_match: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Image-text matching: two-way cross-entropy over the pairs that exist.

    Args:
        logits: (R, 2), column 1 = match. is_match: (R,) bool. valid: (R,) bool, False where no negative was allowed.
    """
    losses = F.cross_entropy(logits.float(), is_match.long(), reduction="none")
    return (losses * valid).sum() / valid.sum().clamp(min=1)


def mlm_loss(
    logits: torch.Tensor, targets: torch.Tensor, teacher_logits: torch.Tensor | None = None, weight: float = 0.0
) -> torch.Tensor:
    """Masked language modeling: mean cross-entropy over the hidden tokens; 0 when there is none.

    With a teacher the targets are (1 - weight) x the true token + weight x the teacher's probabilities.

    Args:
        logits: (M, V) at the hidden tokens. targets: (M,), their true ids.
        teacher_logits: (M, V) of the momentum teacher at the same tokens. weight: its share, in [0, 1].

    Source: momentum distillation of ALBEF (section 3.4); off by default.
    """
    logits, tokens = logits.float(), max(1, targets.numel())
    hard = F.cross_entropy(logits, targets, reduction="sum") / tokens
    if teacher_logits is None or weight == 0:
        return hard
    soft = F.cross_entropy(logits, teacher_logits.float().softmax(-1), reduction="sum") / tokens
    return (1 - weight) * hard + weight * soft


def mim_loss(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Masked image modeling: mean squared error over the hidden patches' standardised pixels.

    Pixels are standardised by the processor's mean and sd, not patch by patch, which would throw the colour away that
    the text tells (our choice: the text gap was 36 % against 23 % on a generated corpus).

    Args:
        predictions, targets: (B, k, patch_dim).
    """
    return F.mse_loss(predictions.float(), targets.float())


def wpa_loss(similarity: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Word-patch alignment: which of these photos does a word belong to? 0 when no word tells photos apart.

    mean over the pairs (photo b, word u of its text) of -log softmax_b s[b, u]

    The softmax runs over photos, so how frequent a word is does not matter, and a word that every text holds tells
    nothing and is left out. A photo that does not show a word of its text cannot fit it, so what is learned is what
    photos show [ours].

    Args:
        similarity: s (B, U), the best fit of each word's token to a patch of each photo. present: (B, U) bool, whether
            the photo's text holds it.
    """
    telling = present & ~present.all(dim=0)
    losses = -similarity.float().log_softmax(dim=0)
    return (losses * telling).sum() / telling.sum().clamp(min=1)


def composed_targets(
    target_ids: torch.Tensor, all_target_ids: torch.Tensor, all_reference_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ITC's targets of composed retrieval: queries over photos (B, 2G), target photos over queries (B, G).

    The candidates of a query are all target photos and, behind them, all reference photos: a reference photo is what a
    model returns that looks at the photo and not at the text (our choice). Equal ids are positives and share the mass.

    Args:
        target_ids: (B,). all_target_ids, all_reference_ids: (G,), the global batch, which holds the B rows.

    Example: targets [7, 8] with references [8, 9] give [[1, 0, 0, 0], [0, .5, .5, 0]] and [[1, 0], [0, 1]].
    """
    candidates = torch.cat([all_target_ids, all_reference_ids])
    over_photos = match_targets(target_ids, target_ids, candidates, candidates)
    return over_photos, match_targets(target_ids, target_ids, all_target_ids, all_target_ids)


def classification_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    log_prior: torch.Tensor | None = None,
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Recognition: mean of -w[y] log softmax_y(f + log pi) over the rows whose label is known; 0 when there is none.

    With the log prior the model need not learn how frequent a class is, so that its plain logits rank classes as if all
    were equally frequent. With class weights the mean is a weighted one. Use one of the two.

    Args:
        logits: (B, C). labels: (B,), -100 = unknown.
        log_prior: (C,), log of the classes' shares in training. class_weights: (C,).

    Source: logit adjustment, Menon et al. 2021, "Long-tail learning via logit adjustment", equation 10 with tau = 1.

    Example: logits of 0 with log_prior = log [.9, .1] and label 1 give -log .1 = 2.3.
    """
    logits = logits.float() if log_prior is None else logits.float() + log_prior.float()
    weights = None if class_weights is None else class_weights.float()
    total = F.cross_entropy(logits, labels, weight=weights, ignore_index=-100, reduction="sum")
    known = labels != -100
    mass = known.sum() if weights is None else (weights[labels.clamp(min=0)] * known).sum()
    return total / mass.clamp(min=torch.finfo(torch.float32).tiny)
