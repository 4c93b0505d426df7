"""An epoch's batches: their order, and what is known of their quality."""

import numpy as np

from syncmask.evaluation.false_negatives import pair_rates
from syncmask.processing.garments import GarmentTruth
from syncmask.processing.tar_photos import shards_of

from .batches import batch_statistics, random_batches
from .blocks import block_order, cut_blocks
from .data import PairData
from .grouping import Grouping, plan_epoch
from .processes import on_main
from .sampler import FeatureBank


class EpochPlanner:
    """Plans each epoch's order from the features of the epochs before; all processes call it together.

    Every process holds the whole bank (features are gathered in training), so the parts of grouping are shared out;
    what is left is arithmetic on row numbers, which each does for itself.

    Args:
        data: the rows that are trained on. bank: their features.
        seed: the run's. batch_size: rows of a global batch.
        margin: rule 3 of grouping, None = off. share: of the batches that are grouped.
        buffer: rows of the blocks that batches are made inside (see `block_order`); None = the whole corpus.

    Raises:
        ValueError: a buffer that holds no batch.
    """

    def __init__(
        self,
        data: PairData,
        bank: FeatureBank,
        seed: int,
        batch_size: int,
        margin: float | None,
        share: float,
        buffer: int | None = None,
    ):
        if buffer is not None and buffer < batch_size:
            raise ValueError(
                f"a shuffle buffer of {buffer} rows holds no global batch of {batch_size}; wanted many batches, such "
                f"as {50 * batch_size} rows."
            )
        self.data, self.bank, self.seed = data, bank, seed
        self.batch_size, self.margin, self.share = batch_size, margin, share
        self.blocks = None if buffer is None else cut_blocks(len(data.rows), buffer, shards_of(data.rows))
        self.truth = GarmentTruth.from_dataset(data.rows) if "claimed" in data.rows.column_names else None

    def __call__(self, epoch: int, grouped: bool) -> tuple[np.ndarray, dict[str, float]]:
        """Return the order (rows,) and figures for the log."""
        figures: dict[str, float] = {"fallbacks": 0} if grouped else {}

        def order_rows(rows: np.ndarray | slice, seed: int) -> np.ndarray:
            items, texts = self.data.index.item_ids[rows], self.data.index.text_ids[rows]
            if not grouped:
                return random_batches(items, texts, seed=(seed, epoch), batch_size=self.batch_size)
            plan = self._grouped(rows, items, texts, seed, epoch)
            figures["fallbacks"] += plan.fallbacks
            return plan.order

        if self.blocks is None:
            order = order_rows(slice(None), self.seed)
        else:
            order = block_order(self.blocks, order_rows, seed=self.seed, epoch=epoch, batch_size=self.batch_size)
        return order, figures | on_main(lambda: self._quality(order))

    def _grouped(
        self, rows: np.ndarray | slice, items: np.ndarray, texts: np.ndarray, seed: int, epoch: int
    ) -> Grouping:
        return plan_epoch(
            self.bank.image_feats[rows],
            self.bank.text_feats[rows],
            self.bank.seen[rows],
            items,
            texts,
            self.data.texts,
            seed=seed,
            epoch=epoch,
            batch_size=self.batch_size,
            tau=self.data.tau,
            margin=self.margin,
            share=self.share,
            together=True,
        )

    def _quality(self, order: np.ndarray) -> dict[str, float]:
        """Count what batches should not hold; the rate of false negatives needs a corpus with ground truth."""
        items, texts = self.data.index.item_ids, self.data.index.text_ids
        figures = dict(batch_statistics(order, items, texts, self.batch_size))
        if self.truth is not None and len(order) >= self.batch_size:
            rates = pair_rates(self.truth, {"now": order}, items, self.batch_size, seed=self.seed)
            figures["false_negative_rate"] = rates["false_negatives/pairs/now"]["value"]
        return figures
