"""Accuracy and macro-F1 over a label list that is fixed before anything is predicted. Pure numpy.

A library's macro-F1 averages over the labels that occur in the truth or in the predictions, so its denominator moves
with the model. Here it is the labels of the list that have a row in the truth: the same for every model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .metrics import DRAWS, INTERVAL, Metric


def label_ids(truth: Sequence[str], labels: Sequence[str], *, unknown: str = "error") -> tuple[np.ndarray, list[str]]:
    """Numbers (N,) of the true labels in the list, and the list with the unknown ones behind it.

    Args:
        truth: one label a row.
        labels: the fixed list, in the order of a model's logits.
        unknown: "error" refuses a label that is not in the list; "wrong" gives it a class of its own behind the list,
            which no model can predict. It never becomes class 0.

    Raises:
        ValueError: a label twice in the list, an unknown label (under "error"), another word for `unknown`.

    Example: `label_ids(["b", "z"], ["a", "b"], unknown="wrong")` is `([1, 2], ["a", "b", "z"])`.
    """
    if unknown not in ("error", "wrong"):
        raise ValueError(f"unknown is {unknown!r}; wanted 'error' or 'wrong'")
    if len(set(labels)) < len(labels):
        twice = sorted({label for label in labels if list(labels).count(label) > 1})
        raise ValueError(f"the label list holds {twice[:3]} more than once; name each label once")
    new = sorted(set(truth) - set(labels))
    if new and unknown == "error":
        count = sum(label in new for label in truth)
        raise ValueError(
            f"{count} rows have labels that are not in the list of {len(labels)}: {new[:3]}; add them to the list, "
            "or count them as classes of their own that are always wrong (unknown='wrong')"
        )
    every = [*labels, *new]
    number = {label: place for place, label in enumerate(every)}
    return np.array([number[label] for label in truth], dtype=np.int64), every


def predicted_ids(logits: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The class (N,) of the highest logit; where another class ties with the true one, the other one.

    Args:
        logits: (N, C).
        truth: (N,) int; C and above = a class that the model does not have.

    Raises:
        ValueError: a logit is NaN, or the shapes do not fit.

    Example: `predicted_ids([[1, 1]], [0])` is `[1]`: a model that says the same of all classes gets no luck.
    """
    logits, truth = np.array(logits, dtype=np.float64), np.asarray(truth)
    if logits.ndim != 2 or len(logits) != len(truth):
        raise ValueError(f"logits {logits.shape} must be (rows, classes) for {len(truth)} rows of truth")
    if np.isnan(logits).any():
        raise ValueError(f"{int(np.isnan(logits).sum())} of {logits.size} logits are NaN: the model diverged")
    own = np.flatnonzero(truth < logits.shape[1])
    # The true class wins alone or not at all: the smallest step below its value decides ties against it.
    logits[own, truth[own]] = np.nextafter(logits[own, truth[own]], -np.inf)
    return logits.argmax(axis=1)


def f1_by_label(
    truth: np.ndarray, predicted: np.ndarray, num_labels: int, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """F1 (L,) of each label, how often it is true (L,), how often it is predicted (L,); a label that is neither has 0.

    `weights` (N,) is how often each row counts, by default once.
    """
    weights = np.ones(len(truth)) if weights is None else weights
    right = np.bincount(truth, weights=weights * (truth == predicted), minlength=num_labels)
    true = np.bincount(truth, weights=weights, minlength=num_labels)
    named = np.bincount(predicted, weights=weights, minlength=num_labels)
    return 2 * right / np.maximum(true + named, 1), true, named


def macro_f1(truth: np.ndarray, predicted: np.ndarray, num_labels: int, weights: np.ndarray | None = None) -> float:
    """Mean F1 over the labels that have a row in the truth; predicting any other label costs the true one its recall.

    Example: `macro_f1([0, 0, 1], [0, 2, 1], 4)` is (2/3 + 1) / 2.
    """
    f1, true, _ = f1_by_label(np.asarray(truth), np.asarray(predicted), num_labels, weights)
    return float(f1[true > 0].mean())


def macro_f1_union(
    truth: np.ndarray, predicted: np.ndarray, num_labels: int, weights: np.ndarray | None = None
) -> float:
    """Mean F1 over the labels that are true or predicted somewhere: the reading of published tables."""
    f1, true, named = f1_by_label(np.asarray(truth), np.asarray(predicted), num_labels, weights)
    return float(f1[(true > 0) | (named > 0)].mean())


def cells_of(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows of (N, k) as columns (k, cells), and how often each occurs (cells,)."""
    cells, counts = np.unique(rows, axis=0, return_counts=True)
    return cells.T, counts


def cell_draws(counts: np.ndarray, *, seed: int = 0, draws: int = DRAWS):
    """How often each cell is in a resample of all rows with replacement, `draws` times: what a bootstrap would draw."""
    rng, n = np.random.default_rng(seed), int(counts.sum())
    for _ in range(draws):
        yield rng.multinomial(n, counts / n)


def bootstrap_f1(measure, truth: np.ndarray, predicted: np.ndarray, num_labels: int, *, seed: int = 0) -> Metric:
    """`macro_f1` or `macro_f1_union` with its interval over rows; a label without a row in a resample is left out."""
    (truth, predicted), counts = cells_of(np.column_stack([truth, predicted]))
    found = [measure(truth, predicted, num_labels, drawn) for drawn in cell_draws(counts, seed=seed)]
    low, high = np.percentile(found, INTERVAL)
    value = measure(truth, predicted, num_labels, counts)
    return Metric(value=value, low=float(low), high=float(high), n=int(counts.sum()))
