"""Training for composed retrieval: a reference photo and a text of what should differ find the target photo."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from syncmask import SyncMaskForComposedImageRetrieval, SyncMaskProcessor
from syncmask.evaluation.protocol_names import Protocol
from syncmask.evaluation.result import Result
from syncmask.processing.readers_fashioniq import holds_fashioniq, is_converted

from .batches import batch_statistics, random_batches
from .data import TrainData
from .progress import Progress
from .results import run_protocols, validate_triplets
from .task import Look, Slice, Task

REFERENCE, REFERENCE_ID = "candidate", "candidate_id"


class Composed(Task):
    """Triplets: row r asks with its reference photo and text for its target photo.

    Args:
        data: of triplets; its records have `reference_pixel_values`.
        validation: triplets never trained on, or None.
        seed: the run's. batch_size: of the global batch.
    """

    def __init__(
        self, data: TrainData, processor: SyncMaskProcessor, validation: Dataset | None, seed: int, batch_size: int
    ):
        # Equal texts ("the same but in red") are no conflict here, so each row counts as a text of its own.
        index = dataclasses.replace(data.index, text_ids=np.arange(len(data.rows)), texts=list(data.rows["text"]))
        super().__init__({"composed": 1.0}, dataclasses.replace(data, index=index), processor)
        self.validation, self.seed, self.batch_size = validation, seed, batch_size
        self.target_ids, self.reference_ids = photo_ids(data.rows["item_id"], data.rows[REFERENCE_ID])

    def order(self, epoch: int) -> tuple[np.ndarray, dict[str, float]]:
        """Return a random order in which no batch asks for a target twice, where that is possible."""
        items, texts = self.data.index.item_ids, self.data.index.text_ids
        order = random_batches(items, texts, seed=(self.seed, epoch), batch_size=self.batch_size)
        return order, batch_statistics(order, items, texts, self.batch_size)

    def look(self, batch: dict[str, torch.Tensor], progress: Progress, part: Slice) -> Look:
        """Name the photos, so that equal ones are no negatives of each other."""
        rows, device = batch["row_ids"].cpu(), batch["row_ids"].device
        return Look(
            {
                "pixel_values": batch["reference_pixel_values"],
                "input_ids": batch["input_ids"],
                "attention_mask": batch["attention_mask"],
                "target_pixel_values": batch["pixel_values"],
                "target_ids": self.target_ids[rows].to(device),
                "reference_ids": self.reference_ids[rows].to(device),
            }
        )

    def losses(self, output) -> dict[str, torch.Tensor]:
        """Return the one loss."""
        return {"composed": output.loss}

    def figures(self, batch, look: Look, student: SyncMaskForComposedImageRetrieval, step: int) -> dict[str, float]:
        """Return the temperature."""
        return {"temperature": float(student.syncmask.temperature.detach())}

    def validate(self, model: SyncMaskForComposedImageRetrieval) -> dict[str, float]:
        """Recall of validation triplets among their photos."""
        return validate_triplets(model, self.processor, self.validation, self.seed)

    def evaluate(
        self, folder: Path, student: SyncMaskForComposedImageRetrieval, corpus, name: str
    ) -> dict[str, Result]:
        """Score by both FashionIQ protocols on FashionIQ, by `colour-variants` on other triplets."""
        if holds_fashioniq(Path(name)) or is_converted(Path(name)):
            return run_protocols(folder, [Protocol.FASHIONIQ_ORIGINAL, Protocol.FASHIONIQ_VAL], corpus, name)
        return run_protocols(folder, [Protocol.COLOUR_VARIANTS], corpus)


def photo_ids(targets: list[str], references: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Number photos by name across both lists: two (rows,) int64 tensors.

    Example:
        >>> [ids.tolist() for ids in photo_ids(["b", "a"], ["a", "c"])]
        [[1, 0], [0, 2]]
    """
    numbers = np.unique([*targets, *references], return_inverse=True)[1]
    return torch.from_numpy(numbers[: len(targets)]), torch.from_numpy(numbers[len(targets) :])
