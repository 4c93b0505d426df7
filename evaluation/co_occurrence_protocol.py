"""The protocol `co-occurrence`: the teacher's masks and the MIM text gap against the truth of the generated corpus.

On items never trained on. Both strategies are scored on one training run, always beside random, the blind table by
word, the centre prior and the truth's own mask.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from syncmask.processing.corpus import CorpusIndex
from syncmask.word_scores import WordScores

from .co_occurrence import (
    COVERED,
    Tallies,
    blind_scores,
    blind_table,
    covered_share,
    derangement,
    patch_tallies,
    pointing_tallies,
    text_gap,
    truth_masks,
    view_tallies,
    word_tallies,
)
from .embedding import batches
from .measure import Measured, default_weights, fill_word_means, measure_rows, mixed_rows
from .outcomes import Outcomes, quantity_of
from .protocols import describe_corpus, photo_names, sample_items
from .result import Result, candidates_sha256

TRUTH = ("words", "visible", "regions")
# Views with the garment anywhere and of any size. Patches are scored on these alone: on centred photos a centre prior
# beats everything, and in close-ups nearly every patch is right.
PATCH_VIEWS = ("front_shifted", "back_shifted")


def co_occurrence(
    model,
    processor,
    train,
    test,
    *,
    word_means: Mapping[str, WordScores] | None = None,
    instance_weights: Mapping[str, float] | None = None,
    layer: int | None = None,
    others: int = 3,
    corpus_name: str = "garments",
    split: str = "test",
    max_rows: int | None = 1024,
    train_rows: int | None = 1024,
    image_size: int | None = None,
    batch_size: int = 128,
    seed: int = 0,
) -> Result:
    """Runs the protocol.

    Args:
        model: the EMA teacher, a `SyncMaskForPreTraining` in eval mode (the student will do where no teacher is left).
        processor: its `SyncMaskProcessor`.
        train: train rows with truth: the blind table, and m[v] where `word_means` has none.
        test: rows of items never trained on, with truth.
        word_means: m[v] by strategy where it is at hand; others are filled from `train_rows` train rows.
        instance_weights: lambda by strategy; its keys are the strategies that are scored. None = all that the model has
            the heads for, with their defaults.
        layer: fusion layer of the attention; `config.mask_layer` when None.
        others: how many other photos `evidence` averages.
        corpus_name: for the result.
        split: for the result.
        max_rows: at most this many test photos (whole items, a seeded sample); None = all.
        train_rows: the same for the pass over train rows.
        image_size: pixels that the truth's regions are given in; the corpus's photos' own size when None.
        batch_size: of the forward passes.
        seed: of samples, derangement, masks and bootstrap.

    Raises:
        ValueError: the corpus carries no ground truth.
    """
    _check_truth(train, test)
    if instance_weights is None:
        instance_weights = default_weights(model)
    test = test.select(sample_items(CorpusIndex.from_dataset(test).item_ids, max_rows, seed))
    item_ids = CorpusIndex.from_dataset(test).item_ids
    truth = {name: test[name] for name in TRUTH}
    placed = np.isin(test["view"], PATCH_VIEWS) if "view" in test.column_names else np.ones(len(test), dtype=bool)
    size = image_size or test[0]["image"].size[0]
    means = dict(word_means or {})
    missing = [strategy for strategy in instance_weights if strategy not in means]
    options = {"batch_size": batch_size, "layer": layer, "others": others, "seed": seed}
    if missing:
        some = train.select(sample_items(CorpusIndex.from_dataset(train).item_ids, train_rows, seed))
        ids = CorpusIndex.from_dataset(some).item_ids
        means |= fill_word_means(model, processor, some, ids, missing, **options)
    means = {strategy: means[strategy] for strategy in instance_weights}
    found = measure_rows(
        model, processor, test, item_ids, means, truth["visible"], instance_weights=instance_weights, **options
    )
    table = blind_table(train["words"], train["visible"])
    tallies = score_truth(found, truth, item_ids, table, model.syncmask.grid, size, placed)
    masks = truth_masks(_kept(truth["visible"], found), truth["regions"], model.syncmask.grid, size, seed=seed)
    errors = mim_errors(model, processor, test, masks, derangement(item_ids, seed), batch_size)
    tallies["text_gap/relative_rise/truth_masks"] = text_gap(*errors)
    outcomes = kept_outcomes(tallies, test, placed, [row[:kept] for row, kept in zip(truth["words"], found.kept)])
    return Result(
        protocol="co-occurrence",
        version=1,
        corpus=describe_corpus(test, corpus_name, split, len(np.unique(item_ids))),
        metrics=outcomes.metrics(seed),
        outcomes=outcomes,
        candidates_sha256=candidates_sha256(test["item_id"], test["text"], [seed]),
    )


def score_truth(
    found: Measured,
    truth: Mapping[str, list],
    item_ids: np.ndarray,
    table: Mapping[str, float],
    grid: tuple[int, int],
    image_size: int,
    placed: np.ndarray,
) -> Tallies:
    """Tallies of words, views and patches from what was measured and what is true.

    Args:
        found: scores of every row.
        truth: the corpus's columns `words`, `visible`, `regions` of the same rows.
        item_ids: (rows,).
        table: the blind table by word.
        grid: patches (h, w).
        image_size: pixels of the regions.
        placed: (rows,) bool, the rows on which patches are scored.
    """
    visible = _kept(truth["visible"], found)
    words = [row[:kept] for row, kept in zip(truth["words"], found.kept)]
    scores = dict(found.words) | {"blind": [blind_scores(table, row) for row in words]}
    inside = np.array(
        [
            covered_share([box for box in boxes[:kept] if len(box)], grid, image_size).reshape(-1) >= COVERED
            for boxes, kept in zip(truth["regions"], found.kept)
        ]
    )
    return {
        **word_tallies(scores, visible),
        **view_tallies(scores, visible, words, item_ids),
        **patch_tallies({name: rows[placed] for name, rows in found.patches.items()}, inside[placed], grid),
        **pointing_tallies(found.peaks, truth["regions"], grid, image_size),
    }


def kept_outcomes(tallies: Tallies, test, placed: np.ndarray, words: list[list[str]]) -> Outcomes:
    """The tallies with the names of what they were counted on: photos, items or words."""
    photos, index = photo_names(test), CorpusIndex.from_dataset(test)
    firsts = np.unique(index.item_ids, return_index=True)[1]
    names = {
        "words/item_auc": np.asarray(test["item_id"], dtype=str)[firsts],
        "words/view_auc": np.unique([word for row in words for word in row]),
        "patches/precision": photos[placed],
        "patches/precision_gain": photos[placed],
    }
    outcomes = Outcomes()
    for metric, tally in tallies.items():
        if isinstance(tally, tuple):
            outcomes.ratio(metric, tally, names.get(quantity_of(metric), photos))
        else:
            outcomes.define(metric, tally)
    return outcomes


@torch.no_grad()
def mim_errors(
    model, processor, dataset, masks: np.ndarray, others: np.ndarray, batch_size: int = 128
) -> tuple[np.ndarray, np.ndarray]:
    """Mean squared error on each row's masked patches given its own text, and given another item's: (rows,), (rows,).

    Args:
        model: with a MIM decoder, in eval mode.
        processor: the model's.
        dataset: rows of a corpus.
        masks: (rows, N) bool, equally many True a row.
        others: (rows,) whose text stands in.
        batch_size: of the passes.
    """
    errors = np.empty((2, len(dataset)))
    texts = dataset["text"]
    for rows in mixed_rows(len(dataset), batch_size, seed=0):
        batch = next(batches(processor, dataset, rows, len(rows), model.device))
        hidden = torch.from_numpy(masks[rows]).to(model.device)
        wanted = model.hidden_patches(batch["pixel_values"], hidden)
        other = processor(text=[texts[int(row)] for row in others[rows]]).to(model.device)
        for kind, inputs in enumerate((batch, other)):
            embeds = model.syncmask.encode_text(inputs["input_ids"], inputs["attention_mask"])
            found = model.predict_patches(batch["pixel_values"], hidden, embeds, inputs["attention_mask"])
            errors[kind, rows] = (found - wanted).float().square().mean(dim=(1, 2)).cpu().numpy()
    return errors[0], errors[1]


def _kept(visible: list, found: Measured) -> list[np.ndarray]:
    """Truth of the words that the tokenizer did not cut off, a row each."""
    return [np.array(row[:kept], dtype=bool) for row, kept in zip(visible, found.kept)]


def _check_truth(*splits) -> None:
    for dataset in splits:
        missing = [name for name in TRUTH if name not in dataset.column_names]
        if missing:
            raise ValueError(
                f"the co-occurrence protocol needs ground truth, but this corpus has no column {', '.join(missing)}; "
                "run it on the generated corpus: --corpus garments"
            )
