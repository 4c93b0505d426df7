"""Rows of a corpus to batches: photos as bytes (normalised later, on the device), texts through the processor."""

from __future__ import annotations

import re
from collections.abc import Sequence

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from syncmask.processing.augment import Augmentation
from syncmask.processing.corpus import CorpusIndex
from syncmask.processing.processing_syncmask import SyncMaskProcessor, open_image, to_rgb


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

    `photos[(epoch, row)]` is a record {pixel_values uint8 (3, S, S), text, row_id, item_id, text_id}. The augmentation
    is drawn from (seed, epoch, row) alone, so a record is the same in any worker, process or resumed run. A plain
    row number means epoch 0.

    Args:
        dataset: rows of a corpus (`load_corpus(...)["train"]`).
        index: its `CorpusIndex`.
        image_size: S; photos of that size already are not resized.
        seed: of the augmentation.
        augment: False (the processor's own pixels before normalisation), True (`Augmentation()`) or settings.
        resample: Pillow's filter; wanted is the processor's own (`processor.image_processor.resample`).

    Raises:
        ValueError: dataset and index differ in length.
        UnreadablePhoto: on reading a row whose photo is missing or broken.
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
    ):
        if len(dataset) != len(index.item_ids):
            raise ValueError(f"the dataset has {len(dataset)} rows, its index {len(index.item_ids)}; wanted the same.")
        # Undecoded, so that a broken photo can be named; two columns, so that truth columns cost nothing.
        rows = dataset.select_columns(["image", "text"]).with_format(None)
        self.rows = rows.cast_column("image", datasets.Image(decode=False))
        self.index, self.image_size, self.seed, self.resample = index, image_size, seed, resample
        self.augment = Augmentation() if augment is True else augment

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
                "pixel_values": self._pixels(image, int(epoch), int(row)),
                "text": text,
                "row_id": int(row),
                "item_id": int(self.index.item_ids[row]),
                "text_id": int(self.index.text_ids[row]),
            }
            for (epoch, row), image, text in zip(keys, columns["image"], columns["text"], strict=True)
        ]

    def _pixels(self, image: dict | None, epoch: int, row: int) -> np.ndarray:
        photo = read_photo(image, row)
        size = self.image_size
        if self.augment:
            rng = np.random.default_rng(np.random.SeedSequence([self.seed, epoch, row]))
            return self.augment(photo, size, rng, self.resample)
        if photo.size != (size, size):
            photo = photo.resize((size, size), self.resample)
        return np.ascontiguousarray(np.moveaxis(np.asarray(photo), -1, 0))


def read_photo(image: dict | None, row: int) -> Image.Image:
    """An undecoded cell of an image column ({"bytes", "path"}) as an upright RGB photo.

    Raises:
        UnreadablePhoto: it is null, missing or broken.
    """
    source = None if image is None else image.get("bytes") or image.get("path")
    if source is None:
        raise UnreadablePhoto(row, "the row holds no photo")
    try:
        return to_rgb(open_image(source))
    except (OSError, ValueError) as error:
        raise UnreadablePhoto(row, str(error)) from error


class Collator:
    """Records of `PhotoDataset` to a batch, padded to its longest text.

    The batch holds pixel_values (B, 3, S, S) uint8; input_ids, attention_mask, word_ids (B, L) int64; row_ids,
    item_ids, text_ids (B,) int64.
    """

    def __init__(self, processor: SyncMaskProcessor):
        self.processor = processor

    def __call__(self, records: list[dict]) -> dict[str, torch.Tensor]:
        """See the class."""
        texts = self.processor(text=[record["text"] for record in records], return_word_ids=True)
        batch = {"pixel_values": torch.from_numpy(np.stack([record["pixel_values"] for record in records]))}
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
    return (pixel_values.to(torch.float32) / 255 - mean) / std
