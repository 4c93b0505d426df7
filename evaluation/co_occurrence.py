"""The pure half of the protocol `co-occurrence`: do masks hide what photo and text both hold?

Everything here takes plain arrays: scores and truth of words and patches, errors, row lists. What a model scores is
measured in `measure.py`; both meet in `co_occurrence_protocol.py`.

A row is a photo with its text. Per row the words' arrays have one entry a maskable word; lists of arrays, since texts
differ in length. What is found is a tally by metric, so that intervals and paired comparisons come from one place;
`with_intervals` makes metrics of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .metrics import Metric, Tally, auc_tally, average_precision, bootstrap_ratio, exact, precision_at_rate

WORD_RATE, PATCH_RATE = 0.3, 0.2
GAP_WORD_RATE, GAP_PATCH_RATE = 0.3, 0.4
COVERED = 0.3  # a patch counts as inside from this covered share on

Words = Sequence[np.ndarray]
Tallies = dict[str, Tally | Metric]  # by metric; a Metric where the number is known


def with_intervals(tallies: Tallies, seed: int = 0) -> dict[str, Metric]:
    """The metrics of tallies, each with its bootstrap interval over units."""
    return {
        name: bootstrap_ratio(*tally, seed=seed) if isinstance(tally, tuple) else tally
        for name, tally in tallies.items()
    }


def _mean_of(values: np.ndarray) -> Tally:
    """The tally of a mean over units (n,); NaN = a unit that tells nothing."""
    told = ~np.isnan(values)
    return np.where(told, values, 0), told.astype(np.float64)


# ----------------------------------------------------------------------------------------------------------- words


def blind_table(words: Sequence[Sequence[str]], visible: Sequence[Sequence[bool]]) -> dict[str, float]:
    """Share of train rows that hold a vocabulary word in which it is visible: what knowing the word alone tells.

    Example: `blind_table([["red"], ["red"]], [[True], [False]])` is `{"red": .5}`.
    """
    seen, shown = {}, {}
    for row_words, row_visible in zip(words, visible, strict=True):
        for word, is_visible in zip(row_words, row_visible, strict=True):
            seen[word] = seen.get(word, 0) + 1
            shown[word] = shown.get(word, 0) + bool(is_visible)
    return {word: shown[word] / count for word, count in seen.items()}


def blind_scores(table: Mapping[str, float], words: Sequence[str]) -> np.ndarray:
    """The table's scores (W,) of one row's words; a word it never saw takes the mean of all."""
    unseen = float(np.mean(list(table.values()))) if table else 0.0
    return np.array([table.get(word, unseen) for word in words], dtype=np.float64)


def word_tallies(scores: Mapping[str, Words], visible: Words, *, rate: float = WORD_RATE) -> Tallies:
    """AP and precision of the hard top `rate` of words against "visible in this view", by name of the score.

    Rows in which no word or every word is visible do not count: they tell no score from another. `random` (any order
    is as likely) and `oracle` (the truth itself) are added. `precision_gain` is the paired difference to `random`.

    Returns:
        `words/ap/NAME`, `words/precision/NAME`, `words/precision_gain/NAME`; units are rows.
    """
    telling = np.array([truth.any() and not truth.all() for truth in visible], dtype=bool)
    beside = {
        "random": [np.zeros(len(truth)) for truth in visible],
        "oracle": [truth.astype(float) for truth in visible],
    }
    random = _by_row(precision_at_rate, beside["random"], visible, telling, rate)
    tallies: Tallies = {}
    for name, by_row in {**scores, **beside}.items():
        precision = _by_row(precision_at_rate, by_row, visible, telling, rate)
        tallies[f"words/ap/{name}"] = _mean_of(_by_row(average_precision, by_row, visible, telling))
        tallies[f"words/precision/{name}"] = _mean_of(precision)
        if name != "random":
            tallies[f"words/precision_gain/{name}"] = _mean_of(precision - random)
    return tallies


def _by_row(measure: Callable, scores: Words, truth: Words, telling: np.ndarray, *more) -> np.ndarray:
    """A measure (rows,); NaN for rows that are not telling."""
    found = np.full(len(truth), np.nan)
    for row in np.flatnonzero(telling):
        found[row] = measure(scores[row], truth[row], *more)
    return found


def view_tallies(
    scores: Mapping[str, Words], visible: Words, words: Sequence[Sequence[str]], item_ids: np.ndarray
) -> Tallies:
    """Does a score see the view? itemAUC and viewAUC by name of the score; .5 = blind to the photo.

    itemAUC compares the same word of the same item over its views (units are items, in ascending order), viewAUC the
    same vocabulary word over all photos (units are words, in alphabetical order).

    Args:
        scores: by name, (W,) a row.
        visible: (W,) bool a row.
        words: lower-cased words a row, as long as its scores.
        item_ids: (rows,); the rows of an item have the same text.

    Returns:
        `words/item_auc/NAME` and `words/view_auc/NAME`, with `random`.
    """
    lengths = [len(truth) for truth in visible]
    shown = np.concatenate(visible)
    items = np.repeat(np.unique(item_ids, return_inverse=True)[1], lengths)
    place = np.concatenate([np.arange(length) for length in lengths])
    vocabulary = np.unique([word for row in words for word in row], return_inverse=True)[1]
    tallies: Tallies = {}
    for name, by_row in scores.items():
        values = np.concatenate(by_row)
        groups = items * (max(lengths) + 1) + place
        tallies[f"words/item_auc/{name}"] = auc_tally(values, shown, groups, items)
        tallies[f"words/view_auc/{name}"] = auc_tally(values, shown, vocabulary)
    for figure in ("item_auc", "view_auc"):
        tallies[f"words/{figure}/random"] = exact(0.5, 0)
    return tallies


# --------------------------------------------------------------------------------------------------------- patches


def covered_share(boxes: Sequence[Sequence[float]], grid: tuple[int, int], image_size: int) -> np.ndarray:
    """Share (h, w) of each patch that the union of boxes [x0, y0, x1, y1] (pixels) covers, counted in pixel centres.

    Example: `covered_share([[0, 0, 2, 4]], (1, 2), 4)` is `[[1, 0]]`.
    """
    centres = np.arange(image_size) + 0.5
    inside = np.zeros((image_size, image_size), dtype=bool)
    for x0, y0, x1, y1 in boxes:
        inside |= ((centres >= y0) & (centres < y1))[:, None] & ((centres >= x0) & (centres < x1))
    height, width = grid
    return inside.reshape(height, image_size // height, width, image_size // width).mean(axis=(1, 3))


def centre_scores(grid: tuple[int, int]) -> np.ndarray:
    """The centre prior (N,): the nearer a patch is to the middle of the photo, the higher."""
    y, x = (np.arange(count) - (count - 1) / 2 for count in grid)
    return -np.hypot(y[:, None] / grid[0], x / grid[1]).round(9).reshape(-1)


def patch_tallies(
    scores: Mapping[str, np.ndarray], inside: np.ndarray, grid: tuple[int, int], *, rate: float = PATCH_RATE
) -> Tallies:
    """Share of the hard top `rate` of patches that lie inside regions of words both mentioned and visible.

    Args:
        scores: by name, (rows, N).
        inside: (rows, N) bool; rows without any or with nothing but such patches do not count.
        grid: (h, w), h w = N.
        rate: share of the patches that is taken.

    Returns:
        `patches/precision/NAME` and `patches/precision_gain/NAME` (over random), with `random`, `centre` and `oracle`;
        units are rows.
    """
    telling = inside.any(axis=1) & ~inside.all(axis=1)
    beside = {
        "random": np.zeros(inside.shape),
        "centre": np.broadcast_to(centre_scores(grid), inside.shape),
        "oracle": inside.astype(float),
    }
    random = _by_row(precision_at_rate, beside["random"], inside, telling, rate)
    tallies: Tallies = {}
    for name, by_row in {**scores, **beside}.items():
        precision = _by_row(precision_at_rate, by_row, inside, telling, rate)
        tallies[f"patches/precision/{name}"] = _mean_of(precision)
        if name != "random":
            tallies[f"patches/precision_gain/{name}"] = _mean_of(precision - random)
    return tallies


def pointing_tallies(
    peaks: Mapping[str, Words], regions: Sequence[Sequence], grid: tuple[int, int], image_size: int
) -> Tallies:
    """Does a word's map point at what the word names, and not just at the garment? See `pointing_hits`.

    Args:
        peaks: by what looks ("attention", "alignment"), see `pointing_hits`, as for the others.

    Returns:
        `pointing/hit/NAME` with NAME `own_word`, `other_word` (the maps of the text's other words, judged against this
        word's region) and `random`; of other maps than attention's `KIND_own_word`, `KIND_other_word`; units are rows.
    """
    tallies: Tallies = {}
    for kind, by_row in peaks.items():
        prefix = "" if kind == "attention" else f"{kind}_"
        (own, other, random), counts = pointing_hits(by_row, regions, grid, image_size)
        tallies[f"pointing/hit/{prefix}own_word"] = own, counts
        tallies[f"pointing/hit/{prefix}other_word"] = other, counts
        tallies["pointing/hit/random"] = random, counts
    return tallies


def pointing_hits(
    peaks: Words, regions: Sequence[Sequence], grid: tuple[int, int], image_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hits of peaks in their words' regions, summed over the words of each row.

    Ours, beside the patch precision, which any eye for the garment satisfies. Only words whose region is under half of
    the photo, and whose text has another visible word with another region, count.

    Args:
        peaks: (W,) a row, the patch that each word's map peaks at.
        regions: [x0, y0, x1, y1] or [] a word, a row.
        grid: patches (h, w).
        image_size: pixels of the regions.

    Returns:
        (3, rows): hits of the word's own peak, of the text's other words' peaks (their mean), of a random patch;
        (rows,): how many words counted.
    """
    hits, counts = np.zeros((3, len(peaks))), np.zeros(len(peaks))
    for row, (peak, boxes) in enumerate(zip(peaks, regions, strict=True)):
        maps = {tuple(box): region_patches(box, grid, image_size) for box in boxes[: len(peak)] if len(box)}
        named = [(word, tuple(boxes[word])) for word in range(len(peak)) if len(boxes[word])]
        for word, box in named:
            others = [other for other, other_box in named if other_box != box]
            if not others or maps[box].mean() >= 0.5:
                continue
            hits[:, row] += maps[box][peak[word]], maps[box][peak[others]].mean(), maps[box].mean()
            counts[row] += 1
    return hits, counts


def region_patches(box: Sequence[float], grid: tuple[int, int], image_size: int) -> np.ndarray:
    """Patches (N,) bool of a region [x0, y0, x1, y1] (pixels); the most covered one at least, for small parts."""
    cover = covered_share([box], grid, image_size).reshape(-1)
    return (cover >= min(COVERED, cover.max())) & (cover > 0)


# -------------------------------------------------------------------------------------------------------- text gap


def truth_masks(
    visible: Words,
    regions: Sequence[Sequence[Sequence[float]]],
    grid: tuple[int, int],
    image_size: int,
    *,
    word_rate: float = GAP_WORD_RATE,
    patch_rate: float = GAP_PATCH_RATE,
    seed: int = 0,
) -> np.ndarray:
    """Fixed co-occurring patch masks (rows, N) bool: words that this view shows, then the patches where they are.

    Exactly round(patch_rate N) patches a row: the most covered by the chosen words' regions first, seeded noise among
    equals, so that what is left of the budget falls anywhere.
    """
    rng, patches = np.random.default_rng(seed), grid[0] * grid[1]
    budget = min(max(round(patch_rate * patches), 1), patches - 1)
    masks = np.zeros((len(visible), patches), dtype=bool)
    for row, (truth, boxes) in enumerate(zip(visible, regions, strict=True)):
        shown = rng.permutation(np.flatnonzero(truth))
        chosen = shown[: max(1, round(word_rate * len(truth)))]
        cover = covered_share([boxes[word] for word in chosen if len(boxes[word])], grid, image_size).reshape(-1)
        masks[row, np.argsort(-(cover + 1e-6 * rng.random(patches)))[:budget]] = True
    return masks


def text_gap(own_error: np.ndarray, other_error: np.ndarray) -> Tally:
    """Relative rise of the MIM error (rows,) when another item's text is given: mean(other) / mean(own) - 1."""
    return np.asarray(other_error) - np.asarray(own_error), np.asarray(own_error)


def derangement(item_ids: np.ndarray, seed: int) -> np.ndarray:
    """For each row a row (rows,) of another item, the next one in a seeded order of items: every item is used alike.

    Raises:
        ValueError: all rows are of one item.
    """
    items, firsts, inverse = np.unique(np.asarray(item_ids), return_index=True, return_inverse=True)
    if len(items) < 2:
        raise ValueError("all rows are of one item, so no row can be given another item's text; use more items")
    order = np.random.default_rng(seed).permutation(len(items))
    following = np.empty(len(items), dtype=np.int64)
    following[order] = np.roll(order, 1)
    return firsts[following[inverse]]
