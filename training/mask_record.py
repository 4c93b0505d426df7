"""A few photos that are followed through training: what the teacher would hide in them after each epoch."""

from __future__ import annotations

import logging

import numpy as np
import torch
from datasets import Dataset

from syncmask import SyncMaskProcessor
from syncmask.evaluation.embedding import batches
from syncmask.evaluation.masks_over_time import PHOTOS, MaskState
from syncmask.evaluation.measure import hard_masks
from syncmask.evaluation.protocols import photo_names
from syncmask.evaluation.showcase import spread_rows
from syncmask.processing.collator import UnreadablePhoto
from syncmask.processing.corpus import CorpusIndex

from .masking import Masking
from .substitutes import readable_rows
from .teacher import MomentumTeacher

logger = logging.getLogger(__name__)


class MaskRecord:
    """Follows photos of different validation items, a seeded choice; those that cannot be read are left out.

    It draws no random numbers and changes nothing, so a run with and without it has the same bits.

    Args:
        validation: rows of items never trained on, or None: then nothing is recorded.
        processor: of the model. seed: the run's.
    """

    def __init__(self, validation: Dataset | None, processor: SyncMaskProcessor, seed: int):
        self.processor, self.seed = processor, seed
        rows = [] if validation is None or not len(validation) else followed(validation, seed)
        self.photos = validation.select(rows) if len(rows) else None
        self.names = photo_names(validation)[rows].tolist() if len(rows) else []

    def state(self, step: int, epoch: int, teacher: MomentumTeacher, masking: Masking) -> MaskState | None:
        """Return what the teacher would hide now; None without two photos to compare."""
        if self.photos is None or len(self.photos) < 2:
            return None
        every, settings = np.arange(len(self.photos)), masking.settings
        try:
            batch = next(batches(self.processor, self.photos, every, len(every), teacher.model.device))
        except UnreadablePhoto as problem:
            logger.warning("the masks over time lack step %d: %s", step, problem)
            return None
        words, patches, pairs = hard_masks(
            teacher.model,
            batch,
            CorpusIndex.from_dataset(self.photos).item_ids,
            settings.strategy,
            word_means=masking.word_scores if settings.strategy != "random" else None,
            instance_weight=settings.instance_weight,
            word_rate=settings.word_rate,
            patch_rate=settings.patch_rate,
            layer=teacher.layer,
            others=settings.evidence_others,
            seed=self.seed,
        )
        return MaskState(
            step=step,
            epoch=epoch,
            strategy=settings.strategy,
            strength=masking.strength(step),
            grid=teacher.model.syncmask.grid,
            photos=self.names,
            lengths=pairs.valid.sum(dim=1).tolist(),
            words=places(words),
            patches=places(patches),
        )


def followed(validation: Dataset, seed: int) -> np.ndarray:
    """Choose rows: one of each of some items, without those whose photos cannot be read."""
    rows = spread_rows(validation, PHOTOS, seed)
    return rows[readable_rows(validation.select(rows))]


def places(masks: torch.Tensor) -> list[list[int]]:
    """List what is hidden in each row of (B, K) bool.

    Example:
        >>> places(torch.tensor([[True, False, True]]))
        [[0, 2]]
    """
    return [mask.nonzero()[:, 0].tolist() for mask in masks.cpu()]
