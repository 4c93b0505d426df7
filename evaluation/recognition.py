"""Recognition of category and subcategory: the protocols `recognition-category` and `recognition-subcategory`.

Accuracy and macro-F1 over a label list that is fixed and stated. A label of the split that the list lacks (FashionGen
has one subcategory in validation alone) is an error, or a class of its own that no model can get right; never class 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from syncmask.processing.corpus import CorpusIndex

from .candidates import Candidates
from .classification import label_ids, predicted_ids
from .embedding import Embedder
from .metrics import exact
from .outcomes import F1, F1_UNION, Measure, Outcomes
from .protocols import describe_corpus, in_canonical_order, photo_names
from .result import Result

LEVELS = {"recognition-category": "category", "recognition-subcategory": "subcategory"}


# --------------------------------------------------------------------------------------------------------- pure


def recognition_outcomes(
    logits: Mapping[str, np.ndarray],
    truth: Sequence[str],
    labels: Sequence[str],
    *,
    level: str = "category",
    unknown: str = "error",
    commonest: str | None = None,
    row_names: Sequence[str] | None = None,
) -> Outcomes:
    """Accuracy and macro-F1 by score, beside always saying the commonest label.

    Args:
        logits: by score (such as `fused`, `image_only`, `text_only`), (N, C) in the order of `labels`; a tie of another
            class with the true one counts as wrong. Predicted labels (N,) str do too.
        truth: (N,) the rows' labels.
        labels: (C,) the fixed list.
        level: names the metrics.
        unknown: "error" or "wrong", see `label_ids`.
        commonest: the label that is the commonest in training; of `truth` when None.
        row_names: (N,) what the rows are called in the file of queries.

    Returns:
        Outcomes with `category/accuracy/fused`, `category/macro_f1/fused` (over the labels of the list that have a row:
        the same for all models) and `category/macro_f1_union/fused` (over labels true or predicted, as published
        tables have it; its denominator moves with the model).

    Raises:
        ValueError: see `label_ids` and `predicted_ids`; a predicted label that is not in the list.
    """
    true, every = label_ids(truth, labels, unknown=unknown)
    names = np.arange(len(true)).astype(str) if row_names is None else np.asarray(row_names, dtype=str)
    outcomes = Outcomes(ids={level: names, f"{level}_labels": np.asarray(every, dtype=str)})
    commonest = commonest or Counter(truth).most_common(1)[0][0]
    found = {score: _predicted(values, true, labels) for score, values in logits.items()}
    found["commonest"] = np.full(len(true), every.index(commonest) if commonest in every else -1)
    for score, predicted in found.items():
        outcomes.add(f"{level}/{score}", np.stack([true, predicted], axis=1).astype(np.int32))
        outcomes.add(f"{level}/{score}_right", predicted == true)
    for score in found:
        outcomes.define(f"{level}/accuracy/{score}", Measure((f"{level}/{score}_right",)))
    outcomes.define(f"{level}/accuracy/chance", exact(1 / len(labels), len(true)))
    for how in (F1, F1_UNION):
        for score in found:
            outcomes.define(f"{level}/{how}/{score}", Measure((f"{level}/{score}",), how=how, labels=len(every)))
    return outcomes


def _predicted(values, truth: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim == 1:
        strange = sorted(set(values.tolist()) - set(labels))
        if strange:
            raise ValueError(f"predicted labels {strange[:3]} are not in the list of {len(labels)}; use the list's own")
        number = {label: place for place, label in enumerate(labels)}
        return np.array([number[label] for label in values.tolist()], dtype=np.int64)
    if values.ndim != 2 or values.shape[1] != len(labels):
        raise ValueError(f"logits {values.shape} do not fit the list of {len(labels)} labels; give one column a label")
    return predicted_ids(values, truth)


# --------------------------------------------------------------------------------------------- with a corpus


def recognition(
    protocol: str,
    dataset,
    labels: Sequence[str],
    scorers: Mapping[str, object],
    *,
    unknown: str = "wrong",
    commonest: str | None = None,
    corpus_name: str = "",
    split: str = "validation",
    max_rows: int | None = None,
    seed: int = 0,
) -> Result:
    """Runs one of the two protocols; rows without a label are left out and counted in the result.

    Args:
        protocol: `recognition-category` or `recognition-subcategory`.
        dataset: rows of `load_corpus` with that column.
        labels: the fixed list.
        scorers: by score, a function from the rows (in canonical order) to logits (N, C) or labels (N,).
        unknown: what a label outside the list is: "wrong" (a class of its own) or "error".
        commonest: the commonest label of training.
        corpus_name: for the result.
        split: for the result.
        max_rows: whole items up to this many photos, a seeded sample; None = all.
        seed: of sample and bootstrap.

    Raises:
        ValueError: the corpus has no such column, or no row with a label.
    """
    level = LEVELS[protocol]
    if level not in dataset.column_names:
        raise ValueError(f"{protocol} needs a column {level!r}; the corpus has {', '.join(dataset.column_names)}")
    labelled = np.flatnonzero([bool(label and label.strip()) for label in dataset[level]])
    if not len(labelled):
        raise ValueError(f"no row of the split has a {level}; give another split or corpus")
    rows = in_canonical_order(dataset.select(labelled), max_rows, seed)
    truth, names = rows[level], photo_names(rows)
    outcomes = recognition_outcomes(
        {name: scorer(rows) for name, scorer in scorers.items()},
        truth,
        labels,
        level=level,
        unknown=unknown,
        commonest=commonest,
        row_names=names,
    )
    about = describe_corpus(rows, corpus_name, split, len(set(rows["item_id"])))
    about |= {
        "labels": len(labels),
        "labels_with_rows": len(set(truth) & set(labels)),
        "unknown_labels": sorted(set(truth) - set(labels)),
        "rows_without_label": len(dataset) - len(labelled),
    }
    return Result(
        protocol=protocol,
        version=1,
        corpus=about,
        metrics=outcomes.metrics(seed),
        outcomes=outcomes,
        candidates=Candidates(
            {"photos": names, "labels": np.asarray(labels, dtype=str), "truth": np.asarray(truth, dtype=str)}
        ),
    )


def label_list(dataset, level: str) -> tuple[list[str], str]:
    """The labels of a train split in alphabetical order, and the commonest one (the first of equals).

    Raises:
        ValueError: the split has no such column or no label.
    """
    found = Counter(label for label in dataset[level] if label and label.strip()) if level in dataset.features else {}
    if not found:
        raise ValueError(f"the train split has no {level}, so there is no label list; give the labels of the model")
    return sorted(found), min(found, key=lambda label: (-found[label], label))


def zero_shot(model, processor, labels: Sequence[str], batch_size: int = 128):
    """A scorer without any training on labels: cosines (N, C) of photos and the labels' names as texts."""

    def scores(rows) -> np.ndarray:
        texts = [label.lower() for label in labels]
        index = CorpusIndex(np.arange(len(texts)), np.arange(len(texts)), texts)
        embedder = Embedder(model, processor, rows, index, batch_size=batch_size)
        return embedder.image_feats().astype(np.float64) @ embedder.text_feats().astype(np.float64).T

    return scores
