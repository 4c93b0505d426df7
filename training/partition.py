"""Rows cut into parts of similar rows, each a whole number of batches: the first step of grouping."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Rows that the centres are learned from, for each centre; more changes the parts little and costs time.
SAMPLE_PER_CENTRE = 256
ITERATIONS = 8
# Where one cluster takes more than this share, points are (almost) equal: rows are cut into pieces as they stand.
INSEPARABLE = 0.9
# Above so many clusters, as many as their root are made first and each is cut up in turn: else time grows with the
# square of the rows. 512,000 rows in parts of 2,000.
MOST_CLUSTERS = 256


def split_into_parts(points: Tensor, batch_size: int, part_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Cut rows into k-means parts of about `part_size` rows, each a multiple of the batch size.

    The rows of a cluster that lie farthest from its centre and fill no batch are pooled, and the pool is cut up in
    the same way until all of it is in parts.

    Args:
        points: (rows, D) of any float type; rows a multiple of `batch_size`.
        batch_size: rows of a global batch.
        part_size: rows wanted in a part; parts have at most 1.5 times as many, or 3 batches where that is more.
        rng: draws the first centres.

    Returns:
        Index arrays, together a permutation of the rows.

    Raises:
        ValueError: where the rows are no multiple of the batch size.
    """
    if len(points) % batch_size:
        raise ValueError(f"{len(points)} rows are no multiple of the batch size {batch_size}; set the tail aside")
    # With two batches a part, at least one cluster fills a batch, so the pool shrinks each time.
    target, parts, pool = max(part_size, 2 * batch_size), [], np.arange(len(points))
    while len(pool):
        surplus = []
        for cluster, affinity in small_clusters(points, pool, target, rng):
            keep = len(cluster) // batch_size * batch_size
            nearest_first = cluster[np.argsort(-affinity, kind="stable")]
            parts.append(np.sort(nearest_first[:keep]))
            surplus.append(nearest_first[keep:])
        pool = np.concatenate(surplus)
    return [part for part in parts if len(part)]


def small_clusters(
    points: Tensor, rows: np.ndarray, target: int, rng: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cluster rows into pieces of at most 1.5 `target`, clustering again what comes out larger.

    Returns:
        Pairs of row indices and each row's affinity to its cluster's centre (larger = nearer).
    """
    pending, done = [(rows, np.zeros(len(rows), dtype=np.float32))], []
    while pending:
        rows, affinity = pending.pop()
        wanted = round(len(rows) / target)
        if wanted <= 1:
            done.append((rows, affinity))
            continue
        chosen = points if len(rows) == len(points) else points[torch.from_numpy(rows)]
        wanted = wanted if wanted <= MOST_CLUSTERS else round(wanted**0.5)
        labels, affinity = kmeans(chosen, wanted, rng)
        by_label, sizes = np.argsort(labels, kind="stable"), np.bincount(labels)
        if sizes.max() > INSEPARABLE * len(rows):
            sizes = np.full(wanted, len(rows) // wanted)
        for piece in np.split(by_label, np.cumsum(sizes)[: len(sizes) - 1]):
            pending.append((rows[piece], affinity[piece]))
    return done


def kmeans(points: Tensor, clusters: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's k-means, its centres learned from a sample of the rows.

    Returns:
        labels (rows,) int64 and affinity (rows,) float32 = x.c - |c|^2 / 2, which is largest for the nearest centre.
    """
    size = min(len(points), SAMPLE_PER_CENTRE * clusters)
    sample = points[torch.from_numpy(rng.choice(len(points), size, replace=False))].float()
    centres = sample[:clusters].clone()
    for _ in range(ITERATIONS):
        labels, _ = nearest_centres(sample, centres)
        sums = torch.zeros_like(centres).index_add_(0, labels, sample)
        counts = torch.bincount(labels, minlength=clusters)[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
    labels, affinity = nearest_centres(points, centres)
    return labels.numpy(), affinity.numpy()


def nearest_centres(points: Tensor, centres: Tensor, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Return each row's nearest centre and its affinity to it, a chunk of rows at a time."""
    half_norms = centres.square().sum(1) / 2
    found = [torch.addmm(-half_norms, rows.float(), centres.T).max(dim=1) for rows in points.split(chunk)]
    return torch.cat([best.indices for best in found]), torch.cat([best.values for best in found])
