"""Which pairs of a batch may be negatives of one another, and the choice of the hard ones.

Several photos of one item share a text, and other items' texts are often true of a photo too. A negative must
be hard, but it must be a negative, so a pair of rows i, j is ruled out by

1. the same item or an equal text (the paper's aim),
2. texts that overlap by tau or more (our choice: word overlap finds false negatives better than similarity),
3. optionally, a similarity that is not below the positive's by a margin (the textbook "semi-hard").

Everything here is pure and has no gradient; `True` in a pair matrix means "forbidden".
"""

from __future__ import annotations

import torch
from torch import Tensor

from .masks import gumbel_noise


def forbidden_pairs(
    item_ids: Tensor, text_ids: Tensor, overlap: Tensor | None = None, tau: float | None = None
) -> tuple[Tensor, Tensor]:
    """Pairs of rows that must not be negatives of one another.

        rule1[i, j] = item_i == item_j or text_i == text_j
        all[i, j]   = rule1[i, j] or overlap[i, j] >= tau

    Args:
        item_ids: (B,) integers, equal for photos of one item.
        text_ids: (B,) integers, equal for equal texts.
        overlap: (B, B) text overlap from 0 to 1, symmetric; None leaves rule 2 out.
        tau: the overlap from which two texts may be true of one another's photos; needed with `overlap`.

    Returns:
        rule1 and all_rules, both (B, B) bool and symmetric; their diagonals are True.

    Raises:
        ValueError: where shapes differ or only one of `overlap` and `tau` is given.

    Example:
        >>> rule1, _ = forbidden_pairs(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 1]))
        >>> rule1.tolist()
        [[True, True, False], [True, True, False], [False, False, True]]
    """
    if item_ids.ndim != 1 or item_ids.shape != text_ids.shape:
        raise ValueError(f"item_ids {tuple(item_ids.shape)} and text_ids {tuple(text_ids.shape)} must both be (B,)")
    if (overlap is None) != (tau is None):
        raise ValueError("overlap and tau go together: give both, or neither to leave rule 2 out")
    rule1 = (item_ids[:, None] == item_ids) | (text_ids[:, None] == text_ids)
    if overlap is None:
        return rule1, rule1
    if overlap.shape != rule1.shape:
        raise ValueError(f"overlap is {tuple(overlap.shape)}, but {len(item_ids)} rows need {(*rule1.shape,)}")
    return rule1, rule1 | (overlap.to(rule1.device) >= tau)


@torch.no_grad()
def choose_negatives(
    similarity: Tensor,
    positives: Tensor | None,
    rule1: Tensor,
    all_rules: Tensor,
    noise: Tensor,
    temperature: float | Tensor,
    margin: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one hard negative for each anchor.

        j ~ softmax(similarity[i, :] / temperature), over the columns that the rules allow

    Give the teacher's image-to-text similarities for negative texts of images, and their transpose for
    negative images of texts. Where the rules leave an anchor nothing, it falls back to rule 1 alone.

    Args:
        similarity: (B, B) float32, rows = anchors, columns = candidates; plain cosines.
        positives: (B,) similarity of each anchor to its own pair; None = the diagonal. Read by `margin` only.
        rule1: (B, B) bool, what no fallback may choose.
        all_rules: (B, B) bool, what is forbidden at first; includes `rule1`.
        noise: (B, B) uniform in [0, 1), drawn by the caller's generator.
        temperature: above 0; small = the most similar, large = any.
        margin: rule 3, a candidate must satisfy similarity < positive - margin; None leaves it out.

    Returns:
        index (B,) int64, the chosen column or -1 where rule 1 forbids them all (one row, or all of one item);
        fell_back (B,) bool, True where only rule 1 could be kept.

    Raises:
        TypeError: where the similarities are not float32 (half precision makes them tie).

    Example:
        >>> rule1, rules = forbidden_pairs(torch.tensor([0, 1]), torch.tensor([0, 1]))
        >>> choose_negatives(torch.eye(2), None, rule1, rules, torch.rand(2, 2), 0.07)[0].tolist()
        [1, 0]
    """
    if similarity.dtype != torch.float32:
        raise TypeError(f"similarity is {similarity.dtype}; compute it in float32, half precision makes ties")
    forbidden = all_rules | rule1
    if margin is not None:
        positives = similarity.diagonal() if positives is None else positives
        forbidden = forbidden | (similarity >= positives[:, None] - margin)
    stuck = forbidden.all(dim=1)
    forbidden = torch.where(stuck[:, None], rule1, forbidden)
    keys = similarity / temperature + gumbel_noise(noise)
    index = keys.masked_fill(forbidden, -torch.inf).argmax(dim=1)
    impossible = rule1.all(dim=1)
    return index.masked_fill(impossible, -1), stuck & ~impossible
