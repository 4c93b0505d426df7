"""Training to recognise category and subcategory together, from photo and text or from either alone."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from syncmask import SyncMaskForImageTextClassification, SyncMaskProcessor
from syncmask.evaluation.protocol_names import Protocol
from syncmask.evaluation.recognition import LEVELS
from syncmask.evaluation.result import Result

from .arguments import ClassificationArguments
from .batches import random_batches
from .data import TrainData
from .noise import draw_rows
from .progress import Progress
from .results import run_protocols, validate_labels
from .task import Look, Slice, Task

logger = logging.getLogger(__name__)

UNKNOWN = -100  # what cross-entropy leaves out


class Classification(Task):
    """One classifier a label column, all on the fused [CLS].

    Args:
        settings: of the objective. label_sets: {column: labels in the order of the logits}.
        validation: rows of items never trained on, or None. seed: the run's. batch_size: of the global batch.
    """

    def __init__(
        self,
        settings: ClassificationArguments,
        data: TrainData,
        processor: SyncMaskProcessor,
        label_sets: dict[str, list[str]],
        validation: Dataset | None,
        seed: int,
        batch_size: int,
    ):
        super().__init__(dict.fromkeys(label_sets, 1.0), data, processor)
        self.settings, self.label_sets, self.validation = settings, label_sets, validation
        self.seed, self.batch_size = seed, batch_size
        self.labels = label_table(data.rows, label_sets)
        shares = [label_shares(column, len(names)) for column, names in zip(self.labels.T, label_sets.values())]
        self.balance = balance_inputs(shares, settings.balance, settings.balance_strength)

    def order(self, epoch: int) -> tuple[np.ndarray, dict[str, float]]:
        """Return a random order."""
        index = self.data.index
        order = random_batches(index.item_ids, index.text_ids, seed=(self.seed, epoch), batch_size=self.batch_size)
        return order, {}

    def look(self, batch: dict[str, torch.Tensor], progress: Progress, part: Slice) -> Look:
        """Look up the labels, and draw who goes without photo or text."""
        rows, device = batch["row_ids"].cpu(), batch["row_ids"].device
        noise = draw_rows(self.seed, progress.micro_step, len(rows), rank=part.rank, processes=part.processes)
        drop_image, drop_text = drawn_drops(noise, self.settings.drop_image_share, self.settings.drop_text_share)
        names = ("pixel_values", "input_ids", "attention_mask")
        return Look(
            {name: batch[name] for name in names}
            | {"labels": self.labels[rows].to(device)}
            | {"drop_image": drop_image.to(device), "drop_text": drop_text.to(device)}
            | {name: tuple(part.to(device) for part in parts) for name, parts in self.balance.items()}
        )

    def losses(self, output) -> dict[str, torch.Tensor]:
        """Return a loss a label column."""
        return dict(zip(self.label_sets, output.losses))

    def validate(self, model: SyncMaskForImageTextClassification) -> dict[str, float]:
        """Accuracy and macro-F1 of the validation rows by column."""
        settings, main = self.settings, "fused"
        if 1 in (settings.drop_text_share, settings.drop_image_share):
            main = "image_only" if settings.drop_text_share == 1 else "text_only"
        return validate_labels(model, self.processor, self.validation, list(self.label_sets), main, self.seed)

    def evaluate(
        self, folder: Path, student: SyncMaskForImageTextClassification, corpus, name: str
    ) -> dict[str, Result]:
        """Score by `recognition-*` for the columns that have a protocol."""
        levels = {column: protocol for protocol, column in LEVELS.items()}
        protocols = [Protocol(levels[column]) for column in self.label_sets if column in levels]
        return run_protocols(folder, protocols, corpus)


def find_labels(rows: Dataset, columns: list[str]) -> dict[str, list[str]]:
    """List the labels of each column that is there, in alphabetical order.

    Raises:
        SystemExit: no such column, or none with two labels.
    """
    found = {}
    for column in columns:
        labels = sorted({label for label in rows[column] if label}) if column in rows.column_names else []
        if len(labels) > 1:
            found[column] = labels
        elif column in rows.column_names:
            logger.warning("column %r has %d label(s) in the train split: left out", column, len(labels))
    if not found:
        raise SystemExit(
            f"none of the columns {columns} holds two labels or more; the corpus has {', '.join(rows.column_names)}: "
            "--label_columns COLUMN ..."
        )
    return found


def warn_of_unseen(rows: Dataset | None, label_sets: dict[str, list[str]], split: str):
    """Say which labels of a split the model does not know, and can only get wrong."""
    for column, labels in label_sets.items():
        unseen = sorted({label for label in rows[column] if label} - set(labels)) if rows is not None else []
        if unseen:
            logger.warning(
                "%d %s label(s) of the %s split are not in the train split, so they are always wrong: %s",
                *(len(unseen), column, split, ", ".join(unseen[:5])),
            )


def label_table(rows: Dataset, label_sets: dict[str, list[str]]) -> torch.Tensor:
    """Number the rows' labels: (rows, columns) int64, UNKNOWN where a row has none."""
    columns = []
    for name, labels in label_sets.items():
        number = {label: place for place, label in enumerate(labels)}
        columns.append(torch.tensor([number.get(label, UNKNOWN) for label in rows[name]]))
    return torch.stack(columns, dim=1)


def label_shares(labels: torch.Tensor, count: int) -> torch.Tensor:
    """Return each label's share of the labelled rows: (rows,) -> (C,), each above 0 in a train split."""
    counts = torch.bincount(labels[labels != UNKNOWN], minlength=count).double()
    return (counts / counts.sum()).float()


def balance_inputs(shares: list[torch.Tensor], balance: str, strength: float) -> dict[str, tuple[torch.Tensor, ...]]:
    """Return what the forward takes against rare labels: `log_priors`, `class_weights` or nothing.

    Weights are share^-strength, scaled so that a row's weight is 1 on average.

    Example:
        >>> balance_inputs([torch.tensor([0.75, 0.25])], "class_weights", 1.0)["class_weights"][0].tolist()
        [0.6666666865348816, 2.0]
    """
    if balance == "logit_adjustment":
        return {"log_priors": tuple(strength * share.log() for share in shares)}
    if balance == "class_weights":
        weights = [share**-strength for share in shares]
        return {"class_weights": tuple(weight / (weight * share).sum() for weight, share in zip(weights, shares))}
    return {}


def drawn_drops(noise: torch.Tensor, image_share: float, text_share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw which rows go without photo and which without text, never without both: (B,) -> two (B,) bool."""
    return noise < image_share, noise >= 1 - text_share
