"""Rows of a corpus to batches: photos as bytes (normalised later, on the device), texts through the processor."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import ceil

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from syncmask.processing.augment import Augmentation
from syncmask.processing.corpus import CorpusIndex
from syncmask.processing.decoded_cache import DecodedCache
from syncmask.processing.processing_syncmask import SyncMaskProcessor, open_image, to_rgb
from syncmask.processing.tar_photos import is_tar_place, read_tar_place

REFERENCE_DRAW = 2
"""Behind (seed, epoch, row) in the seed of a reference photo's augmentation; 1 is the choice of substitutes."""


class UnreadablePhoto(RuntimeError):
    """A photo that cannot be read: `row` says which (a position in the dataset), `reason` why."""

    def __init__(self, row: int | str, reason: str | None = None):
        # A DataLoader worker hands an exception over by its message alone; the row is read back from it.
        message = row if reason is None else f"photo of row {row} cannot be read: {reason}"
        super().__init__(message)
        found = re.search(r"photo of row (\d+) cannot be read: (.*)", str(message))
        self.row = int(found[1]) if found else -1
        self.reason = found[2] if found else str(message)

    def __reduce__(self):
        return type(self), (str(self),)


class PhotoDataset(Dataset):
    """Photos and texts of a corpus by (epoch, row).

    `photos[(epoch, row)]` is a record {pixel_values uint8 (3, S, S), text, row_id, item_id, text_id}, of triplets with
    reference_pixel_values (3, S, S) too. The augmentation of each photo is drawn from (seed, epoch, row) alone, so a
    record is the same in any worker, process or resumed run. A plain row number means epoch 0.

    Args:
        dataset: rows of a corpus (`load_corpus(...)["train"]`).
        index: its `CorpusIndex`.
        image_size: S; photos of that size already are not resized.
        seed: of the augmentation.
        augment: False (the processor's own pixels before normalisation), True (`Augmentation()`) or settings.
        resample: Pillow's filter; wanted is the processor's own (`processor.image_processor.resample`).
        reference_column: column of the reference photos of triplets ("candidate"); None = rows have one photo.
        fast_decode: decode a large JPEG at a fraction of its size and shrink every photo to what the smallest crop
            needs, never below; pixels differ a little.
        decoded_cache: folder where decoded photos are kept and read from (`DecodedCache`); changes no pixel.

    Raises:
        ValueError: dataset and index differ in length, or there is no such column.
        UnreadablePhoto: on reading a row one of whose photos is missing or broken.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        index: CorpusIndex,
        *,
        image_size: int,
        seed: int,
        augment: bool | Augmentation,
        resample: int = Image.Resampling.BICUBIC,
        reference_column: str | None = None,
        fast_decode: bool = False,
        decoded_cache: str | None = None,
    ):
        if len(dataset) != len(index.item_ids):
            raise ValueError(f"the dataset has {len(dataset)} rows, its index {len(index.item_ids)}; wanted the same.")
        if reference_column not in (None, *dataset.column_names):
            raise ValueError(
                f"the dataset has no column {reference_column!r} of reference photos; it has "
                f"{', '.join(dataset.column_names)}. Composed retrieval needs triplets, such as `garment-variants`."
            )
        # Undecoded, so that a broken photo can be named; no further columns, so that truth columns cost nothing.
        self.photo_columns = ["image"] if reference_column is None else ["image", reference_column]
        rows = dataset.select_columns([*self.photo_columns, "text"]).with_format(None)
        for name in self.photo_columns:
            rows = rows.cast_column(name, datasets.Image(decode=False))
        self.rows = rows
        self.index, self.image_size, self.seed, self.resample = index, image_size, seed, resample
        self.augment = Augmentation() if augment is True else augment
        smallest = self.augment.smallest_side if self.augment else 1.0
        self.at_least = ceil(image_size / smallest) if fast_decode else None
        # Of what is resized again this filter keeps as much as bicubic, at the cost of bilinear.
        self.shrink = Image.Resampling.HAMMING if self.augment else resample
        self.cache = None if decoded_cache is None else DecodedCache(decoded_cache, self.at_least, self.shrink)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> list[dict]:
        """Many records with one look into the table; the DataLoader asks in this way."""
        keys = [key if isinstance(key, (tuple, list)) else (0, key) for key in keys]
        columns = self.rows[[int(row) for _, row in keys]]
        return [
            {
                **self._photos(photos, int(epoch), int(row)),
                "text": text,
                "row_id": int(row),
                "item_id": int(self.index.item_ids[row]),
                "text_id": int(self.index.text_ids[row]),
            }
            for (epoch, row), text, *photos in zip(
                keys, columns["text"], *(columns[name] for name in self.photo_columns), strict=True
            )
        ]

    def _photos(self, photos: list[dict | None], epoch: int, row: int) -> dict[str, np.ndarray]:
        pixels = {"pixel_values": self._pixels(self._read(photos[0], row), epoch, row)}
        if len(photos) == 1:
            return pixels
        try:
            reference = self._read(photos[1], row)
        except UnreadablePhoto as problem:
            raise UnreadablePhoto(row, f"its reference photo: {problem.reason}") from problem
        return pixels | {"reference_pixel_values": self._pixels(reference, epoch, row, REFERENCE_DRAW)}

    def _read(self, cell: dict | None, row: int) -> Image.Image:
        if self.cache is None:
            return self._decode(cell, row)
        return self.cache.read(cell, lambda: self._decode(cell, row))

    def _decode(self, cell: dict | None, row: int) -> Image.Image:
        """The photo as augmentation reads it: with nothing random in it yet, so that it can be kept."""
        photo = read_photo(cell, row, self.at_least)
        if self.at_least is None or max(photo.size) <= self.at_least:
            return photo
        # A square where both sides are too long: a crop becomes one anyway.
        return photo.resize(tuple(min(side, self.at_least) for side in photo.size), self.shrink)

    def _pixels(self, photo: Image.Image, *draw: int) -> np.ndarray:
        """The photo as bytes; `draw` (epoch, row, ...) is what its augmentation follows from."""
        size = self.image_size
        if self.augment:
            rng = np.random.default_rng(np.random.SeedSequence([self.seed, *draw]))
            return self.augment(photo, size, rng, self.resample)
        if photo.size != (size, size):
            photo = photo.resize((size, size), self.resample)
        return np.ascontiguousarray(np.moveaxis(np.asarray(photo), -1, 0))


def read_photo(image: dict | None, row: int, at_least: int | None = None) -> Image.Image:
    """An undecoded cell of an image column ({"bytes", "path"}) as an upright RGB photo; it may lie in a tar shard.

    Large JPEGs are decoded at a fraction of their size where `at_least` pixels a side are enough (see `open_image`).

    Raises:
        UnreadablePhoto: it is null, missing or broken.
    """
    source = None if image is None else image.get("bytes") or image.get("path")
    if source is None:
        raise UnreadablePhoto(row, "the row holds no photo")
    place = f"{source}: " if is_tar_place(source) else ""
    try:
        return to_rgb(open_image(read_tar_place(source) if place else source, at_least))
    except (OSError, ValueError) as error:
        raise UnreadablePhoto(row, f"{place}{error}") from error


class Collator:
    """Records of `PhotoDataset` to a batch, padded to its longest text.

    The batch holds pixel_values (B, 3, S, S) uint8, and reference_pixel_values like them where records have them;
    input_ids, attention_mask, word_ids (B, L) int64; row_ids, item_ids, text_ids (B,) int64.
    """

    def __init__(self, processor: SyncMaskProcessor):
        self.processor = processor

    def __call__(self, records: list[dict]) -> dict[str, torch.Tensor]:
        """See the class."""
        texts = self.processor(text=[record["text"] for record in records], return_word_ids=True)
        photos = [name for name in ("pixel_values", "reference_pixel_values") if name in records[0]]
        batch = {name: torch.from_numpy(np.stack([record[name] for record in records])) for name in photos}
        batch |= {name: texts[name] for name in ("input_ids", "attention_mask", "word_ids")}
        for name in ("row_id", "item_id", "text_id"):
            batch[f"{name}s"] = torch.tensor([record[name] for record in records], dtype=torch.int64)
        return batch


def normalise(pixel_values: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Bytes (..., 3, S, S) to the processor's float32 pixels, (x / 255 - mean) / std, on the tensor's own device.

    Example:
        >>> normalise(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8), (0.5,) * 3, (0.5,) * 3).flatten().tolist()
        [1.0, 1.0, 1.0]
    """
    mean, std = (torch.tensor(tuple(x), device=pixel_values.device).view(3, 1, 1) for x in (mean, std))
    if pixel_values.device.type == "cpu":
        # NumPy asks for huge pages and torch does not: small ones that are new cost more than a pass over the batch.
        pixels = torch.from_numpy(np.empty(pixel_values.shape, dtype=np.float32)).copy_(pixel_values)
    else:
        pixels = pixel_values.to(torch.float32, copy=True)
    return pixels.div_(255).sub_(mean).div_(std)
