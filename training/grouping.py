"""Batches of similar pairs that are not false negatives of one another: the order of an epoch as a pure function.

GRIT-VLP's idea of a greedy walk, image to nearest text to nearest image, so that each batch is full of hard
negatives. Differs from it: the walk keeps the rules of `syncmask.negatives` against every row of the batch it is
filling, runs on plain similarities with visited rows at minus infinity (a softmax underflows and revisits rows), in
k-means parts instead of random ones, over all rows of all processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from .batches import Seed, random_batches, separate_rows
from .partition import split_into_parts

# Words of a part that most texts share are multiplied as a dense matrix, the others as a sparse one: 3 times faster.
COMMON_WORDS = 256


@dataclass(frozen=True)
class Grouping:
    """The order of an epoch, and how often its rules could not be kept.

    Attributes:
        order: (rows,) int64, a permutation; batch after batch, the tail that fills no batch last.
        fallbacks: rows placed where only rule 1 could be kept.
        forced: rows for which the walk could not keep rule 1 either; most are swapped away afterwards.
        conflicts: rows that share an item or a text with an earlier row of their batch in the end.
        grouped: rows in grouped batches; the others are in random ones or in the tail.
    """

    order: np.ndarray
    fallbacks: int = 0
    forced: int = 0
    conflicts: int = 0
    grouped: int = 0


def plan_epoch(
    image_feats: Tensor | np.ndarray,
    text_feats: Tensor | np.ndarray,
    seen: Tensor | np.ndarray,
    item_ids: np.ndarray,
    text_ids: np.ndarray,
    text_rows: sparse.csr_matrix | None,
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    tau: float | None,
    part_size: int = 2000,
    margin: float | None = None,
    share: float = 1.0,
) -> Grouping:
    """Order the rows of an epoch: those with features grouped, those never seen in random batches, all shuffled.

    With `share` below 1, a seeded part of the rows with features goes to random batches too, others each epoch: batches
    of neighbours alone never compare what lies far apart.

    The tail is drawn anew each epoch, from rows seen before as far as there are any, so no row is left out for
    ever. Where the rows never seen do not fill their last batch, seen rows are drawn to fill it.

    Args:
        image_feats: (rows, D) unit-length features, as in `FeatureBank`.
        text_feats: (rows, D).
        seen: (rows,) bool, whether a row's features are set.
        item_ids: (rows,) integers.
        text_ids: (rows,) integers, which index `text_rows`.
        text_rows: (texts, words) unit rows, their product = overlap; None leaves rule 2 out.
        seed: of the run.
        epoch: the epoch that the order is for.
        batch_size: rows of a global batch.
        tau: text overlap that is forbidden.
        part_size: rows of a part of the walk.
        margin: rule 3, off by default.
        share: of the rows, at most, in grouped batches.

    Returns:
        A Grouping; the same for any number of processes.
    """
    rng = np.random.default_rng((seed, epoch, 0))
    seen, item_ids, text_ids = np.asarray(seen, dtype=bool), np.asarray(item_ids), np.asarray(text_ids)
    # Rows never seen first, the others in random order: cut off from the end, the tail is of seen rows.
    rows = np.lexsort((rng.random(len(seen)), seen))
    used = len(rows) // batch_size * batch_size
    ungrouped = max(int((~seen).sum()), round((1 - share) * used))
    at_random = min(used, -(-ungrouped // batch_size) * batch_size)
    chance, similar, tail = np.split(rows, [at_random, used])
    shuffled = random_batches(item_ids[chance], text_ids[chance], seed=(seed, epoch, 1), batch_size=batch_size)
    grouping = group_batches(
        image_feats[similar],
        text_feats[similar],
        item_ids[similar],
        text_ids[similar],
        text_rows,
        seed=(seed, epoch, 2),
        batch_size=batch_size,
        tau=tau,
        part_size=part_size,
        margin=margin,
    )
    order = np.concatenate([chance[shuffled], similar[grouping.order], tail])
    order, conflicts = finish_order(order, item_ids, text_ids, batch_size, rng)
    return Grouping(order, grouping.fallbacks, grouping.forced, conflicts, len(similar))


def group_batches(
    image_feats: Tensor | np.ndarray,
    text_feats: Tensor | np.ndarray,
    item_ids: np.ndarray,
    text_ids: np.ndarray,
    text_rows: sparse.csr_matrix | None,
    *,
    seed: Seed,
    batch_size: int,
    tau: float | None,
    part_size: int = 2000,
    margin: float | None = None,
) -> Grouping:
    """Order rows so that batches hold similar pairs, and no two rows that the rules forbid.

    k-means parts of the mean of image and text feature; in each the greedy walk; what a batch could not keep of
    rule 1 is swapped with another batch; the batches are shuffled. The tail is drawn at random.

    Args:
        image_feats: (rows, D) unit-length float32.
        text_feats: (rows, D).
        item_ids: (rows,) integers.
        text_ids: (rows,) integers, which index `text_rows`.
        text_rows: (texts, words) unit rows, their product = overlap; None leaves rule 2 out.
        seed: an integer or several.
        batch_size: rows of a global batch, all processes together.
        tau: overlap from which two rows are kept apart; needed with `text_rows`.
        part_size: rows of a part, about; memory and time grow with its square.
        margin: rule 3: two rows are kept apart unless image and text of each are less similar to the other's than
            to their own by this much. None leaves it out.

    Returns:
        A Grouping; its order is a permutation of the rows.

    Raises:
        ValueError: where features are not finite, or shapes or `tau` do not fit.

    Example:
        >>> group_batches(torch.eye(4), torch.eye(4), np.arange(4), np.arange(4), None,
        ...               seed=0, batch_size=2, tau=None).order.shape
        (4,)
    """
    item_ids, text_ids = np.asarray(item_ids), np.asarray(text_ids)
    images, texts = check_features(image_feats, text_feats, len(item_ids))
    if (text_rows is None) != (tau is None):
        raise ValueError("text_rows and tau go together: give both, or neither to leave rule 2 out")
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(images))
    used = len(rows) // batch_size * batch_size
    active, tail = np.sort(rows[:used]), rows[used:]
    points = mean_direction(images, texts, torch.from_numpy(active))
    order, fallbacks, forced = [], 0, 0
    for part in split_into_parts(points, batch_size, part_size, rng):
        part = active[part]
        similarity = (images[part] @ texts[part].T).numpy()
        rule1 = same_item_or_text(item_ids[part], text_ids[part])
        rules = rule1 | too_alike(text_ids[part], text_rows, tau) | not_semi_hard(similarity, margin)
        walk = greedy_walk(similarity, rule1, rules, batch_size, int(rng.integers(len(part))))
        order.append(part[walk.order])
        fallbacks, forced = fallbacks + walk.fallbacks, forced + walk.forced
    order, conflicts = finish_order(np.concatenate([*order, tail]), item_ids, text_ids, batch_size, rng)
    return Grouping(order, fallbacks, forced, conflicts, used)


def finish_order(
    order: np.ndarray, item_ids: np.ndarray, text_ids: np.ndarray, batch_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """Swap rows that break rule 1, shuffle the batches (the tail stays last), and check that no row is lost."""
    order, conflicts = separate_rows(order, item_ids, text_ids, batch_size, rng)
    used = len(order) // batch_size * batch_size
    batches = rng.permutation(order[:used].reshape(-1, batch_size))
    order = np.concatenate([batches.ravel(), order[used:]])
    if not np.array_equal(np.sort(order), np.arange(len(item_ids))):
        raise AssertionError(f"the order of {len(item_ids)} rows is not a permutation; this is a bug in grouping")
    return order, conflicts


def check_features(image_feats: Tensor | np.ndarray, text_feats: Tensor | np.ndarray, rows: int):
    """Return both features as float32 CPU tensors of shape (rows, D); ValueError where they are not."""
    images, texts = (torch.as_tensor(feats).detach().cpu().float() for feats in (image_feats, text_feats))
    if images.shape != texts.shape or images.ndim != 2 or len(images) != rows:
        raise ValueError(f"features {tuple(images.shape)} and {tuple(texts.shape)} must both be ({rows}, D)")
    for name, feats in (("image", images), ("text", texts)):
        # A sum is finite only if all are, and needs no mask in memory.
        if not torch.isfinite(feats.sum()):
            raise ValueError(f"{name} features hold NaN or infinity: training has diverged; lower learning_rate")
    return images, texts


def mean_direction(images: Tensor, texts: Tensor, rows: Tensor) -> Tensor:
    """Unit-length mean of image and text feature of some rows, (rows, D), with one copy in memory."""
    points = images[rows].add_(texts[rows])
    return points.div_(points.norm(dim=1, keepdim=True).clamp_min_(1e-12))


def same_item_or_text(item_ids: np.ndarray, text_ids: np.ndarray) -> np.ndarray:
    """Rule 1 for all pairs of rows, (M, M) bool; the diagonal is True."""
    same = item_ids[:, None] == item_ids
    same |= text_ids[:, None] == text_ids
    return same


def too_alike(text_ids: np.ndarray, text_rows: sparse.csr_matrix | None, tau: float | None) -> np.ndarray | bool:
    """Rule 2 for all pairs of rows: texts whose overlap is tau or more, (M, M) bool.

    Computed over distinct texts. Words that only one of them holds are left out, since they add to no pair.
    """
    if text_rows is None:
        return False
    distinct, inverse = np.unique(text_ids, return_inverse=True)
    columns = text_rows[distinct].astype(np.float32).tocsc()
    spread = np.diff(columns.indptr)
    common_first = np.argsort(-spread, kind="stable")
    dense = torch.from_numpy(columns[:, common_first[:COMMON_WORDS]].toarray())
    overlap = (dense @ dense.T).numpy()
    rare = common_first[COMMON_WORDS:]
    rest = columns[:, rare[spread[rare] > 1]].tocsr()
    products = (rest @ rest.T).tocoo()
    overlap[products.row, products.col] += products.data
    return (overlap >= tau)[inverse[:, None], inverse]


def not_semi_hard(similarity: np.ndarray, margin: float | None) -> np.ndarray | bool:
    """Rule 3 for all pairs of rows: as similar as the own pair less the margin, for any of the four anchors.

    forbidden[i, j] = s[i, j] >= min(s[i, i], s[j, j]) - margin, or the same of s[j, i]
    """
    if margin is None:
        return False
    own = similarity.diagonal()
    close = similarity >= np.minimum(own[:, None], own) - margin
    return close | close.T


def greedy_walk(similarity: np.ndarray, rule1: np.ndarray, rules: np.ndarray, batch_size: int, start: int) -> Grouping:
    """Walk from row to row: to the nearest text of this row's image, to the nearest image of that row's text, ...

    A row may be taken if it was not taken before and no row of the batch being filled forbids it. Where no row
    may, rule 1 alone is asked, then any row that is left is taken; both are counted.

    Args:
        similarity: (M, M) float32, image i with text j.
        rule1: (M, M) bool, symmetric.
        rules: (M, M) bool, symmetric, includes `rule1`.
        batch_size: rows of a batch.
        start: the first row.

    Returns:
        A Grouping of these M rows; the tail, if any, is where the walk ends.
    """
    rows = len(similarity)
    directions = similarity, np.ascontiguousarray(similarity.T)
    taken, blocked, scores = (np.zeros(rows, dtype=np.float32) for _ in range(3))
    order, fallbacks, forced = np.empty(rows, dtype=np.int64), 0, 0
    current = start
    for step in range(rows):
        if step % batch_size == 0:
            blocked[:] = taken
        if step:
            np.add(directions[(step - 1) % 2][current], blocked, out=scores)
            best = int(scores.argmax())
            if scores[best] == -np.inf:
                batch = order[step - step % batch_size : step]
                best, kept = next_best(directions[(step - 1) % 2][current], taken, rule1[batch])
                fallbacks, forced = fallbacks + kept, forced + (not kept)
            current = best
        order[step] = current
        taken[current] = blocked[current] = -np.inf
        np.copyto(blocked, -np.inf, where=rules[current])
    return Grouping(order, fallbacks, forced, 0, rows)


def next_best(similarity: np.ndarray, taken: np.ndarray, rule1: np.ndarray) -> tuple[int, bool]:
    """Choose the most similar row left under rule 1, or of all that are left.

    Args:
        similarity: (M,) to the current row.
        taken: (M,) minus infinity where a row is gone, else 0.
        rule1: (members of the batch, M) bool.

    Returns:
        The row, and whether rule 1 could be kept.
    """
    scores = similarity + taken
    allowed = np.where(rule1.any(axis=0), -np.inf, scores)
    best = int(allowed.argmax())
    return (best, True) if allowed[best] > -np.inf else (int(scores.argmax()), False)
