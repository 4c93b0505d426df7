"""Recognition of category and subcategory: the protocols `recognition-category` and `recognition-subcategory`.

Accuracy and macro-F1 over a label list that is fixed and stated. A label of the split that the list lacks (FashionGen
has one subcategory in validation alone) is an error, or a class of its own that no model can get right; never class 0.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from syncmask.processing.corpus import CorpusIndex

from .candidates import Candidates
from .classification import label_ids, predicted_ids
from .embedding import Embedder, photos
from .metrics import exact
from .outcomes import F1, F1_UNION, Measure, Outcomes
from .protocols import describe_corpus, in_canonical_order, photo_names
from .result import Result

logger = logging.getLogger(__name__)

LEVELS = {"recognition-category": "category", "recognition-subcategory": "subcategory"}
SIDES = {"fused": ("photo", "text"), "image_only": ("photo",), "text_only": ("text",)}

# Rows (in canonical order) -> logits (N, C) in the order of a label list, or labels (N,).
Scorer = Callable[[object], np.ndarray]


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
    scorers: Mapping[str, Scorer],
    *,
    unknown: str = "wrong",
    commonest: str | None = None,
    label_source: str = "",
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
        scorers: by score.
        unknown: what a label outside the list is: "wrong" (a class of its own, listed and counted in the result and
            in a warning) or "error".
        commonest: the commonest label of training.
        label_source: where the list is from, for the result.
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
    strange = Counter(label for label in truth if label not in set(labels))
    if strange:
        logger.warning("%s: not in the label list, so always wrong: %s", protocol, _counted(strange))
    about = describe_corpus(rows, corpus_name, split, len(set(rows["item_id"])))
    about |= {
        "labels": len(labels),
        "label_source": label_source,
        "label_list": list(labels),
        "labels_with_rows": len(set(truth) & set(labels)),
        "unknown_labels": dict(sorted(strange.items())),
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


def read_labels(path: Path) -> list[str]:
    """A label list from a file: a JSON list of strings, or one label a line.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no label, one twice, or something else than strings.
    """
    content = Path(path).read_text(encoding="utf-8-sig")
    try:
        labels = json.loads(content) if content.lstrip().startswith("[") else content.splitlines()
    except ValueError as error:
        raise ValueError(f"{path} begins like a JSON list, but is none: {error}; mend it") from error
    if not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{path} holds more than strings; wanted a JSON list of labels, or one label a line")
    labels = [label.strip() for label in labels if label.strip()]
    twice = sorted(label for label, count in Counter(labels).items() if count > 1)
    if twice or not labels:
        raise ValueError(f"{path} holds {f'{twice[:3]} twice' if twice else 'no label'}; name each label once")
    return labels


def model_labels(model, level: str) -> list[str] | None:
    """The labels that a model with a classification head tells apart, in the order of its logits; None without a head.

    Raises:
        ValueError: it has a head, but not for this level.
    """
    sets = getattr(model.config, "label_sets", None)
    if not sets or not hasattr(model, "classifiers"):
        return None
    if level not in sets:
        raise ValueError(
            f"this model tells apart {', '.join(sets)}, not {level}; evaluate it by a protocol of one of these, "
            f"or train it with the label set {level!r}"
        )
    return list(sets[level])


def head_scorers(model, processor, level: str, batch_size: int = 128) -> dict[str, Scorer]:
    """Scorers of a classification head: `fused` by photo and text, and by either alone, dropped in the same model."""
    return {name: _classified(model, processor, level, sides, batch_size) for name, sides in SIDES.items()}


def _classified(model, processor, level: str, sides: Sequence[str], batch_size: int) -> Scorer:
    @torch.no_grad()
    def scores(rows) -> np.ndarray:
        texts, parts = list(rows["text"]), []
        for start in range(0, len(rows), batch_size):
            part = np.arange(start, min(start + batch_size, len(rows)))
            inputs = processor(
                images=photos(rows, part) if "photo" in sides else None,
                text=[texts[row] for row in part] if "text" in sides else None,
            ).to(model.device)
            parts.append(model(**inputs).logits_by_set[level].float().cpu().numpy())
        return np.concatenate(parts)

    return scores


def _counted(labels: Mapping[str, int], most: int = 10) -> str:
    named = ", ".join(f"{label!r} ({count} rows)" for label, count in sorted(labels.items())[:most])
    return named + (", ..." if len(labels) > most else "")


def zero_shot(model, processor, labels: Sequence[str], batch_size: int = 128) -> Scorer:
    """A scorer without any training on labels: cosines (N, C) of photos and the labels' names as texts."""

    def scores(rows) -> np.ndarray:
        texts = [label.lower() for label in labels]
        index = CorpusIndex(np.arange(len(texts)), np.arange(len(texts)), texts)
        embedder = Embedder(model, processor, rows, index, batch_size=batch_size)
        return embedder.image_feats().astype(np.float64) @ embedder.text_feats().astype(np.float64).T

    return scores
