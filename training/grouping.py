"""Batches of similar pairs that are not false negatives of one another: the order of an epoch as a pure function.

GRIT-VLP's idea of a greedy walk, image to nearest text to nearest image, so that each batch is full of hard
negatives. Differs from it: the walk keeps the rules of `syncmask.negatives` against every row of the batch it is
filling, runs on plain similarities with visited rows at minus infinity (a softmax underflows and revisits rows), in
k-means parts instead of random ones, over all rows of all processes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from .batches import Seed, random_batches, separate_rows
from .partition import split_into_parts
from .processes import on_main, shared_out

# Words of a part that most texts share are multiplied as a dense matrix, the others as a sparse one: 3 times faster.
COMMON_WORDS = 256
# Rows whose features are copied at a time where all are looked at; rows of a part that are compared at a time.
CHUNK, FEW = 1024, 256


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
    together: bool = False,
) -> Grouping:
    """Order the rows of an epoch: those with features grouped, those never seen in random batches, all shuffled.

    With `share` below 1, a seeded part of the rows with features goes to random batches too, others each epoch: batches
    of neighbours alone never compare what lies far apart.

    The tail is drawn anew each epoch, from rows seen before as far as there are any, so no row is left out for
    ever. Where the rows never seen do not fill their last batch, seen rows are drawn to fill it.

    Args:
        image_feats: (rows, D) unit-length features of any float type, as in `FeatureBank`; never copied as a whole.
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
        together: see `walk_rows`.

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
    walked = walk_rows(
        image_feats,
        text_feats,
        item_ids,
        text_ids,
        text_rows,
        # In the features' own order, which is how they are read fastest.
        np.sort(similar),
        seed=(seed, epoch, 2),
        batch_size=batch_size,
        tau=tau,
        part_size=part_size,
        margin=margin,
        together=together,
    )
    order = np.concatenate([chance[shuffled], walked.order, tail])
    order, conflicts = finish_order(order, rows, item_ids, text_ids, batch_size, rng)
    return replace(walked, order=order, conflicts=conflicts)


def group_batches(
    image_feats: Tensor | np.ndarray,
    text_feats: Tensor | np.ndarray,
    item_ids: np.ndarray,
    text_ids: np.ndarray,
    text_rows: sparse.csr_matrix | None,
    *,
    rows: np.ndarray | None = None,
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
        image_feats: (corpus, D) unit-length, any float type; a file mapped into memory is read part by part.
        text_feats: (corpus, D).
        item_ids: (corpus,) integers.
        text_ids: (corpus,) integers, which index `text_rows`.
        text_rows: (texts, words) unit rows, their product = overlap; None leaves rule 2 out.
        rows: row numbers to order; None is all of the corpus.
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
    rows = np.arange(len(item_ids)) if rows is None else rows
    rng = np.random.default_rng(seed)
    used = len(rows) // batch_size * batch_size
    shuffled = rng.permutation(len(rows))
    active, tail = rows[np.sort(shuffled[:used])], rows[shuffled[used:]]
    walked = walk_rows(
        image_feats,
        text_feats,
        item_ids,
        text_ids,
        text_rows,
        active,
        seed=rng,
        batch_size=batch_size,
        tau=tau,
        part_size=part_size,
        margin=margin,
    )
    order = np.concatenate([walked.order, tail])
    order, conflicts = finish_order(order, rows, item_ids, text_ids, batch_size, rng)
    return replace(walked, order=order, conflicts=conflicts)


def walk_rows(
    image_feats: Tensor | np.ndarray,
    text_feats: Tensor | np.ndarray,
    item_ids: np.ndarray,
    text_ids: np.ndarray,
    text_rows: sparse.csr_matrix | None,
    rows: np.ndarray,
    *,
    seed: Seed | np.random.Generator,
    batch_size: int,
    tau: float | None,
    part_size: int,
    margin: float | None,
    together: bool = False,
) -> Grouping:
    """Cut rows into parts and walk through each; the batches come part by part, rule 1 not yet mended.

    Args:
        rows: row numbers, whole batches of them.
        together: whether all processes of the run call this at once, with the same arguments. The main one cuts, each
            walks through its share of the parts, and all get the whole order, the same for any number of processes.

    Returns:
        A Grouping; the others of `group_batches` are as there.
    """
    images, texts = check_features(image_feats, text_feats, len(item_ids))
    if (text_rows is None) != (tau is None):
        raise ValueError("text_rows and tau go together: give both, or neither to leave rule 2 out")
    memory = torch.empty(0)

    def cut() -> list[tuple[np.ndarray, int]]:
        rng = np.random.default_rng(seed)
        parts = split_into_parts(mean_direction(images, texts, rows), batch_size, part_size, rng)
        # The largest first: shares come out alike, and its memory is enough for all.
        parts.sort(key=len, reverse=True)
        return [(rows[part], int(rng.integers(len(part)))) for part in parts]

    def walk(part: tuple[np.ndarray, int]) -> Grouping:
        part, start = part
        directions = similarities(images[part].float(), texts[part].float(), memory)
        rule1 = same_item_or_text(item_ids[part], text_ids[part])
        rules = rule1 | too_alike(text_ids[part], text_rows, tau)
        rules |= not_semi_hard(directions, margin)
        walked = greedy_walk(directions, rule1, rules, batch_size, start)
        return replace(walked, order=part[walked.order])

    walks = shared_out(walk, on_main(cut)) if together else [walk(part) for part in cut()]
    order = np.concatenate([np.zeros(0, dtype=np.int64), *(walked.order for walked in walks)])
    return Grouping(order, sum(one.fallbacks for one in walks), sum(one.forced for one in walks), 0, len(rows))


def finish_order(
    order: np.ndarray,
    rows: np.ndarray,
    item_ids: np.ndarray,
    text_ids: np.ndarray,
    batch_size: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, int]:
    """Swap rows that break rule 1, shuffle the batches (the tail stays last), and check that no row is lost."""
    order, conflicts = separate_rows(order, item_ids, text_ids, batch_size, rng)
    used = len(order) // batch_size * batch_size
    batches = rng.permutation(order[:used].reshape(-1, batch_size))
    order = np.concatenate([batches.ravel(), order[used:]])
    if not np.array_equal(np.sort(order), np.sort(rows)):
        raise AssertionError(f"the order of {len(rows)} rows is not a permutation; this is a bug in grouping")
    return order, conflicts


def check_features(image_feats: Tensor | np.ndarray, text_feats: Tensor | np.ndarray, corpus: int):
    """Return both features as CPU tensors of shape (corpus, D), not copied; ValueError where they are not."""
    images, texts = (torch.as_tensor(feats).detach().cpu() for feats in (image_feats, text_feats))
    if images.shape != texts.shape or images.ndim != 2 or len(images) != corpus:
        raise ValueError(f"features {tuple(images.shape)} and {tuple(texts.shape)} must both be ({corpus}, D)")
    return images, texts


def mean_direction(images: Tensor, texts: Tensor, rows: np.ndarray) -> Tensor:
    """Unit-length mean of image and text feature of some rows, (rows, D) float16; ValueError unless finite."""
    points = torch.empty(len(rows), images.shape[1], dtype=torch.float16)
    for chunk, chosen in zip(points.split(CHUNK), torch.from_numpy(rows).split(CHUNK)):
        mean = images[chosen].float().add_(texts[chosen])
        # A sum is finite only if all are, and needs no mask in memory.
        if not torch.isfinite(mean.sum()):
            name = "text" if torch.isfinite(images[chosen].float().sum()) else "image"
            raise ValueError(f"{name} features hold NaN or infinity: training has diverged; lower learning_rate")
        chunk.copy_(mean.div_(mean.norm(dim=1, keepdim=True).clamp_min_(1e-12)))
    return points


def similarities(images: Tensor, texts: Tensor, memory: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Image i with text j, and text i with image j: the second is the first turned round, so that both are read by row.

    Args:
        images, texts: (M, D) float32.
        memory: float32, what the two are written to, of any size at first; used again by the next part, no larger
            one, since pages that are new to a process cost as much as the walk.

    Returns:
        Two (M, M) float32 in `memory`.
    """
    rows = len(images)
    by_image, by_text = memory.resize_(2, rows, rows)
    torch.mm(images, texts.T, out=by_image)
    # torch turns a matrix round in blocks, a little faster than NumPy does.
    by_text.copy_(by_image.T)
    return by_image.numpy(), by_text.numpy()


def same_item_or_text(item_ids: np.ndarray, text_ids: np.ndarray) -> np.ndarray:
    """Rule 1 for all pairs of rows, (M, M) bool; the diagonal is True."""
    # Ranks fit 32 bits, which compare faster than the ids' 64.
    items, texts = (np.unique(ids, return_inverse=True)[1].astype(np.int32) for ids in (item_ids, text_ids))
    same = items[:, None] == items
    same |= texts[:, None] == texts
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
    # Columns first, while there are few rows: ten times faster than both at once.
    return (overlap >= tau).take(inverse, axis=1).take(inverse, axis=0)


def not_semi_hard(directions: tuple[np.ndarray, np.ndarray], margin: float | None) -> np.ndarray | bool:
    """Rule 3 for all pairs of rows: as similar as the own pair less the margin, for any of the four anchors.

    forbidden[i, j] = max(s[i, j], s[j, i]) >= min(s[i, i], s[j, j]) - margin
    """
    if margin is None:
        return False
    by_image, by_text = directions
    least = by_image.diagonal() - np.float32(margin)
    close = np.empty(by_image.shape, dtype=bool)
    # A few rows at a time, so that what is between stays in the processor's cache.
    for start in range(0, len(close), FEW):
        rows = slice(start, start + FEW)
        nearer = np.maximum(by_image[rows], by_text[rows])
        np.greater_equal(nearer, np.minimum(least[rows, None], least), out=close[rows])
    return close


def greedy_walk(
    directions: tuple[np.ndarray, np.ndarray], rule1: np.ndarray, rules: np.ndarray, batch_size: int, start: int
) -> Grouping:
    """Walk from row to row: to the nearest text of this row's image, to the nearest image of that row's text, ...

    A row may be taken if it was not taken before and no row of the batch being filled forbids it. Where no row
    may, rule 1 alone is asked, then any row that is left is taken; both are counted.

    Args:
        directions: (M, M) float32, image i with text j; and its transpose.
        rule1: (M, M) bool, symmetric, its diagonal True: a row forbids itself.
        rules: (M, M) bool, symmetric, includes `rule1`.
        batch_size: rows of a batch.
        start: the first row.

    Returns:
        A Grouping of these M rows; the tail, if any, is where the walk ends.
    """
    rows = len(rules)
    # What a row forbids in its batch, and whether that is itself alone: by all rules, by rule 1, by none.
    alone = (rules.sum(axis=1, dtype=np.int32) == 1).tolist()
    levels = (rules, alone), (rule1, [False] * rows), (rule1, [True] * rows)
    # Minus infinity for rows that are gone; that may not be taken in this batch either.
    taken, blocked, scores = (np.zeros(rows, dtype=np.float32) for _ in range(3))
    order, fallbacks, forced = np.empty(rows, dtype=np.int64), 0, 0
    current, begun, relaxed = start, 0, 0
    for step in range(rows):
        if step % batch_size == 0:
            taken[order[begun:step]] = -np.inf
            blocked[:], begun, relaxed = taken, step, 0
        if step:
            nearness = directions[(step - 1) % 2][current]
            current = np.add(nearness, blocked, out=scores).argmax()
            # What a batch has no row left for, it has none for later either, so it stays relaxed until it is full.
            while scores[current] == -np.inf:
                blocked[:], relaxed = taken, relaxed + 1
                for row in order[begun:step]:
                    blocked[row if relaxed == 2 else rule1[row].nonzero()[0]] = -np.inf
                current = np.add(nearness, blocked, out=scores).argmax()
            fallbacks, forced = fallbacks + (relaxed == 1), forced + (relaxed == 2)
        order[step] = current
        forbids, itself = levels[relaxed]
        # By numbers: a choice by mask waits on a branch for each row, 3 times as long where a third is forbidden.
        blocked[current if itself[current] else forbids[current].nonzero()[0]] = -np.inf
    return Grouping(order, fallbacks, forced, 0, rows)
