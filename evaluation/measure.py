"""What the teacher scores: words and patches of pairs under both mask strategies, and the words' means over photos.

The same functions as in training (`syncmask.scores`, `syncmask.masks`), at T = 0 and without a random share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from syncmask.masks import (
    EPSILON,
    ChoiceRule,
    attention_word_scores,
    blend,
    choose,
    relative_patch_scores,
    standardise,
    valid_words,
    word_attention,
)
from syncmask.scores import attention_scores, word_alignment, word_evidence
from syncmask.word_scores import WordScores

from .co_occurrence import PATCH_RATE, WORD_RATE
from .embedding import batches

# Strategy -> its default lambda: the share of this pair's own score against the word's mean.
INSTANCE_WEIGHTS = {"attention": 1.0, "evidence": 0.5, "alignment": 0.5}


@dataclass
class PairScores:
    """One batch under the teacher: `valid` (B, W), standardised scores (B, W) by strategy, where words look (B, W, N).

    `looks` has "attention" always, and "alignment" where that is asked for; other strategies look by attention.
    """

    valid: torch.Tensor
    scores: dict[str, torch.Tensor]
    looks: dict[str, torch.Tensor]

    def looks_of(self, strategy: str) -> torch.Tensor:
        """Where words look (B, W, N) by what this strategy chooses patches with."""
        return self.looks.get(strategy, self.looks["attention"])


@dataclass
class Measured:
    """All rows: word scores (a list of (W,)) and patch scores (rows, N) by name.

    `kept`: how many words of each text the tokenizer left. `peaks`: by what looks, (W,) a row, where a word looks more
    than others.
    """

    words: dict[str, list[np.ndarray]] = field(default_factory=dict)
    patches: dict[str, np.ndarray] = field(default_factory=dict)
    kept: list[int] = field(default_factory=list)
    peaks: dict[str, list[np.ndarray]] = field(default_factory=dict)


@torch.no_grad()
def score_pairs(
    teacher,
    batch: Mapping[str, torch.Tensor],
    item_ids: np.ndarray,
    strategies: Sequence[str],
    *,
    layer: int | None = None,
    others: int = 3,
    seed: int = 0,
) -> PairScores:
    """Scores of one batch of pairs.

    Args:
        teacher: a `SyncMaskForPreTraining` in eval mode, with its MLM head for `evidence`, its word-patch head for
            `alignment`.
        batch: pixel_values (B, 3, S, S), input_ids, attention_mask, word_ids (B, L).
        item_ids: (B,); `evidence` compares with photos of other items of the batch.
        strategies: of "attention", "evidence", "alignment".
        layer: fusion layer that the attention is read from; `config.mask_layer` when None.
        others: how many other photos `evidence` averages.
        seed: which ones.
    """
    ids, mask, word_ids = batch["input_ids"], batch["attention_mask"], batch["word_ids"]
    images = teacher.syncmask.encode_image(batch["pixel_values"])
    texts = teacher.syncmask.encode_text(ids, mask)
    raw = attention_scores(teacher.syncmask, images, texts, mask, layer)
    valid, scores = valid_words(word_ids), {}
    looks = {"attention": word_attention(raw, word_ids)}
    if "attention" in strategies:
        scores["attention"] = standardise(attention_word_scores(raw, mask, word_ids), valid)
    if "evidence" in strategies:
        own = torch.arange(len(ids), device=ids.device)
        other = torch.from_numpy(other_rows(item_ids, others, seed)).to(ids.device)
        evidence = word_evidence(teacher, images, own, other, ids, mask, word_ids)
        scores["evidence"] = standardise(evidence, valid)
    if "alignment" in strategies:
        alignment, looks["alignment"] = word_alignment(teacher, images, ids, word_ids)
        scores["alignment"] = standardise(alignment, valid)
    return PairScores(valid, scores, looks)


def default_weights(model) -> dict[str, float]:
    """`INSTANCE_WEIGHTS` of the mask strategies whose scores a model has the heads for."""
    aligns = getattr(model, "word_patch_head", None) is not None
    return {name: weight for name, weight in INSTANCE_WEIGHTS.items() if name != "alignment" or aligns}


def other_rows(item_ids: np.ndarray, count: int, seed: int) -> np.ndarray:
    """For each row of a batch `count` rows of other items (B, count), fewer where the batch has no more.

    Raises:
        ValueError: a row has no other item beside it.
    """
    item_ids = np.asarray(item_ids)
    different = item_ids[:, None] != item_ids
    available = int(different.sum(axis=1).min())
    if available == 0:
        raise ValueError(f"a batch of {len(item_ids)} rows holds one item alone; evidence needs photos of others")
    keys = np.where(different, np.random.default_rng(seed).random(different.shape), -1)
    return np.argsort(-keys, axis=1)[:, : min(count, available)]


def fill_word_means(
    teacher, processor, dataset, item_ids, strategies, *, batch_size=128, layer=None, others=3, seed=0
) -> dict[str, WordScores]:
    """The words' mean scores m[v] by strategy, from one pass over some train rows (bound them by `select`)."""
    texts = processor(text=list(dataset["text"]), return_word_ids=True)
    vocabulary = WordScores.from_texts(list(zip(texts["input_ids"], texts["word_ids"]))).vocabulary
    # decay 1: one pass of a fixed teacher, so every row counts alike.
    means = {strategy: WordScores(vocabulary, decay=1.0) for strategy in strategies}
    for rows in mixed_rows(len(dataset), batch_size, seed):
        batch = next(batches(processor, dataset, rows, len(rows), teacher.device))
        pairs = score_pairs(teacher, batch, item_ids[rows], strategies, layer=layer, others=others, seed=seed)
        for strategy, scores in pairs.scores.items():
            index = means[strategy].rows(batch["input_ids"], batch["word_ids"])
            means[strategy].update(index, scores, pairs.valid)
    return means


def measure_rows(
    teacher,
    processor,
    dataset,
    item_ids: np.ndarray,
    means: Mapping[str, WordScores],
    visible: Sequence[Sequence[bool]],
    *,
    instance_weights: Mapping[str, float] = INSTANCE_WEIGHTS,
    batch_size: int = 128,
    layer: int | None = None,
    others: int = 3,
    seed: int = 0,
) -> Measured:
    """Word and patch scores of every row, by name.

    Words: STRATEGY (its score with its lambda), STRATEGY_mean (m[v] alone) and, where lambda < 1, STRATEGY_own (s
    alone). Patches: STRATEGY (relative attention of its hard top words), true_words (the same of words that this view
    shows: what perfect word scores would give) and contrast (the spread of a patch's pixels: what eyes without a text
    and without any training would give).
    """
    found = Measured(kept=[0] * len(dataset))
    for rows in mixed_rows(len(dataset), batch_size, seed):
        batch = next(batches(processor, dataset, rows, len(rows), teacher.device))
        pairs = score_pairs(teacher, batch, item_ids[rows], list(means), layer=layer, others=others, seed=seed)
        everywhere = torch.ones(len(rows), dtype=torch.bool, device=pairs.valid.device)
        words, patches = {}, {}
        for strategy, own in pairs.scores.items():
            mean = means[strategy].means(means[strategy].rows(batch["input_ids"], batch["word_ids"]))
            weight = instance_weights[strategy]
            words[strategy] = blend(own, mean, weight, everywhere, pairs.valid)
            words |= {f"{strategy}_mean": mean} | ({f"{strategy}_own": own} if weight < 1 else {})
            patches[strategy] = patches_of_top_words(words[strategy], pairs.valid, pairs.looks_of(strategy))
        patches["contrast"] = teacher.patchify(batch["pixel_values"]).std(dim=-1)
        true_words = _padded(visible, rows, pairs.valid)
        patches["true_words"] = patches_of_top_words(true_words, pairs.valid, pairs.looks["attention"])
        _collect(found, rows, pairs.valid, words, patches)
        for name, looks in pairs.looks.items():
            by_row = found.peaks.setdefault(name, [np.zeros(0)] * len(dataset))
            for row, peak in zip(rows, word_peaks(looks, pairs.valid).cpu().numpy()):
                by_row[row] = peak[: found.kept[row]]
    return found


@torch.no_grad()
def hard_masks(
    teacher,
    batch: Mapping[str, torch.Tensor],
    item_ids: np.ndarray,
    strategy: str,
    *,
    word_means: WordScores | None = None,
    instance_weight: float | None = None,
    word_rate: float = 0.3,
    patch_rate: float = 0.4,
    layer: int | None = None,
    others: int = 3,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, PairScores]:
    """What the teacher would hide in one batch, at T = 0 and without a random share.

    Args:
        teacher: see `score_pairs`, as for batch, item_ids, layer, others and seed.
        strategy: "attention", "evidence" or "alignment"; "random" asks what attention would hide.
        word_means: m[v]; None = the pair's own scores alone.
        instance_weight: lambda; the strategy's default when None.
        word_rate: share of the words.
        patch_rate: share of the patches.

    Returns:
        words (B, W) bool, patches (B, N) bool, and the scores they follow from.
    """
    strategy = "attention" if strategy == "random" else strategy
    pairs = score_pairs(teacher, batch, item_ids, [strategy], layer=layer, others=others, seed=seed)
    scores = pairs.scores[strategy]
    if word_means is not None:
        weight = INSTANCE_WEIGHTS[strategy] if instance_weight is None else instance_weight
        means = word_means.means(word_means.rows(batch["input_ids"], batch["word_ids"]))
        everywhere = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
        scores = blend(scores, means, weight, everywhere, pairs.valid)
    attended = patches_of_top_words(scores, pairs.valid, pairs.looks_of(strategy), word_rate)
    patches = top(attended, torch.ones_like(attended, dtype=torch.bool), patch_rate)
    return top(scores, pairs.valid, word_rate), patches, pairs


def patches_of_top_words(
    word_scores: torch.Tensor, valid: torch.Tensor, looks: torch.Tensor, rate: float = WORD_RATE
) -> torch.Tensor:
    """Relative attention (B, N) of the hard top `rate` of words; looks (B, W, N) = where each word looks."""
    return relative_patch_scores(looks, top(word_scores, valid, rate), valid)


def word_peaks(looks: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The patch (B, W) that each word looks at most, against what all words of its text look at."""
    return relative_attention(looks, valid).argmax(dim=-1)


def relative_attention(looks: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Attention (B, W, N) of each word against the mean of its text's words: what all look at says nothing of one."""
    valid = valid.unsqueeze(-1)
    everybody = (looks * valid).sum(dim=1, keepdim=True) / valid.sum(dim=1, keepdim=True).clamp(min=1)
    return looks / everybody.clamp(min=EPSILON)


def top(scores: torch.Tensor, valid: torch.Tensor, rate: float = PATCH_RATE) -> torch.Tensor:
    """The hard top `rate` of each row's valid candidates (B, W) bool: T = 0, no random share."""
    return choose(scores, valid, ChoiceRule(rate=rate, temperature=0, random_share=0)).mask


def mixed_rows(count: int, batch_size: int, seed: int) -> list[np.ndarray]:
    """Row numbers in shuffled batches of nearly equal size, so that no batch holds one item alone."""
    order = np.random.default_rng(seed).permutation(count)
    return np.array_split(order, max(1, -(-count // batch_size)))


def _padded(truth: Sequence[Sequence[bool]], rows: np.ndarray, valid: torch.Tensor) -> torch.Tensor:
    padded = torch.zeros(valid.shape)
    for place, row in enumerate(rows):
        known = torch.tensor(truth[row], dtype=torch.float32)[: valid.shape[1]]
        padded[place, : len(known)] = known
    return padded.to(valid.device)


def _collect(found: Measured, rows: np.ndarray, valid: torch.Tensor, words: dict, patches: dict) -> None:
    """Files one batch under its rows; a text's words end where the tokenizer cut it."""
    lengths = valid.sum(dim=1).tolist()
    for name, scores in words.items():
        by_row = found.words.setdefault(name, [None] * len(found.kept))
        for row, length, values in zip(rows, lengths, scores.double().cpu().numpy()):
            by_row[row] = values[:length]
            found.kept[row] = length
    for name, scores in patches.items():
        by_row = found.patches.setdefault(name, np.empty((len(found.kept), scores.shape[1])))
        by_row[rows] = scores.double().cpu().numpy()
