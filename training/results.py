"""Figures while training and at its end: validation, and the protocols that a run is evaluated by."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from datasets import Dataset, DatasetDict

from syncmask import SyncMaskForPreTraining
from syncmask.evaluation.batch_sheets import describe, save_batches
from syncmask.evaluation.co_occurrence_protocol import co_occurrence
from syncmask.evaluation.composed import retrieve_variants
from syncmask.evaluation.false_negatives import itm_rates, pair_rates
from syncmask.evaluation.loading import load_checkpoint, sha256
from syncmask.evaluation.measure import INSTANCE_WEIGHTS, default_weights
from syncmask.evaluation.metrics import Metric
from syncmask.evaluation.protocol_names import Protocol
from syncmask.evaluation.protocols import items, photo_names
from syncmask.evaluation.recognition import head_scorers, recognition_outcomes
from syncmask.evaluation.reporting import report_run
from syncmask.evaluation.result import Result
from syncmask.evaluation.running import Request, run_protocol
from syncmask.processing.collator import UnreadablePhoto

from .batches import random_batches
from .grouping import group_batches
from .substitutes import readable

if TYPE_CHECKING:
    from .contrast import Contrast
    from .task_pretraining import Pretraining

Measured = TypeVar("Measured")

VALIDATION_ROWS = 1000
VALIDATION_QUERIES = 200
PROTOCOL_ROWS = 1024


def validate_items(model, processor, dataset, seed: int) -> dict[str, float]:
    """Recall both ways on items never trained on, by ITC and re-ranked by ITM; empty without a validation split."""
    if dataset is None or not len(dataset):
        return {}
    options = {"max_rows": VALIDATION_ROWS, "rerank_queries": VALIDATION_QUERIES, "seed": seed}
    with evaluating(model):
        result = on_readable(lambda rows: items(model, processor, rows, split="validation", **options), dataset)
    figures = {name: metric["value"] for name, metric in result.metrics.items()}
    return {"recall_mean": figures["both_ways/mean_recall/itc"], **figures}


def validate_triplets(model, processor, dataset, seed: int) -> dict[str, float]:
    """Recall of targets among the photos of validation triplets; empty without a validation split."""
    if dataset is None or not len(dataset):
        return {}
    with evaluating(model):
        options = {"split": "validation", "max_rows": VALIDATION_ROWS, "seed": seed}
        result = on_readable(lambda rows: retrieve_variants(model, processor, rows, **options), dataset)
    figures = {name: metric["value"] for name, metric in result.metrics.items()}
    return {"recall_mean": figures["all/mean_recall/composed"], **figures}


def validate_labels(model, processor, dataset, columns: list[str], main: str, seed: int) -> dict[str, float]:
    """Accuracy and macro-F1 by label column on validation rows; empty without a validation split.

    Args:
        columns: those with labels. main: the score whose mean accuracy comes first: fused, image_only or text_only.
    """
    if dataset is None or not len(dataset):
        return {}
    figures = {}
    with evaluating(model):
        for column in columns:
            labelled = [row for row, label in enumerate(dataset[column]) if label][:VALIDATION_ROWS]
            if labelled:
                measure = partial(recognised, model, processor, column, seed)
                figures |= on_readable(measure, dataset.select(labelled))
    accuracies = [value for name, value in figures.items() if name.endswith(f"/accuracy/{main}")]
    return {"accuracy_mean": sum(accuracies) / len(accuracies), **figures} if accuracies else {}


def recognised(model, processor, column: str, seed: int, rows: Dataset) -> dict[str, float]:
    """Accuracy and macro-F1 of one label column, by photo and text and by either alone."""
    logits = {name: score(rows) for name, score in head_scorers(model, processor, column).items()}
    labels = model.config.label_sets[column]
    outcomes = recognition_outcomes(logits, rows[column], labels, level=column, unknown="wrong")
    return {name: metric["value"] for name, metric in outcomes.metrics(seed).items()}


def on_readable(measure: Callable[[Dataset], Measured], dataset: Dataset) -> Measured:
    """Measure on rows, without those whose photo went bad: that must not end a run which only looks on."""
    try:
        return measure(dataset)
    except UnreadablePhoto:
        return measure(readable(dataset))


@contextmanager
def evaluating(model):
    """Hold a model in eval mode."""
    training = model.training
    model.eval()
    yield
    model.train(training)


def run_protocols(
    folder: Path, protocols: list[Protocol], splits: DatasetDict, corpus: str | None = None
) -> dict[str, Result]:
    """Score a run's final model, as users load it, by some protocols; write results/ and report/.

    Args:
        folder: the run's. protocols: in order. splits: of the run's corpus. corpus: another to score it on.
    """
    loaded = load_checkpoint(folder)
    results = {protocol.value: run_protocol(loaded, Request(protocol, corpus)) for protocol in protocols}
    for result in results.values():
        result.save(folder / "results")
    report_run(folder, loaded, splits)
    return results


def save_grouping(folder: Path, contrast: Contrast, train: Dataset, seed: int):
    """Write grouping.json: a random batch and one grouped by the final features, for the report.

    Args:
        folder: the run's. contrast: with the features. train: the whole train split, for the names of its photos.
        seed: the run's.
    """
    data, planner, feats = contrast.data, contrast.plan_epoch, (contrast.bank.image_feats, contrast.bank.text_feats)
    rows, batch = data.index, planner.batch_size
    if len(data.rows) < batch:
        return
    options = {"seed": seed, "batch_size": batch}
    orders = {
        "random": random_batches(rows.item_ids, rows.text_ids, **options),
        "grouped": group_batches(*feats, rows.item_ids, rows.text_ids, data.texts, tau=data.tau, **options).order,
    }
    # Whole items were set aside as a probe, so what is left of the split is told by its items.
    kept = set(data.rows["item_id"])
    names = photo_names(train)[[item in kept for item in train["item_id"]]]
    about = (batch, names, rows.item_ids, *(part.numpy() for part in feats), planner.truth)
    save_batches(folder, {kind: describe(order, *about) for kind, order in orders.items()}, contrast.grouped)


def evaluate_pretraining(
    task: Pretraining, folder: Path, student: SyncMaskForPreTraining, corpus, name: str
) -> dict[str, Result]:
    """Score the final model on items never trained on, and write results/ and report/.

    `items` scores the student, which users load; `co-occurrence`, where the corpus has ground truth, the teacher, whose
    masks are in question. The protocols' own seeds stay as they are, so that runs of several seeds can be compared.
    """
    split = "test" if "test" in corpus and len(corpus["test"]) else "validation"
    unseen = corpus[split]
    teacher, masking = task.teacher.model, task.masking
    results = {"items": items(student, task.processor, unseen, corpus_name=name, split=split, rerank_queries=300)}
    strategy = masking.settings.strategy
    means = {strategy: masking.word_scores} if strategy in INSTANCE_WEIGHTS else {}
    weights = default_weights(teacher) | {name: masking.settings.instance_weight for name in means}
    if "visible" in unseen.column_names:
        result = co_occurrence(
            teacher,
            task.processor,
            task.data.rows,
            unseen,
            word_means=means,
            instance_weights=weights,
            layer=task.teacher.layer,
            others=max(3, masking.settings.evidence_others),
            corpus_name=name,
            split=split,
            max_rows=PROTOCOL_ROWS,
            train_rows=PROTOCOL_ROWS,
        )
        result.metrics |= false_negatives(task)
        results["co-occurrence"] = result
    final = folder / "final"
    for result in results.values():
        result.model = {"path": str(final), "sha256": sha256(final / "model.safetensors")}
        result.save(folder / "results")
    save_grouping(folder, task.contrast, corpus["train"], task.seed)
    report_run(folder, load_checkpoint(folder), corpus, split)
    return results


def false_negatives(task: Pretraining) -> dict[str, Metric]:
    """Group the train rows anew from the final features under three sets of rules and count false negatives."""
    data, bank, seed = task.data, task.contrast.bank, task.seed
    planner = task.contrast.plan_epoch
    rows, batch = data.index, planner.batch_size
    options = {"seed": seed, "batch_size": batch}
    features = (bank.image_feats, bank.text_feats, rows.item_ids, rows.text_ids)
    orders = {
        "random": random_batches(rows.item_ids, rows.text_ids, **options),
        "rule_1": group_batches(*features, None, tau=None, **options).order,
        "rules_1_2": group_batches(*features, data.texts, tau=data.tau, **options).order,
    }
    rates = pair_rates(planner.truth, orders, rows.item_ids, batch, seed=seed)
    return rates | itm_rates(
        planner.truth,
        orders,
        rows.item_ids,
        rows.text_ids,
        bank.image_feats.numpy(),
        bank.text_feats.numpy(),
        batch,
        temperature=float(task.teacher.model.syncmask.temperature.detach()),
        text_rows=data.texts,
        tau=data.tau,
        seed=seed,
    )
