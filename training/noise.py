"""The uniform noise of one step, drawn for the global batch by (seed, step) and sliced by process."""

from dataclasses import dataclass

import torch


@dataclass
class StepNoise:
    """Uniform numbers in [0, 1) for this process's B rows.

    Args:
        words: (B, 1 + L, 2), patches: (B, 1 + N, 2), for `masks.choose`.
        tokens: (B, L, 2), for `masks.corrupt`.
        negatives: (B, B, 2), for the photo and the text negatives.
        others: (B, B), which other items' photos evidence is measured against.
        offset: where the spans of evidence begin.
    """

    words: torch.Tensor
    patches: torch.Tensor
    tokens: torch.Tensor
    negatives: torch.Tensor
    others: torch.Tensor
    offset: int


def draw_noise(
    seed: int, step: int, rows: int, max_length: int, patches: int, rank: int = 0, processes: int = 1
) -> StepNoise:
    """Draw the noise of one micro-step, the same for a row on any number of processes.

    Widths are those of the longest text there can be, not of this batch's padding, for the same reason.

    Args:
        seed: the run's. step: counts micro-steps. rows: B of this process. max_length: L. patches: N.
        rank, processes: which slice of the global batch of processes * rows.
    """
    generator = generator_of(seed, step)
    total, own = rows * processes, slice(rank * rows, (rank + 1) * rows)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(total, *shape, generator=generator)[own]

    offset = int(torch.randint(0, 1 << 16, (1,), generator=generator))
    return StepNoise(
        words=draw(1 + max_length, 2),
        patches=draw(1 + patches, 2),
        tokens=draw(max_length, 2),
        negatives=draw(rows, 2),
        others=draw(rows),
        offset=offset,
    )


def draw_rows(seed: int, step: int, rows: int, *shape: int, rank: int = 0, processes: int = 1) -> torch.Tensor:
    """Draw (rows, *shape) uniform numbers for this process's rows, the same for a row on any number of processes."""
    noise = torch.rand(rows * processes, *shape, generator=generator_of(seed, step))
    return noise[rank * rows : (rank + 1) * rows]


def generator_of(seed: int, step: int) -> torch.Generator:
    """Return the generator of one micro-step of a run."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
