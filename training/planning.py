"""An epoch's batches: their order, and what is known of their quality."""

import numpy as np

from syncmask.evaluation.false_negatives import pair_rates
from syncmask.processing.garments import GarmentTruth

from .batches import batch_statistics, random_batches
from .build import TrainData
from .grouping import plan_epoch
from .sampler import FeatureBank


class EpochPlanner:
    """Plans each epoch's order from the features of the epochs before, the same on every process.

    Every process holds the whole bank (features are gathered in training), so each computes the same order.

    Args:
        data: the rows that are trained on. bank: their features.
        seed: the run's. batch_size: rows of a global batch.
        margin: rule 3 of grouping, None = off. share: of the batches that are grouped.
    """

    def __init__(
        self, data: TrainData, bank: FeatureBank, seed: int, batch_size: int, margin: float | None, share: float
    ):
        self.data, self.bank, self.seed = data, bank, seed
        self.batch_size, self.margin, self.share = batch_size, margin, share
        self.truth = GarmentTruth.from_dataset(data.rows) if "claimed" in data.rows.column_names else None

    def __call__(self, epoch: int, grouped: bool) -> tuple[np.ndarray, dict[str, float]]:
        """Return the order (rows,) and figures for the log."""
        items, texts = self.data.index.item_ids, self.data.index.text_ids
        figures = {}
        if grouped:
            plan = plan_epoch(
                self.bank.image_feats,
                self.bank.text_feats,
                self.bank.seen,
                items,
                texts,
                self.data.texts,
                seed=self.seed,
                epoch=epoch,
                batch_size=self.batch_size,
                tau=self.data.tau,
                margin=self.margin,
                share=self.share,
            )
            order, figures["fallbacks"] = plan.order, plan.fallbacks
        else:
            order = random_batches(items, texts, seed=(self.seed, epoch), batch_size=self.batch_size)
        return order, figures | self._quality(order)

    def _quality(self, order: np.ndarray) -> dict[str, float]:
        """Count what batches should not hold; the rate of false negatives needs a corpus with ground truth."""
        items, texts = self.data.index.item_ids, self.data.index.text_ids
        figures = dict(batch_statistics(order, items, texts, self.batch_size))
        if self.truth is not None and len(order) >= self.batch_size:
            rates = pair_rates(self.truth, {"now": order}, items, self.batch_size, seed=self.seed)
            figures["false_negative_rate"] = rates["false_negatives/pairs/now"]["value"]
        return figures
