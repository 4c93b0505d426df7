"""The rows that are trained on: from the settings of a corpus to records."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from scipy.sparse import csr_matrix

from syncmask import SyncMaskProcessor
from syncmask.processing.collator import PhotoDataset, normalise
from syncmask.processing.corpus import CorpusIndex
from syncmask.processing.overlap import overlap_tau, text_rows

from .arguments import ContrastArguments, DataArguments
from .photo_cache import check_cache
from .processes import on_main

logger = logging.getLogger(__name__)

# The probe set never takes more than this share of a small corpus's items.
PROBE_SHARE = 0.1


@dataclass
class TrainData:
    """The rows that are trained on.

    Args:
        rows: of the train split. index: their item and text ids. photos: the same rows as records, by (epoch, row).
    """

    rows: datasets.Dataset
    index: CorpusIndex
    photos: PhotoDataset


@dataclass
class PairData(TrainData):
    """Rows of which each text is compared with other items' photos.

    Args:
        texts: (texts, words) sparse unit rows for the overlap of texts, by text id.
        tau: the overlap from which two texts may be true of one another's photos.
    """

    texts: csr_matrix
    tau: float


def train_data(
    rows: datasets.Dataset, data: DataArguments, processor: SyncMaskProcessor, seed: int, **options
) -> TrainData:
    """Index some rows and make records of them; `options` go to `PhotoDataset`."""
    index = CorpusIndex.from_dataset(rows)
    resample, size = processor.image_processor.resample, side_of(processor)
    options |= {"image_size": size, "augment": data.augment, "resample": resample, "fast_decode": data.fast_decode}
    photos = PhotoDataset(rows, index, seed=seed, decoded_cache=data.decoded_cache, **options)
    if photos.cache is not None:
        on_main(lambda: check_cache(photos))
    return TrainData(rows, index, photos)


def pair_data(
    rows: datasets.Dataset,
    data: DataArguments,
    objective: ContrastArguments,
    processor: SyncMaskProcessor,
    seed: int,
) -> PairData:
    """`train_data`, with the overlap of the rows' texts."""
    found = train_data(rows, data, processor, seed)
    texts = text_rows(found.index.texts)
    tau = objective.overlap_tau
    if tau is None:
        tau = overlap_tau(texts, found.index.item_of_text, seed)
        logger.info("two texts may be true of one another's photos from an overlap of %.3f", tau)
    return PairData(found.rows, found.index, found.photos, texts, tau)


def split_probe(rows: datasets.Dataset, pairs: int, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Set probe items aside: the rows that are trained on, and the probe's."""
    probe = probe_positions(CorpusIndex.from_dataset(rows).item_ids, pairs, seed)
    return rows.select(np.setdiff1d(np.arange(len(rows)), probe)), rows.select(probe)


def probe_positions(item_ids: np.ndarray, pairs: int, seed: int) -> np.ndarray:
    """Choose rows of whole items, seeded: at most `pairs` rows and a tenth of the items, at least two items.

    Raises:
        SystemExit: when the corpus has fewer than four items.
    """
    items, counts = np.unique(item_ids, return_counts=True)
    if len(items) < 4:
        raise SystemExit(
            f"the train split has {len(items)} item(s); at least 4 are needed to train and to test the masks."
        )
    order = np.random.default_rng([seed, 1]).permutation(len(items))[: max(2, int(PROBE_SHARE * len(items)))]
    fits = max(2, int((np.cumsum(counts[order]) <= pairs).sum()))
    return np.flatnonzero(np.isin(item_ids, items[order[:fits]]))


def side_of(processor: SyncMaskProcessor) -> int:
    """Return the pixels on a side of the processor's photos."""
    return processor.image_processor.size["height"]


def to_pixels(pixel_values: torch.Tensor, processor: SyncMaskProcessor) -> torch.Tensor:
    """Standardise bytes as the processor does, on their own device."""
    return normalise(pixel_values, processor.image_processor.image_mean, processor.image_processor.image_std)
