"""How often batches and hard negatives hold false negatives: another item's text that is true of the photo. Pure.

The orders are the caller's (they come from the sampler, which evaluation does not know): the same final features
grouped at random, under rule 1 alone, under rules 1 and 2.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from scipy.sparse import csr_matrix

from syncmask.negatives import choose_negatives, forbidden_pairs

from .metrics import Metric, bootstrap_ratio, exact


def in_batches(order: np.ndarray, batch_size: int) -> np.ndarray:
    """Rows of the full batches (batches, B); a tail shorter than a batch is dropped, as in training."""
    order = np.asarray(order)
    whole = len(order) // batch_size
    if whole == 0:
        raise ValueError(f"an order of {len(order)} rows holds no batch of {batch_size}; give more rows")
    return order[: whole * batch_size].reshape(whole, batch_size)


def pair_rates(
    truth, orders: Mapping[str, np.ndarray], item_ids: np.ndarray, batch_size: int, *, seed: int = 0
) -> dict[str, Metric]:
    """Share of false negatives among a batch's pairs of different items, and of same-item pairs among all pairs.

    Args:
        truth: with `text_true_of_photo(photo_rows, text_rows) -> bool`, broadcasting, such as `GarmentTruth`.
        orders: rows in the order of training, by name; consecutive `batch_size` of them are a batch.
        item_ids: (rows,).
        batch_size: B.
        seed: of the bootstrap over batches.

    Returns:
        `false_negatives/pairs/NAME` and `false_negatives/same_item_pairs/NAME`; n counts batches.
    """
    metrics = {}
    for name, order in orders.items():
        wrong, other, same = [], [], []
        for rows in in_batches(order, batch_size):
            same_item = item_ids[rows, None] == item_ids[rows]
            wrong.append((truth.text_true_of_photo(rows[:, None], rows[None]) & ~same_item).sum())
            other.append((~same_item).sum())
            same.append(same_item.sum() - batch_size)
        pairs = len(same) * batch_size * (batch_size - 1)
        metrics[f"false_negatives/pairs/{name}"] = bootstrap_ratio(np.array(wrong), np.array(other), seed=seed)
        metrics[f"false_negatives/same_item_pairs/{name}"] = exact(sum(same) / pairs, len(same))
    return metrics


def itm_rates(
    truth,
    orders: Mapping[str, np.ndarray],
    item_ids: np.ndarray,
    text_ids: np.ndarray,
    image_feats: np.ndarray,
    text_feats: np.ndarray,
    batch_size: int,
    *,
    temperature: float,
    text_rows: csr_matrix | None = None,
    tau: float | None = None,
    guarded: tuple[str, ...] = ("rules_1_2",),
    seed: int = 0,
) -> dict[str, Metric]:
    """Share of false negatives among the hard negatives that ITM would draw in these batches.

    Args:
        truth: see `pair_rates`.
        orders: see `pair_rates`.
        item_ids: (rows,).
        text_ids: (rows,).
        image_feats: (rows, P) of the teacher, unit length.
        text_feats: (rows, P) of the teacher, unit length.
        batch_size: B.
        temperature: of the draw, the teacher's own.
        text_rows: (texts, words) of `processing.overlap`, by text id; needed for the guarded orders.
        tau: overlap from which rule 2 forbids a pair.
        guarded: names of the orders whose negatives obey rule 2 too; the others obey rule 1 alone.
        seed: of the draws and of the bootstrap over batches.

    Returns:
        `false_negatives/itm/NAME`; n counts batches.
    """
    metrics = {}
    for name, order in orders.items():
        generator = torch.Generator().manual_seed(seed)
        guard = text_rows if name in guarded else None
        wrong, drawn = [], []
        for rows in in_batches(order, batch_size):
            rules = _rules(rows, item_ids, text_ids, guard, tau)
            cosines = torch.from_numpy(image_feats[rows].astype(np.float32) @ text_feats[rows].astype(np.float32).T)
            true = truth.text_true_of_photo(rows[:, None], rows[None])
            # Photos draw texts, then texts draw photos.
            counts = [_draw(cosines, true, rules, temperature, generator)]
            counts.append(_draw(cosines.T.contiguous(), true.T, rules, temperature, generator))
            wrong.append(sum(count[0] for count in counts))
            drawn.append(sum(count[1] for count in counts))
        metrics[f"false_negatives/itm/{name}"] = bootstrap_ratio(np.array(wrong), np.array(drawn), seed=seed)
    return metrics


def _rules(rows, item_ids, text_ids, text_rows: csr_matrix | None, tau: float | None):
    overlap = None
    if text_rows is not None:
        mine = text_rows[text_ids[rows]]
        overlap = torch.from_numpy((mine @ mine.T).toarray())
    ids = (torch.from_numpy(np.asarray(values)[rows]) for values in (item_ids, text_ids))
    return forbidden_pairs(*ids, overlap, None if overlap is None else tau)


def _draw(similarity, true, rules, temperature: float, generator: torch.Generator) -> tuple[int, int]:
    """(false negatives, negatives) that the anchors of one batch draw."""
    noise = torch.rand(similarity.shape, generator=generator)
    index = choose_negatives(similarity, None, *rules, noise, temperature)[0].numpy()
    anchors = np.flatnonzero(index >= 0)
    return int(true[anchors, index[anchors]].sum()), len(anchors)
