"""The nearest of many vectors by an exact scan: bfloat16 for all of them, float32 for a short list. Pure tensors."""

from __future__ import annotations

import torch

# Scores at a time, 26 MB in bfloat16, in one buffer: fresh memory for them would cost a third of the product.
BLOCK_SCORES = 13_000_000
# Scores whose largest stands for them when the best are looked for (our choice: half the time of looking at all).
GROUP = 8
# By how much a number in bfloat16 (8 bits of precision) may differ from itself before rounding, at most.
HALF_UNIT = 2.0**-9
CHUNK = 65_536
# Rows of the longest short list; more only happens where thousands of rows are equal to three digits.
LONGEST = 16_384


class ExactScan:
    """Vectors in memory, found again by their dot product with queries.

    All rows are scored in `dtype`, the best of them again in float32. The short list of a query grows (to 16,384 rows)
    until rounding cannot have hidden a better row, so the result is that of a float32 scan. Rows are scored less their
    mean, which changes no order and makes scores small and their rounding fine: vectors of a trained model all point
    one way.

    Args:
        vectors: (N, P) float32.
        dtype: of the scan; None = bfloat16 where the processor multiplies it, else float32.

    Example:
        >>> scan = ExactScan(torch.eye(3))
        >>> scan.search(torch.tensor([[0.1, 0.9, 0.5]]), 2)[1].tolist()
        [[1, 2]]
    """

    def __init__(self, vectors: torch.Tensor, dtype: torch.dtype | None = None):
        self.vectors = vectors
        self.dtype = dtype or scan_dtype()
        self.scanned, self.error, self.energy = _centred(vectors, self.dtype)

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def nbytes(self) -> int:
        """Memory of the vectors in both forms."""
        both = (self.vectors, self.scanned)
        return sum(tensor.numel() * tensor.element_size() for tensor in both)

    def search(
        self, queries: torch.Tensor, k: int, allowed: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best rows of each query, best first.

        Args:
            queries: (Q, P) float32.
            k: rows a query; fewer come back where fewer are there.
            allowed: (N,) bool, rows that may be found; None = all.

        Returns:
            Dot products (Q, k') float32 and rows (Q, k') int64, k' = min(k, rows allowed).
        """
        found = len(self) if allowed is None else int(allowed.sum())
        k = min(k, found)
        if not k or not len(queries):
            return torch.empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.int64)
        step = min(len(queries), max(1, BLOCK_SCORES // len(self)))
        buffer = torch.empty(step, len(self), dtype=self.dtype)
        parts = [self._block(part, k, found, allowed, buffer[: len(part)]) for part in queries.split(step)]
        return torch.cat([scores for scores, _ in parts]), torch.cat([rows for _, rows in parts])

    def _block(self, queries: torch.Tensor, k: int, found: int, allowed: torch.Tensor | None, scores: torch.Tensor):
        torch.mm(queries.to(self.dtype), self.scanned.T, out=scores)
        if allowed is not None:
            scores.masked_fill_(~allowed, -torch.inf)
        length = min(2 * k + 12, found)
        best, rows, certain = self._rescored(queries, scores, k, length)
        while length < min(found, max(LONGEST, k)) and not certain.all():
            length = min(8 * length, found)
            for left in (~certain).nonzero().flatten().split(max(1, LONGEST // length)):
                best[left], rows[left], certain[left] = self._rescored(queries[left], scores[left], k, length)
        return best, rows

    def _rescored(self, queries: torch.Tensor, scores: torch.Tensor, k: int, length: int):
        """The best k of a short list: dot products, rows, and whether no row outside of it can belong to them (Q,)."""
        values, indices = largest(scores, length)
        candidates = indices.sort(dim=1).values  # gathered in the order they lie in memory
        exact = torch.bmm(self.vectors[candidates], queries[:, :, None]).squeeze(2)
        top = exact.topk(k, dim=1)
        rows = candidates.gather(1, top.indices)
        if self.dtype == torch.float32:
            return top.values, rows, torch.ones(len(queries), dtype=torch.bool)
        worst = scores.gather(1, rows).float().amin(dim=1)
        left_out = values[:, -1].float()
        rounding = (worst.abs() + left_out.abs()) * HALF_UNIT
        certain = left_out + rounding + self._slack(queries) < worst
        return top.values, rows, certain

    def _slack(self, queries: torch.Tensor) -> torch.Tensor:
        """By how much rounding of queries and rows may move two scores of a query (Q,) towards each other.

        Errors of the dimensions are independent, so a score's has the standard deviation below; six of them, twice.
        """
        lost = queries - queries.to(self.dtype).float()
        variance = queries.square() @ self.error + lost.square() @ self.energy
        return 2 * 6 * variance.sqrt()


def largest(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as `scores.topk(count, dim=1)` (Q, count), ties in any order, faster for few of many.

    The best `count` lie in the `count` groups with the largest best.
    """
    groups = scores.shape[1] // GROUP
    if 4 * count > groups:
        return tuple(scores.topk(count, dim=1))
    heads = scores[:, : groups * GROUP].view(-1, GROUP, groups).amax(dim=1).topk(count, dim=1).indices
    members = (heads[:, :, None] + groups * torch.arange(GROUP)).flatten(1)
    rest = torch.arange(groups * GROUP, scores.shape[1]).expand(len(scores), -1)
    members = torch.cat([members, rest], dim=1)
    top = scores.gather(1, members).topk(count, dim=1)
    return top.values, members.gather(1, top.indices)


def scan_dtype() -> torch.dtype:
    """bfloat16 where the CPU multiplies matrices of it, else float32: emulated, it would be slower, not faster."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")
    return torch.bfloat16 if any(getattr(torch.cpu, name, bool)() for name in checks) else torch.float32


def _centred(vectors: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vectors less their mean in `dtype`; the mean square by dimension (P,) of what rounding took, and of the rest."""
    scanned = torch.empty_like(vectors, dtype=dtype)
    error, energy = torch.zeros(2, vectors.shape[1])
    mean = vectors.mean(dim=0) if len(vectors) else error
    for part, target in zip(vectors.split(CHUNK), scanned.split(CHUNK)):
        part = part - mean
        target.copy_(part)
        error += (part - target.float()).square().sum(dim=0) / len(vectors)
        energy += part.square().sum(dim=0) / len(vectors)
    return scanned, error, energy
