"""Training for image-text retrieval: ITC and ITM alone, with pretraining's soft targets, hard negatives and batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from syncmask import SyncMaskForImageTextRetrieval, SyncMaskProcessor
from syncmask.evaluation.protocol_names import Protocol
from syncmask.evaluation.result import Result

from .contrast import Contrast
from .noise import draw_rows
from .progress import Progress
from .results import run_protocols, save_grouping, validate_items
from .task import Look, Slice, Task


class Retrieval(Task):
    """Every photo of an item and every equal text is a positive; negatives are hard, but no false ones.

    Args:
        accelerator: precision. contrast: teacher, negatives and batches.
        validation: rows of items never trained on, or None. seed: the run's.
    """

    def __init__(
        self, accelerator: Accelerator, processor: SyncMaskProcessor, contrast: Contrast, validation, seed: int
    ):
        settings = contrast.settings
        super().__init__({"itc": settings.itc_weight, "itm": settings.itm_weight}, contrast.data, processor)
        self.accelerator, self.contrast, self.validation, self.seed = accelerator, contrast, validation, seed

    def begin_epoch(self, epoch: int):
        """Decide whether batches are grouped."""
        self.contrast.begin_epoch(epoch)

    def order(self, epoch: int) -> tuple[np.ndarray, dict[str, float]]:
        """Return an epoch's order and figures about it."""
        return self.contrast.order(epoch)

    def look(self, batch: dict[str, torch.Tensor], progress: Progress, part: Slice) -> Look:
        """Let the teacher look at the pairs; negatives and soft targets follow."""
        rows = len(batch["row_ids"])
        noise = draw_rows(self.seed, progress.micro_step, rows, rows, 2, rank=part.rank, processes=part.processes)
        with self.accelerator.autocast():
            seen = self.contrast.teacher(batch)
        inputs, fallbacks = self.contrast.inputs(batch, seen, noise, progress.step)
        return Look(inputs | {"return_loss": True}, seen, fallbacks=fallbacks)

    def after_step(self, student: SyncMaskForImageTextRetrieval):
        """Let the teacher follow."""
        self.contrast.teacher.update(student)

    def remember(self, batch: dict[str, torch.Tensor], look: Look, losses: dict[str, float]):
        """Keep features and the running mean of ITM."""
        self.contrast.remember(batch, look.seen, losses["itm"])

    def figures(self, batch, look: Look, student: SyncMaskForImageTextRetrieval, step: int) -> dict[str, float]:
        """Return the temperature."""
        return {"temperature": float(student.syncmask.temperature.detach())}

    def check(self):
        """Stop the run where processes have different teachers."""
        self.contrast.check()

    def validate(self, model: SyncMaskForImageTextRetrieval) -> dict[str, float]:
        """Recall on the validation items."""
        return validate_items(model, self.processor, self.validation, self.seed)

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return teacher and feature bank."""
        return self.contrast.tensors()

    def state(self) -> dict:
        """Return the state of grouping."""
        return self.contrast.state()

    def restore(self, tensors: dict[str, dict[str, torch.Tensor]], state: dict):
        """Take up what `tensors` and `state` returned."""
        self.contrast.restore(tensors, state)

    def evaluate(self, folder: Path, student: SyncMaskForImageTextRetrieval, corpus, name: str) -> dict[str, Result]:
        """Score by `items`; write results/ and report/."""
        save_grouping(folder, self.contrast, corpus["train"], self.seed)
        return run_protocols(folder, [Protocol.ITEMS], corpus)
