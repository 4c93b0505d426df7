"""Pictures of a model at work for the report: masks on unseen photos, photos found by text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset

from syncmask.masks import ChoiceRule, choose
from syncmask.processing.corpus import CorpusIndex
from syncmask.word_scores import WordScores

from .embedding import Embedder, batches, photos
from .figures import Hit, MaskedPhoto, Masks, Search
from .measure import hard_masks
from .metrics import ranks

RANDOM = "random, as many"


@torch.no_grad()
def mask_photos(
    model,
    processor,
    dataset,
    rows: Sequence[int],
    *,
    strategy: str = "attention",
    word_means: WordScores | None = None,
    instance_weight: float | None = None,
    word_rate: float = 0.3,
    patch_rate: float = 0.4,
    layer: int | None = None,
    seed: int = 0,
) -> list[MaskedPhoto]:
    """The hard masks (T = 0, no random share) of some rows, beside random ones at the same rates.

    Args:
        model: the teacher, a `SyncMaskForPreTraining` in eval mode.
        processor: its `SyncMaskProcessor`.
        dataset: rows of a corpus; its column `visible`, if any, colours the words by the truth.
        rows: which; of at least two items for `evidence`.
        strategy: "attention", "evidence" or "alignment"; "random" shows what attention would hide.
        word_means: m[v], as saved beside the weights; None = the pair's own scores alone.
        instance_weight: lambda; the strategy's default when None.
        word_rate: share of the words.
        patch_rate: share of the patches.
        layer: fusion layer of the attention; `config.mask_layer` when None.
        seed: of the random masks.
    """
    strategy = "attention" if strategy == "random" else strategy
    batch = next(batches(processor, dataset, np.asarray(rows), len(rows), model.device))
    words, patches, pairs = hard_masks(
        model,
        batch,
        CorpusIndex.from_dataset(dataset).item_ids[np.asarray(rows)],
        strategy,
        word_means=word_means,
        instance_weight=instance_weight,
        word_rate=word_rate,
        patch_rate=patch_rate,
        layer=layer,
        seed=seed,
    )
    every = torch.ones_like(patches)
    ways = {
        f"synchronised ({strategy})": (words, patches),
        RANDOM: tuple(_random_masks((pairs.valid, every), (word_rate, patch_rate), seed)),
    }
    return _masked_photos(dataset, rows, pairs.valid, ways, model.syncmask.grid)


def _random_masks(valid: Sequence[torch.Tensor], rates: Sequence[float], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.rand(part.shape, generator=generator).to(part.device) for part in valid]
    rules = [ChoiceRule(rate=rate, temperature=0, random_share=0) for rate in rates]
    return [choose(keys, part, rule).mask for keys, part, rule in zip(noise, valid, rules)]


def _masked_photos(dataset, rows, valid, ways: dict, grid: tuple[int, int]) -> list[MaskedPhoto]:
    shown = dataset.select([int(row) for row in rows])
    truth = shown["visible"] if "visible" in dataset.column_names else [None] * len(rows)
    return [
        MaskedPhoto(
            photo=photo,
            text=text,
            masks=[
                Masks(
                    name,
                    words[place, : int(valid[place].sum())].cpu().numpy(),
                    patches[place].reshape(grid).cpu().numpy(),
                )
                for name, (words, patches) in ways.items()
            ],
            visible=None if visible is None else np.array(visible, dtype=bool),
        )
        for place, (photo, text, visible) in enumerate(zip(photos(shown, np.arange(len(rows))), shown["text"], truth))
    ]


@dataclass(frozen=True)
class Gallery:
    """Rows of a corpus with the features of their photos (rows, D) and distinct texts (texts, D)."""

    rows: Dataset
    index: CorpusIndex
    image_feats: np.ndarray
    text_feats: np.ndarray

    @classmethod
    def of(cls, model, processor, dataset, *, max_rows: int = 2000, batch_size: int = 128) -> Gallery:
        """Embeds the first `max_rows` photos and their texts."""
        rows = dataset.select(range(min(max_rows, len(dataset))))
        index = CorpusIndex.from_dataset(rows)
        embedder = Embedder(model, processor, rows, index, batch_size=batch_size)
        return cls(rows, index, embedder.image_feats(), embedder.text_feats())


def text_searches(gallery: Gallery, *, count: int = 6, hits: int = 5, seed: int = 0) -> list[Search]:
    """A seeded sample of the gallery's texts, each with the `hits` photos that are nearest by cosine."""
    rng, index = np.random.default_rng(seed), gallery.index
    texts = rng.choice(len(index.texts), size=min(count, len(index.texts)), replace=False)
    scores = gallery.text_feats[texts] @ gallery.image_feats.T
    right = index.text_ids == texts[:, None]
    best = np.argsort(-scores, axis=1, kind="stable")[:, :hits]
    return [
        Search(
            text=index.texts[text],
            rank=int(rank),
            hits=[
                Hit(score=float(scores[place, row]), right=bool(right[place, row]), photo=photo)
                for row, photo in zip(best[place], photos(gallery.rows, best[place]))
            ],
        )
        for place, (text, rank) in enumerate(zip(texts, ranks(scores, right)))
    ]


def sample_photos(dataset, count: int = 8, seed: int = 0) -> list[tuple]:
    """Some photos of a corpus with their texts: (photo, text), a seeded sample."""
    rows = np.random.default_rng(seed).choice(len(dataset), size=min(count, len(dataset)), replace=False)
    return list(zip(photos(dataset, rows), dataset.select(rows)["text"]))


def spread_rows(dataset, count: int, seed: int = 0) -> np.ndarray:
    """Rows of `count` different items (fewer where there are not as many), one photo each, a seeded sample."""
    item_ids = CorpusIndex.from_dataset(dataset).item_ids
    order = np.random.default_rng(seed).permutation(len(item_ids))
    firsts = np.unique(item_ids[order], return_index=True)[1]
    return order[np.sort(firsts)[:count]]
