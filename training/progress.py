"""Where a run stands, and what its processes learn of a batch together."""

import math
from dataclasses import dataclass

TERMS = ("itc", "itm", "mlm", "mim")
# One match to two negatives: a head that knows nothing but that has this entropy. ITM sits there for the first hundreds
# of steps; batches grouped by features of that time are noise.
ITM_CHANCE = math.log(3) - 2 / 3 * math.log(2)
ITM_LEARNED = ITM_CHANCE - 0.06
ITM_MEMORY = 0.98


@dataclass
class Progress:
    """Where a run stands, the same on every process; saved in every checkpoint.

    Args:
        step: optimiser steps done. micro_step: batches done. epoch: the running one.
        itm_average: running mean of the ITM loss, which decides when grouping starts.
        grouped: whether this epoch's batches are grouped.
        best_step, best_value: the checkpoint with the highest validation figure, and that figure.
        substitutes: photos that could not be read when they were wanted, each replaced by another row.
    """

    step: int = 0
    micro_step: int = 0
    epoch: int = 0
    itm_average: float = ITM_CHANCE
    grouped: bool = False
    best_step: int | None = None
    best_value: float | None = None
    substitutes: int = 0


@dataclass
class Agreed:
    """What all processes learn of a batch together.

    Args:
        losses: means over processes. finite: whether every process's losses are.
        fallbacks: negatives for which only rule 1 could be kept, summed.
    """

    losses: dict[str, float]
    finite: bool
    fallbacks: int
