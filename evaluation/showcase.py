"""Pictures of a model at work for the report: masks on unseen photos, photos found by text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml

from syncmask.masks import ChoiceRule, blend, choose
from syncmask.processing.corpus import CorpusIndex
from syncmask.word_scores import WordScores

from .embedding import Embedder, batches, photos
from .figures import Hit, MaskedPhoto, Masks, Search
from .measure import INSTANCE_WEIGHTS, patches_of_top_words, score_pairs, top
from .metrics import ranks
from .report import Report, read_history, read_results, write_report

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
        strategy: "attention" or "evidence"; "random" shows what attention would hide.
        word_means: m[v], as saved beside the weights; None = the pair's own scores alone.
        instance_weight: lambda; the strategy's default when None.
        word_rate: share of the words.
        patch_rate: share of the patches.
        layer: fusion layer of the attention; `config.mask_layer` when None.
        seed: of the random masks.
    """
    strategy = "attention" if strategy == "random" else strategy
    batch = next(batches(processor, dataset, np.asarray(rows), len(rows), model.device))
    item_ids = CorpusIndex.from_dataset(dataset).item_ids[np.asarray(rows)]
    pairs = score_pairs(model, batch, item_ids, [strategy], layer=layer, seed=seed)
    scores = pairs.scores[strategy]
    if word_means is not None:
        weight = INSTANCE_WEIGHTS[strategy] if instance_weight is None else instance_weight
        means = word_means.means(word_means.rows(batch["input_ids"], batch["word_ids"]))
        everywhere = torch.ones(len(rows), dtype=torch.bool, device=scores.device)
        scores = blend(scores, means, weight, everywhere, pairs.valid)
    attended = patches_of_top_words(scores, pairs, word_rate)
    every = torch.ones_like(attended, dtype=torch.bool)
    ways = {
        f"synchronised ({strategy})": (top(scores, pairs.valid, word_rate), top(attended, every, patch_rate)),
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


def text_searches(
    model,
    processor,
    dataset,
    *,
    count: int = 6,
    hits: int = 5,
    max_rows: int = 2000,
    batch_size: int = 128,
    seed: int = 0,
) -> list[Search]:
    """A seeded sample of the corpus's texts, each with the photos that are nearest by cosine.

    Args:
        model: a `SyncMaskForPreTraining` in eval mode.
        processor: its `SyncMaskProcessor`.
        dataset: rows of a corpus, the gallery.
        count: how many texts.
        hits: how many photos each.
        max_rows: the gallery's photos, at most (the first ones).
        batch_size: of the passes.
        seed: of the sample.
    """
    gallery = dataset.select(range(min(max_rows, len(dataset))))
    index = CorpusIndex.from_dataset(gallery)
    embedder = Embedder(model, processor, gallery, index, batch_size=batch_size)
    rng = np.random.default_rng(seed)
    texts = rng.choice(len(index.texts), size=min(count, len(index.texts)), replace=False)
    scores = embedder.text_feats()[texts] @ embedder.image_feats().T
    right = index.text_ids == texts[:, None]
    best = np.argsort(-scores, axis=1, kind="stable")[:, :hits]
    return [
        Search(
            text=index.texts[text],
            rank=int(rank),
            hits=[
                Hit(score=float(scores[place, row]), right=bool(right[place, row]), photo=photo)
                for row, photo in zip(best[place], photos(gallery, best[place]))
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


def report_run(run, model, processor, dataset, strategy: str, *, word_means=None, summary=(), seed: int = 0) -> Path:
    """Writes the report of a run folder: what it recorded, and pictures of `model` on `dataset` (unseen items).

    Args:
        run: the run's folder, with metrics.jsonl, results/ and config.yaml.
        model: the teacher (masks are its), a `SyncMaskForPreTraining` in eval mode.
        processor: its `SyncMaskProcessor`.
        dataset: rows of unseen items.
        strategy: that the run masked by.
        word_means: m[v] of that strategy.
        summary: sentences for the top.
        seed: of the samples.
    """
    run = Path(run)
    settings = (
        yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) if (run / "config.yaml").exists() else {}
    )
    objective = settings.get("objective", {})
    masks = mask_photos(
        model,
        processor,
        dataset,
        spread_rows(dataset, 6, seed),
        strategy=strategy,
        word_means=word_means,
        instance_weight=objective.get("mask_instance_weight"),
        word_rate=objective.get("word_mask_rate", 0.3),
        patch_rate=objective.get("patch_mask_rate", 0.4),
        layer=objective.get("mask_layer"),
        seed=seed,
    )
    content = Report(
        title=f"SyncMask run: {run.resolve().name}",
        summary=summary,
        results=read_results(run),
        history=read_history(run),
        masks=masks,
        searches=text_searches(model, processor, dataset, seed=seed),
        samples=sample_photos(dataset, seed=seed),
        settings=settings,
    )
    return write_report(run, content)
