"""After training: the final folder, the protocols' results, the report and the summary that is printed."""

from pathlib import Path

import numpy as np

from syncmask.evaluation.co_occurrence_protocol import co_occurrence
from syncmask.evaluation.false_negatives import itm_rates, pair_rates
from syncmask.evaluation.loading import sha256
from syncmask.evaluation.measure import INSTANCE_WEIGHTS
from syncmask.evaluation.metrics import Metric
from syncmask.evaluation.protocols import items
from syncmask.evaluation.result import Result
from syncmask.evaluation.showcase import report_run

from .batches import random_batches
from .grouping import group_batches
from .planning import EpochPlanner
from .trainer import Trainer

PROTOCOL_ROWS = 1024


def save_final(trainer: Trainer) -> Path:
    """Write what users load: weights, config, processor, and the words' running means beside them."""
    final = trainer.folder.path / "final"
    kept = trainer.arguments.run.final_weights
    model = trainer.student if kept == "student" else trainer.teacher.model
    model.save_pretrained(final)
    trainer.processor.save_pretrained(final)
    settings = {
        "strategy": trainer.masking.settings.strategy,
        "instance_weight": str(trainer.masking.settings.instance_weight),
        "layer": str(trainer.teacher.layer),
        "weights": kept,
    }
    trainer.masking.word_scores.save(final / "word_scores.safetensors", settings)
    return final


def evaluate_run(trainer: Trainer, corpus) -> dict[str, Result]:
    """Score the final model on items never trained on, and write results/ and report/.

    `items` scores the student, which users load; `co-occurrence`, where the corpus has ground truth, the teacher, whose
    masks are in question. The protocols' own seeds stay as they are, so that runs of several seeds can be compared.
    """
    name = trainer.arguments.data.corpus
    split = "test" if "test" in corpus and len(corpus["test"]) else "validation"
    unseen = corpus[split]
    student, teacher = trainer.student.eval(), trainer.teacher.model
    results = {"items": items(student, trainer.processor, unseen, corpus_name=name, split=split, rerank_queries=300)}
    strategy = trainer.masking.settings.strategy
    means = {strategy: trainer.masking.word_scores} if strategy in INSTANCE_WEIGHTS else {}
    weights = INSTANCE_WEIGHTS | {name: trainer.masking.settings.instance_weight for name in means}
    if "visible" in unseen.column_names:
        result = co_occurrence(
            teacher,
            trainer.processor,
            trainer.data.rows,
            unseen,
            word_means=means,
            instance_weights=weights,
            layer=trainer.teacher.layer,
            others=max(3, trainer.masking.settings.evidence_others),
            corpus_name=name,
            split=split,
            max_rows=PROTOCOL_ROWS,
            train_rows=PROTOCOL_ROWS,
        )
        result.metrics |= false_negatives(trainer)
        results["co-occurrence"] = result
    final = trainer.folder.path / "final"
    for result in results.values():
        result.model = {"path": str(final), "sha256": sha256(final / "model.safetensors")}
        result.save(trainer.folder.path / "results")
    report_run(trainer.folder.path, teacher, trainer.processor, unseen, strategy, word_means=means.get(strategy))
    return results


def false_negatives(trainer: Trainer) -> dict[str, Metric]:
    """Group the train rows anew from the final features under three sets of rules and count false negatives."""
    data, bank, seed = trainer.data, trainer.bank, trainer.arguments.run.seed
    planner: EpochPlanner = trainer.plan_epoch
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
        temperature=float(trainer.teacher.model.syncmask.temperature.detach()),
        text_rows=data.texts,
        tau=data.tau,
        seed=seed,
    )


def write_summary(trainer: Trainer, corpus, results: dict[str, Result], minutes: float):
    """Print the results' tables and where everything is; keep the same in summary.txt."""
    path = trainer.folder.path
    counts = {name: (len(rows), len(np.unique(rows["item_id"]))) for name, rows in corpus.items()}
    lines = [
        "",
        "corpus: " + ", ".join(f"{name} {rows} photos of {items} items" for name, (rows, items) in counts.items()),
        f"trained {trainer.progress.step} steps in {trainer.progress.epoch} epochs; {minutes:.1f} minutes in all",
    ]
    if trainer.progress.substitutes:
        lines.append(
            f"{trainer.progress.substitutes} photos could not be read when they were wanted; other rows stood in for "
            f"them: {path / 'substitutes.jsonl'}"
        )
    for result in results.values():
        lines += ["", result.table()]
    lines += ["", f"model   {path / 'final'}", f"results {path / 'results'}"]
    if results:
        lines.append(f"report  {path / 'report' / 'index.html'}")
    text = "\n".join(lines)
    print(text, flush=True)
    (path / "summary.txt").write_text(text + "\n", encoding="utf-8")
