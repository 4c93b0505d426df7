"""Do the heatmaps point at what their words name? Pointing accuracy on a corpus that knows where things are.

For the generated corpus; a word hits when the hottest patch of its map lies in its region. Always beside: chance (the
region's share of the photo), the middle of the photo, and the maps of the text's other words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from syncmask.evaluation.co_occurrence import centre_scores, pointing_hits
from syncmask.evaluation.co_occurrence_protocol import PATCH_VIEWS
from syncmask.evaluation.embedding import batches
from syncmask.evaluation.loading import load_checkpoint
from syncmask.evaluation.metrics import Metric, bootstrap_ratio
from syncmask.evaluation.protocols import describe_corpus, sample_items
from syncmask.evaluation.result import Result, candidates_sha256, check_writable
from syncmask.evaluation.running import choose_split, own_corpus, run_corpus
from syncmask.masks import valid_words
from syncmask.processing.corpus import CorpusIndex

from .encoder import Encoder
from .heatmaps import attention_maps, gradient_maps, relative_maps, resolve_layer

TRUTH = ("words", "regions")
CENTRE = "centre"


def pointing(
    model,
    processor,
    dataset,
    *,
    layer: int | None = None,
    corpus_name: str = "garments",
    split: str = "test",
    max_rows: int | None = 1024,
    image_size: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> Result:
    """Scores a model's heatmaps.

    Args:
        model: with a matching head, in eval mode.
        processor: its `SyncMaskProcessor`.
        dataset: rows with the columns words and regions; best of items never trained on.
        layer: fusion layer that is read; `config.mask_layer` when None.
        corpus_name: for the result.
        split: for the result.
        max_rows: at most this many photos (whole items, a seeded sample); None = all.
        image_size: pixels that regions are given in; the photos' own size when None.
        batch_size: photos a pass.
        seed: of the sample, the middle patch (where four share the middle) and the bootstrap over items.

    Returns:
        A `Result` with a row a kind of map ("attention"; "relative", the same against the mean of the text's words;
        "gradient"), "centre" and "chance", and the figures `hit`, `other_word` (the other words' maps in this word's
        region) and `gain` (hit less other_word; above 0 = the map is of THIS word). Quantities: `pointing` (all
        photos) and `pointing_anywhere` (photos with the garment anywhere and of any size, where the middle helps less).

    Raises:
        ValueError: a corpus without ground truth, a model without such a layer, or its last layer.
    """
    missing = [name for name in TRUTH if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"pointing needs to know where things are, but this corpus has no column {', '.join(missing)}; "
            "take the generated corpus: --corpus garments"
        )
    dataset = dataset.select(sample_items(CorpusIndex.from_dataset(dataset).item_ids, max_rows, seed))
    item_ids = CorpusIndex.from_dataset(dataset).item_ids
    size = image_size or dataset[0]["image"].size[0]
    grid = model.syncmask.grid
    peaks = map_peaks(model, processor, dataset, layer=layer, batch_size=batch_size)
    peaks[CENTRE] = _middle(grid, [len(row) for row in peaks["attention"]], seed)
    metrics = score_peaks(peaks, dataset["regions"], item_ids, grid, size, seed=seed)
    if "view" in dataset.column_names:
        anywhere = np.isin(dataset["view"], PATCH_VIEWS)
        metrics |= score_peaks(
            peaks, dataset["regions"], item_ids, grid, size, rows=anywhere, name="pointing_anywhere", seed=seed
        )
    return Result(
        protocol="pointing",
        version=1,
        corpus=describe_corpus(dataset, corpus_name, split, len(np.unique(item_ids)))
        | {"fusion_layer": resolve_layer(model, layer)},
        metrics=metrics,
        candidates_sha256=candidates_sha256(dataset["item_id"], dataset["text"], [seed]),
    )


def map_peaks(
    model, processor, dataset, *, layer: int | None = None, batch_size: int = 64
) -> dict[str, list[np.ndarray]]:
    """The hottest patch (W,) of each word's map, a row each, by kind of map."""
    peaks: dict[str, list[np.ndarray]] = {}
    for batch in batches(processor, dataset, np.arange(len(dataset)), batch_size, model.device):
        mask, word_ids = batch["attention_mask"], batch["word_ids"]
        with torch.no_grad():
            images = model.syncmask.encode_image(batch["pixel_values"])
            texts = model.syncmask.encode_text(batch["input_ids"], mask)
        attention = attention_maps(model, images, texts, mask, word_ids, layer)
        maps = {
            "attention": attention,
            "relative": relative_maps(attention, word_ids),
            "gradient": gradient_maps(model, images, texts, mask, word_ids, layer),
        }
        lengths = valid_words(word_ids).sum(dim=1).tolist()
        for kind, values in maps.items():
            hottest = values.argmax(dim=-1).cpu().numpy()
            peaks.setdefault(kind, []).extend(row[:length] for row, length in zip(hottest, lengths))
    return peaks


def score_peaks(
    peaks: Mapping[str, Sequence[np.ndarray]],
    regions: Sequence[Sequence],
    item_ids: np.ndarray,
    grid: tuple[int, int],
    image_size: int,
    *,
    rows: np.ndarray | None = None,
    name: str = "pointing",
    seed: int = 0,
) -> dict[str, Metric]:
    """Hits of peaks in regions, by kind of map; the bootstrap resamples items, whose photos go together.

    Args:
        peaks: by kind, (W,) a row.
        regions: [x0, y0, x1, y1] or [] a word, a row.
        item_ids: (rows,).
        grid: patches (h, w).
        image_size: pixels of the regions.
        rows: (rows,) bool, which photos count; all when None.
        name: of the quantity.
        seed: of the bootstrap.
    """
    items = np.unique(item_ids, return_inverse=True)[1]
    metrics = {}
    for kind, by_row in peaks.items():
        hits, words = pointing_hits(by_row, regions, grid, image_size)
        if rows is not None:
            hits, words = hits * rows, words * rows
        own, other, chance = (np.bincount(items, weights=values) for values in hits)
        words = np.bincount(items, weights=words)
        metrics[f"{name}/hit/{kind}"] = bootstrap_ratio(own, words, seed=seed)
        if kind != CENTRE:
            metrics[f"{name}/other_word/{kind}"] = bootstrap_ratio(other, words, seed=seed)
            metrics[f"{name}/gain/{kind}"] = bootstrap_ratio(own - other, words, seed=seed)
    metrics[f"{name}/hit/chance"] = bootstrap_ratio(chance, words, seed=seed)
    return metrics


def _middle(grid: tuple[int, int], lengths: Sequence[int], seed: int) -> list[np.ndarray]:
    """The patch nearest the middle of the photo, for every word of a row; of several as near, one drawn a row."""
    scores, rng = centre_scores(grid), np.random.default_rng(seed)
    nearest = np.flatnonzero(scores == scores.max())
    return [np.full(length, rng.choice(nearest)) for length in lengths]


def pointing_of(
    name_or_run: str,
    *,
    corpus: str | None = None,
    split: str | None = None,
    layer: int | None = None,
    max_rows: int | None = 1024,
    seed: int = 0,
) -> Result:
    """Scores the heatmaps of a run or saved model, and files the result with the run's others.

    Args:
        name_or_run: a run folder, its final/, or a model on the Hub.
        corpus: any source with ground truth; the run's own when None.
        split: test, or validation where there is none, when None.
        layer: fusion layer that is read; `config.mask_layer` when None.
        max_rows: photos, at most.
        seed: see `pointing`.

    Raises:
        ValueError: a corpus without ground truth, no such split, a model without a matching head.
        OSError: a place for the result that cannot be written to.
        FileNotFoundError: no model, or no corpus, there.
    """
    loaded = load_checkpoint(name_or_run)
    if not hasattr(loaded.model, "itm_head"):
        raise ValueError(f"{type(loaded.model).__name__} has no matching head, so no gradient to weight heatmaps by")
    place = (loaded.run or Path.cwd()) / "results"
    check_writable(place)
    encoder = Encoder(loaded.model, loaded.processor)  # which knows the device
    splits = run_corpus(loaded, corpus)
    split = choose_split(splits, split)
    about = {"corpus_name": corpus or own_corpus(loaded), "split": split}
    result = pointing(
        encoder.model, encoder.processor, splits[split], layer=layer, max_rows=max_rows, seed=seed, **about
    )
    result.model = {"path": str(name_or_run), "sha256": loaded.about["sha256"]}
    result.save(place)
    return result
