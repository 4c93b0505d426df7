"""What a run trains, apart from the loop: `Task` is all that the trainer asks of pretraining and of each finetuning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from syncmask import SyncMaskProcessor
from syncmask.evaluation.masks_over_time import MaskState
from syncmask.evaluation.result import Result

from .data import TrainData
from .lora import merged_weights
from .masking import StepMasks
from .progress import Progress
from .teacher import TeacherOutput


@dataclass(frozen=True)
class Slice:
    """Which part of the global batch a process has: number `rank` of `processes` equal ones."""

    rank: int = 0
    processes: int = 1


@dataclass
class Look:
    """What a task makes of a batch before the forward.

    Args:
        inputs: of the model. seen, masks: the teacher's pass and the masks, where the task has them.
        fallbacks: negatives for which only rule 1 could be kept.
    """

    inputs: dict[str, Any]
    seen: TeacherOutput | None = None
    masks: StepMasks | None = None
    fallbacks: int = 0


class Task(ABC):
    """Rows, batches, inputs, losses, memory and evaluation of what is trained.

    Its tensors and its state are saved in every checkpoint, so a task keeps nothing else from one step to the next.

    Args:
        weights: of the losses in the sum, by name; the model's output calls them NAME_loss.
        data: the rows that are trained on.
        processor: of the model.
    """

    def __init__(self, weights: dict[str, float], data: TrainData, processor: SyncMaskProcessor):
        self.weights, self.data, self.processor = weights, data, processor

    def begin_epoch(self, epoch: int):  # noqa: B027
        """Decide, on every process alike, what the epoch's order depends on."""

    @abstractmethod
    def order(self, epoch: int) -> tuple[np.ndarray, dict[str, float]]:
        """Return the order of an epoch's rows, batch after batch, and figures about it; all processes ask at once."""

    @abstractmethod
    def look(self, batch: dict[str, torch.Tensor], progress: Progress, part: Slice) -> Look:
        """Return the model's inputs for this process's slice of a batch."""

    @abstractmethod
    def validate(self, model: PreTrainedModel) -> dict[str, float]:
        """Return figures on items never trained on, `recall_mean` or `accuracy_mean` first; {} without such items."""

    def mask_state(self, progress: Progress) -> MaskState | None:
        """Return what would be hidden now in the photos that are followed; None where nothing is masked."""
        return None

    @abstractmethod
    def evaluate(self, folder: Path, student: PreTrainedModel, corpus, name: str) -> dict[str, Result]:
        """Run the protocols on the final model, write results/ and what else there is to see, and return the results.

        Args:
            folder: the run's, with final/ in it. student: the trained model. corpus: the splits. name: their source.
        """

    def before_step(self, progress: Progress):  # noqa: B027
        """Decide what all processes must decide together before a batch."""

    def rehearse(self, rows: int) -> int:
        """Bring the task to where its steps cost most, and do what it does between steps on `rows` rows.

        For `--estimate` alone. Returns the rows that a run does this on, 0 = nothing is done between steps.
        """
        return 0

    def losses(self, output) -> dict[str, torch.Tensor]:
        """Return the unweighted losses by name."""
        return {name: output[f"{name}_loss"] for name in self.weights}

    def after_step(self, student: PreTrainedModel):  # noqa: B027
        """Follow the model after an optimiser step."""

    def remember(self, batch: dict[str, torch.Tensor], look: Look, losses: dict[str, float]):  # noqa: B027
        """Keep what later batches need; `losses` are the means over processes."""

    def figures(self, batch: dict[str, torch.Tensor], look: Look, student: PreTrainedModel, step: int) -> dict:
        """Return figures for the log; every process calls it."""
        return {}

    def check(self):  # noqa: B027
        """Stop the run where processes have come to hold different things."""

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return what a checkpoint keeps as safetensors, by file stem."""
        return {}

    def state(self) -> dict:
        """Return what a checkpoint keeps as JSON."""
        return {}

    def restore(self, tensors: dict[str, dict[str, torch.Tensor]], state: dict):  # noqa: B027
        """Take up what `tensors` and `state` returned."""

    def save_final(self, student: PreTrainedModel, final: Path):
        """Write what users load, its adapters merged."""
        student.save_pretrained(final, state_dict=merged_weights(student))
        self.processor.save_pretrained(final)
