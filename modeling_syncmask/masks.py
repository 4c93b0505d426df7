"""Scores -> synchronised masks: hide the words and patches whose content is in BOTH this photo and this text.

START READING HERE. The paper's idea in three steps, all pure functions on tensors:

1. `attention_word_scores`: how much do a word and some patch pick each other out? (`scores.word_evidence` is the other
   strategy's answer to the same question.)
2. `choose`: the best-scored words are hidden (with some noise, and a share of the budget at random).
3. `relative_patch_scores`: which patches do exactly those words look at, more than other words do? These are hidden.

Letters: B batch, N patches (no [CLS]), L text tokens, W words of a text (padded), H heads. True = hidden.
"""

from dataclasses import dataclass

import torch

EPSILON = 1e-6


@dataclass
class Choice:
    """What was chosen to be hidden.

    Args:
        mask: (B, W) or (B, N) bool, everything that is hidden.
        by_score: the part of it that was chosen by score; the rest was drawn at random.
    """

    mask: torch.Tensor
    by_score: torch.Tensor


@dataclass
class ChoiceRule:
    """How scores become a choice.

    Args:
        rate: share of the candidates that is hidden: exactly round(rate * n), at least 1, never all.
        temperature: T of the keys z / T + Gumbel noise; 0 takes the best without any noise.
        random_share: part of the budget drawn from what the scored choice left.
        strength: 0 = all at random (the warm-up), 1 = by score; between, the scores' weight in the keys.
    """

    rate: float
    temperature: float = 0.25
    random_share: float = 0.25
    strength: float = 1.0


# ---------------------------------------------------------------------------------------------------- words of a text


def valid_words(word_ids: torch.Tensor) -> torch.Tensor:
    """Tell which words exist: word_ids (B, L), -1 = no word -> (B, W) bool, W = the largest number of words.

    Example: [[-1, 0, 0, 1, -1], [-1, 0, -1, -1, -1]] gives [[True, True], [True, False]].
    """
    width = max(1, int(word_ids.max()) + 1)
    return _pieces(word_ids, width).any(dim=1)


def pool_pieces(values: torch.Tensor, word_ids: torch.Tensor, reduce: str) -> torch.Tensor:
    """Reduce the values of a word's pieces to one: (B, L) or (B, L, N) -> (B, W) or (B, W, N); 0 where no word is.

    Args:
        values: per token. word_ids: (B, L). reduce: "sum", "mean" or "amax".
    """
    width = max(1, int(word_ids.max()) + 1)
    # Tokens of no word are collected in a last column and dropped.
    index = torch.where(word_ids < 0, width, word_ids)
    shape = (values.shape[0], width + 1, *values.shape[2:])
    index = index.reshape(*index.shape, *[1] * (values.dim() - 2)).expand_as(values)
    pooled = values.new_zeros(shape).scatter_reduce(1, index, values, reduce, include_self=False)
    return pooled[:, :width]


def words_to_tokens(word_mask: torch.Tensor, word_ids: torch.Tensor) -> torch.Tensor:
    """Hide all pieces of each hidden word: (B, W) and word_ids (B, L) -> (B, L) bool."""
    return word_mask.gather(1, word_ids.clamp(min=0)) & (word_ids >= 0)


# ------------------------------------------------------------------------------------------------------------- scores


def attention_word_scores(scores: torch.Tensor, attention_mask: torch.Tensor, word_ids: torch.Tensor) -> torch.Tensor:
    """Score words by how sharply a word and a patch pick each other out.

    C[w, p] = mean_h softmax_p(S) softmax_w(S);  score of a word = max over its pieces and all p of C

    Source: masks from the teacher's cross-attention [paper]; this formula is our reading of it.

    Args:
        scores: S (B, H, L, N), raw cross-attention scores of one fusion layer, [CLS] column dropped.
        attention_mask: (B, L); softmax_w runs over real tokens only. word_ids: (B, L).

    Returns:
        (B, W), 0 where there is no word.

    Example: a word whose row and column peak at the same patch scores near 1; one that looks everywhere, near 0.
    """
    over_patches = scores.softmax(dim=-1)
    padding = attention_mask[:, None, :, None] == 0
    over_words = scores.masked_fill(padding, float("-inf")).softmax(dim=-2)
    co_occurrence = (over_patches * over_words).mean(dim=1)  # (B, L, N)
    return pool_pieces(co_occurrence.amax(dim=-1), word_ids, "amax")


def word_attention(scores: torch.Tensor, word_ids: torch.Tensor) -> torch.Tensor:
    """Return where each word looks: A = softmax over patches, mean over heads and pieces.

    S (B, H, L, N) -> (B, W, N); rows of existing words sum to 1.
    """
    return pool_pieces(scores.softmax(dim=-1).mean(dim=1), word_ids, "mean")


def relative_patch_scores(attention: torch.Tensor, chosen: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Score patches by how much the chosen words look at them, against what all words do.

    R[w, p] = A[w, p] / mean_w' A[w', p];  patch score = sum over chosen w of R[w, p]

    What every word looks at says nothing of the chosen ones. This is the synchronisation: words first, patches from
    those words (our choice: .675 of the hidden patches on the named parts against .55-.59 for the dual softmax).

    Args:
        attention: A (B, W, N). chosen: (B, W) bool, words chosen BY SCORE. valid: (B, W) bool.

    Returns:
        (B, N).
    """
    everybody = (attention * valid.unsqueeze(-1)).sum(dim=1) / valid.sum(dim=1, keepdim=True).clamp(min=1)
    theirs = (attention * chosen.unsqueeze(-1)).sum(dim=1)
    return theirs / everybody.clamp(min=EPSILON)


def standardise(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Bring each row to mean 0 and sd 1 over its valid entries: (B, W) -> (B, W), 0 where not valid.

    A constant row becomes zeros (an epsilon relative to the row's size guards the division). Dual-softmax values scale
    with 1 / L, log-ratios do not: after this they can share one temperature.
    """
    count = valid.sum(dim=1, keepdim=True).clamp(min=1)
    mean = scores.masked_fill(~valid, 0).sum(dim=1, keepdim=True) / count
    centred = (scores - mean).masked_fill(~valid, 0)
    centred = (centred - centred.sum(dim=1, keepdim=True) / count).masked_fill(~valid, 0)
    spread = (centred.square().sum(dim=1, keepdim=True) / count).sqrt()
    return centred / (spread + EPSILON * mean.abs() + torch.finfo(scores.dtype).tiny)


def blend(
    scores: torch.Tensor,
    word_means: torch.Tensor,
    instance_weight: float,
    measured: torch.Tensor,
    valid: torch.Tensor,
) -> torch.Tensor:
    """Smooth a pair's standardised scores by what its words score in general, and standardise again.

    score = m + lambda (s - m);  rows that were not measured use m alone

    lambda = 1 is the paper's idea (what co-occurs in THIS photo), 0 is steadier while the teacher is weak, but blind to
    the photo [ours].

    Args:
        scores: s (B, W), standardised. word_means: m (B, W). instance_weight: lambda. measured: (B,) bool.
        valid: (B, W) bool.
    """
    weight = instance_weight * measured.to(scores.dtype)[:, None]
    return standardise(word_means + weight * (scores - word_means), valid)


# ------------------------------------------------------------------------------------------------------------ choosing


def choose(scores: torch.Tensor, valid: torch.Tensor, rule: ChoiceRule, noise: torch.Tensor | None = None) -> Choice:
    """Choose exactly round(rate * n) of each row's n valid candidates, most by score, some at random.

    by score: the highest z / T + Gumbel noise; then k_random = random_share * k, stochastically rounded, drawn
    uniformly from the rest. A candidate that scores 0 would otherwise never be hidden, so never be learned, so keep
    its 0 (measured: such words fell from .85 to .70 right) [ours].

    Args:
        scores: z (B, W), standardised. valid: (B, W) bool. rule: see [`ChoiceRule`].
        noise: (B, 1 + W, 2) uniform in (0, 1), given by the caller so that a process's slice of the global noise gives
            the same masks: [:, 0, 0] rounds the random part, [:, 1 + w] perturbs and draws candidate w. May be longer
            than W. None where the rule leaves nothing to chance (T = 0, random_share 0).

    Raises:
        ValueError: without noise, when the rule needs it.

    Example: scores [2, 1, 0, -1] at rate .5, T = 0 and random_share 0 choose the first two.
    """
    if noise is None:
        if rule.temperature != 0 or rule.random_share != 0 or rule.strength == 0:
            raise ValueError(f"{rule} draws at random: give `noise`, or set temperature and random_share to 0.")
        noise = scores.new_full((scores.shape[0], 1 + scores.shape[1], 2), 0.5)
    rounding, noise = noise[:, 0, 0], noise[:, 1 : 1 + scores.shape[1]]
    budget = _budget(valid, rule.rate)
    random_part = (rule.random_share * budget + rounding).floor().long().minimum(budget)
    if rule.strength == 0:
        keys = noise[..., 0]
    elif rule.temperature == 0:
        keys = scores
    else:
        keys = rule.strength * scores / rule.temperature + gumbel_noise(noise[..., 0])
    by_score = _top(keys, valid, budget - random_part)
    at_random = _top(noise[..., 1], valid & ~by_score, random_part)
    return Choice(mask=by_score | at_random, by_score=by_score)


def gumbel_noise(uniform: torch.Tensor) -> torch.Tensor:
    """Turn uniform noise in [0, 1) into Gumbel noise: argmax(x + noise) is then a draw from softmax(x).

    Both ends are clamped so that no value is infinite.

    Example:
        >>> round(gumbel_noise(torch.tensor([0.5])).item(), 4)
        0.3665
    """
    info = torch.finfo(torch.float32)
    clamped = uniform.float().clamp(info.tiny, 1 - info.eps / 2)
    return -torch.log(-torch.log(clamped))


def synchronised_masks(
    word_scores: torch.Tensor,
    attention: torch.Tensor,
    word_ids: torch.Tensor,
    word_rule: ChoiceRule,
    patch_rule: ChoiceRule,
    word_noise: torch.Tensor,
    patch_noise: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, Choice]:
    """Choose words by score, then the patches that exactly those words look at.

    Args:
        word_scores: (B, W), standardised; zeros choose at random.
        attention: A (B, W, N). word_ids: (B, L). word_rule, patch_rule: see [`ChoiceRule`].
        word_noise: (B, 1 + W or more, 2), patch_noise: (B, 1 + N, 2), uniform, as in `choose`.

    Returns:
        text_mask (B, L) bool, patch_mask (B, N) bool, and the word choice.
    """
    valid = valid_words(word_ids)
    words = choose(word_scores, valid, word_rule, word_noise)
    every_patch = torch.ones_like(attention[:, 0], dtype=torch.bool)
    patch_scores = standardise(relative_patch_scores(attention, words.by_score, valid), every_patch)
    patches = choose(patch_scores, every_patch, patch_rule, patch_noise)
    return words_to_tokens(words.mask, word_ids), patches.mask, words


def corrupt(
    input_ids: torch.Tensor, word_ids: torch.Tensor, text_mask: torch.Tensor, noise: torch.Tensor, config
) -> torch.Tensor:
    """Replace hidden words by BERT's rule: 80 % [MASK], 10 % random tokens, 10 % left, decided word by word.

    Args:
        input_ids, word_ids: (B, L). text_mask: (B, L) bool. noise: (B, L or more, 2) uniform: [..., 0] decides for
            word w at column w, [..., 1] draws random tokens. config: a SyncMaskConfig (mask_token_id, vocabulary).
    """
    noise = noise[:, : input_ids.shape[1]]
    fate = noise[..., 0].gather(1, word_ids.clamp(min=0))
    vocabulary = config.text_config.vocab_size
    random_ids = (noise[..., 1] * vocabulary).long().clamp(max=vocabulary - 1)
    masked = torch.where(text_mask & (fate < 0.8), config.mask_token_id, input_ids)
    return torch.where(text_mask & (fate >= 0.8) & (fate < 0.9), random_ids, masked)


# ---------------------------------------------------------------------------------------------------- masks to indices


def split_patches(patch_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split (B, N) into the indices of kept (B, N - k) and of hidden patches (B, k), each ascending.

    Raises:
        ValueError: when rows hide different numbers of patches.

    Example: [[0, 1, 0, 1]] gives [[0, 2]] and [[1, 3]].
    """
    counts = patch_mask.sum(dim=1)
    if (counts != counts[0]).any():
        raise ValueError(
            f"patch_mask hides between {int(counts.min())} and {int(counts.max())} patches; every row must hide the "
            "same number, since kept patches are encoded as one batch."
        )
    order = patch_mask.long().argsort(dim=1, stable=True)
    keep = patch_mask.shape[1] - int(counts[0])
    return order[:, :keep], order[:, keep:]


def hidden_positions(text_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions of hidden tokens (B, Q), padded with kept ones, and which are real (B, Q).

    Q is the largest number of hidden tokens in a row, at least 1. Real positions ascend, so that indexing by the second
    result lists hidden tokens in the row-major order of `text_mask`.
    """
    counts = text_mask.sum(dim=1)
    width = max(1, int(counts.max()))
    positions = (~text_mask).long().argsort(dim=1, stable=True)[:, :width]
    return positions, torch.arange(width, device=text_mask.device) < counts[:, None]


# ------------------------------------------------------------------------------------------------------------- pieces


def _pieces(word_ids: torch.Tensor, width: int) -> torch.Tensor:
    return word_ids.unsqueeze(-1) == torch.arange(width, device=word_ids.device)  # (B, L, W)


def _budget(valid: torch.Tensor, rate: float) -> torch.Tensor:
    count = valid.sum(dim=1)
    wanted = (rate * count).round().long().clamp(min=1)
    return torch.minimum(wanted, (count - 1).clamp(min=0))


def _top(keys: torch.Tensor, valid: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Mark the `count` (B,) highest valid keys of each row; ties go to the first."""
    order = keys.masked_fill(~valid, float("-inf")).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(keys.shape[1], device=keys.device).expand_as(order))
    return (rank < count[:, None]) & valid
