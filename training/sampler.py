"""Batches for the DataLoader that know their process and their place, and the features that grouping reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler


class FeatureBank:
    """The teacher's projected features of each row as it was last trained on.

    Attributes:
        image_feats: (rows, dim) float32.
        text_feats: (rows, dim) float32.
        seen: (rows,) bool, whether a row's features were ever set.

    Example:
        >>> bank = FeatureBank(3, 2)
        >>> bank.update(torch.tensor([1]), torch.ones(1, 2), torch.ones(1, 2))
        >>> bank.seen.tolist()
        [False, True, False]
    """

    def __init__(self, rows: int, dim: int):
        self.image_feats = torch.zeros(rows, dim)
        self.text_feats = torch.zeros(rows, dim)
        self.seen = torch.zeros(rows, dtype=torch.bool)

    def update(self, row_ids: Tensor, image_feats: Tensor, text_feats: Tensor) -> None:
        """Overwrite the features of some rows.

        Args:
            row_ids: (B,) integers, on any device.
            image_feats: (B, dim), any float type and device.
            text_feats: (B, dim).
        """
        row_ids = row_ids.detach().cpu()
        self.image_feats[row_ids] = image_feats.detach().float().cpu()
        self.text_feats[row_ids] = text_feats.detach().float().cpu()
        self.seen[row_ids] = True

    def state_tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds of the bank."""
        return {"image_feats": self.image_feats, "text_feats": self.text_feats, "seen": self.seen}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a checkpoint's tensors; ValueError where it was of another corpus or model."""
        for name, mine in self.state_tensors().items():
            if tensors[name].shape != mine.shape:
                raise ValueError(
                    f"the checkpoint's {name} is {tuple(tensors[name].shape)}, this run's {tuple(mine.shape)}: "
                    "resume with the corpus and the model that the run was started with"
                )
            mine.copy_(tensors[name])


class GroupedBatchSampler(Sampler[list[tuple[int, int]]]):
    """This process's slices of the global batches, as lists of (epoch, row).

    Each global batch is a stretch of the epoch's order and is cut into one contiguous slice a process, so that
    hard neighbours stay together. The tail that fills no global batch is dropped; where there are fewer rows than
    one batch, one smaller batch is made of them.

    The trainer calls `advance` after each batch it has used up. Iteration starts behind the batches used up, and
    workers that fetch ahead do not count, so a run that is resumed goes on with the very next batch.

    Example:
        >>> sampler = GroupedBatchSampler(5, 2)
        >>> sampler.set_order(0, np.array([4, 2, 0, 1, 3]))
        >>> list(sampler)
        [[(0, 4), (0, 2)], [(0, 0), (0, 1)]]
    """

    def __init__(self, rows: int, batch_size: int, *, rank: int = 0, world_size: int = 1):
        """Set up without an order; `set_order` gives it.

        Args:
            rows: rows of the train split.
            batch_size: rows of a GLOBAL batch, all processes together.
            rank: this process, from 0 on.
            world_size: number of processes.

        Raises:
            ValueError: where the batch cannot be cut evenly, or several processes would share too few rows.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, but must be from 0 to {world_size - 1} in {world_size} processes")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"a global batch of {batch_size} rows cannot be cut evenly for {world_size} processes")
        if rows < 1 or (rows < batch_size and world_size > 1):
            raise ValueError(
                f"{rows} rows do not fill one global batch of {batch_size} for {world_size} processes: "
                "lower per_device_batch_size, use fewer processes or more data"
            )
        self.rows, self.batch_size, self.rank, self.world_size = rows, batch_size, rank, world_size
        self.epoch, self.consumed = 0, 0
        self.order = np.zeros(0, dtype=np.int64)

    @property
    def batches(self) -> int:
        """Global batches of a whole epoch."""
        return max(1, self.rows // self.batch_size)

    def __len__(self) -> int:
        """Batches that are left of the current order."""
        return self.batches - self.consumed if len(self.order) else 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        slice_size = self.batch_size // self.world_size
        order, epoch = self.order, self.epoch
        for batch in range(self.consumed, self.batches if len(order) else 0):
            start = batch * self.batch_size + self.rank * slice_size
            yield [(epoch, row) for row in order[start : start + slice_size].tolist()]

    def set_order(self, epoch: int, order: np.ndarray) -> None:
        """Begin an epoch with this order, a permutation of the rows; ValueError where it is none."""
        order = np.asarray(order, dtype=np.int64)
        if not np.array_equal(np.sort(order), np.arange(self.rows)):
            raise ValueError(f"the order of epoch {epoch} ({len(order)} entries) is no permutation of {self.rows} rows")
        self.epoch, self.order, self.consumed = epoch, order, 0

    def advance(self) -> None:
        """Count one batch as used up; call it once a batch on every process."""
        if not len(self):
            raise RuntimeError(f"epoch {self.epoch} has no batch left to advance over; call set_order first")
        self.consumed += 1

    def global_batch(self) -> list[int]:
        """Return the rows of the whole global batch that comes next, for the log."""
        start = self.consumed * self.batch_size
        return self.order[start : start + self.batch_size].tolist()

    def state_dict(self) -> dict[str, int]:
        """Return the position as plain numbers; the order itself is in `state_tensors`."""
        names = ("epoch", "consumed", "rows", "batch_size")
        return {name: getattr(self, name) for name in names}

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the order as a tensor, (rows,) int64, or empty before the first `set_order`."""
        return {"order": torch.from_numpy(self.order.copy())}

    def load_state_dict(self, state: Mapping[str, int], tensors: Mapping[str, Tensor]) -> None:
        """Go on where a checkpoint's sampler was; the number of processes may differ, the global batch may not.

        Raises:
            ValueError: where rows or the global batch size differ from the checkpoint's.
        """
        for name in ("rows", "batch_size"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the checkpoint's {name} is {state[name]}, this run's {getattr(self, name)}: resume with the "
                    "same corpus and the same global batch (per_device_batch_size x processes, and with "
                    "full_contrast x gradient_accumulation_steps)"
                )
        if len(tensors["order"]):
            self.set_order(state["epoch"], tensors["order"].numpy())
        self.epoch, self.consumed = state["epoch"], state["consumed"]
