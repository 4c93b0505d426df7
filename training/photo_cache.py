"""Before training with a decoded cache: what is in it, and whether the rest has room."""

from __future__ import annotations

import logging
import shutil

import numpy as np

from syncmask.processing.collator import PhotoDataset

from .faults import RunStopped, check_writable

logger = logging.getLogger(__name__)

# Rows whose photos are looked at, spread over the corpus: the bytes of all are told from theirs. More would take long
# where the photos' disk is slow.
SAMPLE = 500
MARGIN = 1.05  # of the bytes that are told to be missing


def check_cache(photos: PhotoDataset):
    """Tell how much of the rows' photos is kept already.

    Raises:
        RunStopped: the folder cannot be written to, or its disk has no room for the photos that are missing.
    """
    folder = photos.cache.folder
    check_writable(folder, "--decoded_cache")
    count, looked = distinct_photos(photos), sample(photos)
    here, size = (sum(column) for column in zip(*((there, size) for size, there in looked)))
    kept = sum(size for size, there in looked if there)
    scale = count / len(looked)
    missing = int(scale * (size - kept) * MARGIN)
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise RunStopped(
            f"decoded_cache: {count:,} photos take about {tell(scale * size)}, of which {tell(missing)} are still to "
            f"be written, but {tell(free)} are free at {folder}. Name a folder on another disk, free some room, add "
            "--fast_decode (large photos are then kept smaller), or leave --decoded_cache out."
        )
    logger.info(
        "decoded cache: %s%s of %s photos, %s of %s at %s",
        *("about " if len(looked) < count else "", f"{round(scale * here):,}", f"{count:,}"),
        *(tell(scale * kept), tell(scale * size), folder),
    )


def sample(photos: PhotoDataset) -> list[tuple[int, bool]]:
    """(bytes in the cache, whether it is there) of the photos of some rows, evenly spread."""
    places = np.unique(np.linspace(0, len(photos) - 1, SAMPLE).astype(int))
    return [photos.cache.bytes_of(photos.rows[int(place)][name]) for place in places for name in photos.photo_columns]


def distinct_photos(photos: PhotoDataset) -> int:
    """Count the rows' photos; one that several rows of triplets show is counted once where it has a path."""
    paths, without = set(), 0
    for name in photos.photo_columns:
        cells = photos.rows.select_columns([name]).flatten().select_columns([f"{name}.path"])
        column = cells.with_format("arrow")[:].column(0)
        paths.update(column.unique().to_pylist())
        without += column.null_count
    return without + len(paths - {None})


def tell(size: float) -> str:
    """Bytes for people: "3.1 GB".

    Example:
        >>> tell(3.14e9), tell(25e6)
        ('3.1 GB', '25 MB')
    """
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"
