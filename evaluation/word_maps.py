"""Where single words look in unseen photos, and, where regions are known, whether they look at what they name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import torch
from PIL import Image, ImageDraw

from syncmask.processing.corpus import CorpusIndex
from syncmask.processing.processing_syncmask import split_words

from . import fragments
from .co_occurrence import region_patches
from .embedding import batches, photos
from .figures import beside, enlarge, framed, over
from .heat import heat_photo
from .measure import relative_attention, score_pairs
from .parts import Part
from .result import Result, percent
from .typeset import GREEN, ORANGE, PAPER, font, paragraph

TITLE = "Where words look"
ITEMS, WORDS, SIZE = 5, 4, 220
LONG = 3  # letters of a word that may be shown where no truth says which ones name a part


@dataclass(frozen=True)
class WordMap:
    """One word's map.

    Attributes:
        word: as written.
        heat: (h, w), at least 0.
        box: [x0, y0, x1, y1] of what the word names, as shares of the photo's sides; None where that is not known.
        hit: whether the hottest patch is in it; None where that is not known.
    """

    word: str
    heat: np.ndarray
    box: Sequence[float] | None = None
    hit: bool | None = None


@dataclass(frozen=True)
class LookedAt:
    """A photo with its text and the maps of some of its words."""

    photo: Image.Image
    text: str
    maps: Sequence[WordMap]


@torch.no_grad()
def look(model, processor, dataset, rows: Sequence[int], *, layer: int | None = None, seed: int = 0) -> list[LookedAt]:
    """The maps of a few words each of some photos.

    A map is the word's cross-attention against the mean of its text's words, as in `measure.word_peaks`: what all words
    look at says nothing of one. With known regions, words are a seeded sample of those that the photo shows in a part
    of their own; else those with the sharpest attention.

    Args:
        model: with a fusion encoder, in eval mode.
        processor: its `SyncMaskProcessor`.
        dataset: rows of a corpus; its column `regions`, if any, tells where things are.
        rows: which.
        layer: fusion layer that is read; `config.mask_layer` when None.
        seed: of the sample.
    """
    rows = np.asarray(rows)
    batch = next(batches(processor, dataset, rows, len(rows), model.device))
    item_ids = CorpusIndex.from_dataset(dataset).item_ids[rows]
    pairs = score_pairs(model, batch, item_ids, ["attention"], layer=layer, seed=seed)
    maps, grid = relative_attention(pairs.looks["attention"], pairs.valid).cpu().numpy(), model.syncmask.grid
    shown = dataset.select(rows.tolist())
    regions = shown["regions"] if "regions" in dataset.column_names else [None] * len(rows)
    found, rng = [], np.random.default_rng(seed)
    for place, (photo, text, boxes) in enumerate(zip(photos(shown, np.arange(len(rows))), shown["text"], regions)):
        words = [text[start:end] for start, end in split_words(text)][: int(pairs.valid[place].sum())]
        sharpness = pairs.scores["attention"][place, : len(words)].cpu().numpy()
        places = sharp_words(words, sharpness) if boxes is None else named_words(words, boxes, grid, photo.size[0], rng)
        chosen = [
            _map(words[word], maps[place, word], grid, None if boxes is None else boxes[word], photo.size[0])
            for word in places
        ]
        if chosen:
            found.append(LookedAt(photo, text, chosen))
    return found


def sharp_words(words: Sequence[str], scores: np.ndarray, count: int = WORDS) -> list[int]:
    """Places of the words with the highest scores, each word once, short ones left out, in the order of the text."""
    first = {word.lower(): place for place, word in reversed(list(enumerate(words))) if len(word) >= LONG}
    return sorted(sorted(first.values(), key=lambda place: -scores[place])[:count])


def named_words(
    words: Sequence[str], boxes: Sequence[Sequence[float]], grid: tuple[int, int], size: int, rng: np.random.Generator
) -> list[int]:
    """Places of words that name a part under half of the photo, each part once: the words that `pointing` counts."""
    parts = {}
    for place, box in enumerate(boxes[: len(words)]):
        if len(box) and region_patches(box, grid, size).mean() < 0.5:
            parts.setdefault(tuple(box), []).append(place)
    if len({tuple(box) for box in boxes if len(box)}) < 2:
        return []
    chosen = [int(rng.choice(places)) for places in parts.values()]
    return sorted(rng.permutation(chosen)[:WORDS].tolist())


def _map(word: str, values: np.ndarray, grid: tuple[int, int], box: Sequence[float] | None, size: int) -> WordMap:
    if box is None:
        return WordMap(word, values.reshape(grid))
    return WordMap(
        word,
        values.reshape(grid),
        [edge / size for edge in box],
        bool(region_patches(box, grid, size)[values.argmax()]),
    )


# --------------------------------------------------------------------------------------------------------- the part


def map_picture(photo: Image.Image, one: WordMap, size: int) -> Image.Image:
    """The heat on the photo, its peak ringed, the true part outlined: green where the peak hits, else orange."""
    picture = heat_photo(photo, one.heat, size)
    if one.box is not None:
        longest = max(photo.size)
        sides = [size * side / longest for side in photo.size]
        left, top = ((size - side) / 2 for side in sides)
        edges = [left, top, left, top]
        box = [edge + share * side for edge, share, side in zip(edges, one.box, sides * 2)]
        ImageDraw.Draw(picture).rectangle(box, outline=GREEN if one.hit else ORANGE, width=3)
    return picture


def word_map_part(items: Sequence[LookedAt], result: Result | None) -> Part:
    """Photos with the maps of some of their words, and how often such peaks hit."""
    if not items:
        return Part(TITLE, missing="no photo of the split has a text with two words or more")
    known = any(one.hit is not None for item in items for one in item.maps)
    note = (
        "Cross-attention of single words on items that were not trained on, against what all words of the text look "
        "at: none to much (dark red), each map by itself; the small square is its hottest patch."
    )
    note += (
        " The large frame is where the word's thing really is: green if the hottest patch hits it, orange if not. "
        if known
        else " Where things really are is not known in this corpus, so look whether the place makes sense. "
    )
    return Part(TITLE, note + _hits(result), "\n".join(map(_row, items)), {"word_maps": map_sheet(items)})


def _hits(result: Result | None) -> str:
    name = "pointing/hit/{}"
    if result is None or name.format("own_word") not in result.metrics:
        return ""
    own, other, random = (percent(result.value(name.format(one))) for one in ("own_word", "other_word", "random"))
    return (
        f"Over the whole test, {own} % of the hottest patches hit; those of the text's other words would hit the same "
        f"frame in {other} %, a patch at random in {random} %."
    )


def _row(item: LookedAt) -> str:
    figures = [
        f"<figure><b>photo</b>{fragments.image(enlarge(item.photo, SIZE), 'the photo itself', photo=True)}</figure>"
    ]
    for one in item.maps:
        alt = f"where {one.word} looks" + ("" if one.hit is None else ": hit" if one.hit else ": miss")
        told = "" if one.hit is None else '<span class="good">hit</span>' if one.hit else "miss"
        picture = fragments.image(map_picture(item.photo, one, SIZE), alt, photo=True)
        figures.append(f"<figure><b>{escape(one.word)}</b>{picture}<figcaption>{told}</figcaption></figure>")
    return f'<p class="text">{escape(item.text)}</p><div class="strip wide">{"".join(figures)}</div>'


def map_sheet(items: Sequence[LookedAt], size: int = 180) -> Image.Image:
    """A row a photo: itself with its text, then its words' maps."""
    rows = []
    for item in items:
        text = paragraph([(item.text, "plain")], 2 * size, font(12))
        cells = [beside([enlarge(item.photo, size), text], 10)]
        for one in item.maps:
            told = [] if one.hit is None else [(" hit", (None, GREEN))] if one.hit else [(" miss", (None, ORANGE))]
            head = paragraph([(one.word, "plain"), *told], size, font(14, bold=True))
            cells.append(over([head, map_picture(item.photo, one, size)], 4))
        rows.append(beside([*cells, Image.new("RGB", (1, 1), PAPER)], 14))
    return framed(over(rows, 18))
