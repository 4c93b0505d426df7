"""Where a run stands, and what its processes learn of a batch together."""

from dataclasses import dataclass


@dataclass
class Progress:
    """Where a run stands, the same on every process; saved in every checkpoint.

    Args:
        step: optimiser steps done. micro_step: batches done. epoch: the running one.
        best_step, best_value: the checkpoint with the highest validation figure, and that figure.
        substitutes: photos that could not be read when they were wanted, each replaced by another row.
    """

    step: int = 0
    micro_step: int = 0
    epoch: int = 0
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

    @classmethod
    def mean(cls, parts: list["Agreed"]) -> "Agreed":
        """Join what was learned of micro batches: losses as means, fallbacks summed."""
        losses = {name: sum(part.losses[name] for part in parts) / len(parts) for name in parts[0].losses}
        return cls(losses, all(part.finite for part in parts), sum(part.fallbacks for part in parts))
