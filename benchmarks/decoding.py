"""From JPEG files to normalised pixels: `python -m benchmarks.decoding [--quick] [--json]`.

The training input (records of `PhotoDataset`, bytes normalised as one batch) against transformers' stock image
processor on Pillow, both to 224 pixels, bicubic: large files with `--fast_decode`, small ones with exact pixels. CPU
seconds, in turns. Both deliver the same normalised float32 batch, and their times hold all of it.
"""

from __future__ import annotations

import io
import sys

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from syncmask.processing.collator import PhotoDataset, normalise
from syncmask.processing.corpus import CorpusIndex

from .measure import Row, arguments, in_turns, print_rows, timed_row

SIDE, PHOTOS = 224, 16


def jpeg(side: int, seed: int) -> bytes:
    """A photo-like JPEG: smooth shapes, fine texture, quality 90."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((side, side), Image.BICUBIC)
    pixels = np.asarray(coarse, dtype=np.int16) + rng.normal(0, 2, (side, side, 1)).astype(np.int16)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def decode_row(side: int, fast: bool, floor: float, goal: float, rounds: int) -> Row:
    """Files of one size to a batch (16, 3, 224, 224)."""
    files = [jpeg(side, seed) for seed in range(PHOTOS)]
    cells = [{"bytes": file, "path": None} for file in files]
    columns = {"image": cells, "text": ["a text"] * PHOTOS, "item_id": [str(item) for item in range(PHOTOS)]}
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    index = CorpusIndex.from_dataset(rows)
    photos = PhotoDataset(rows, index, image_size=SIDE, seed=0, augment=False, fast_decode=fast)
    size = {"height": SIDE, "width": SIDE}
    stock = CLIPImageProcessorPil(size=size, do_center_crop=False)
    keys = list(range(PHOTOS))

    def ours() -> torch.Tensor:
        batch = np.stack([record["pixel_values"] for record in photos.__getitems__(keys)])
        return normalise(torch.from_numpy(batch), stock.image_mean, stock.image_std)

    def peer() -> torch.Tensor:
        return stock([Image.open(io.BytesIO(file)) for file in files], return_tensors="pt").pixel_values

    times = in_turns(ours, peer, rounds=rounds)
    off = float((ours() - peer()).abs().mean())
    name = f"decode and preprocess, {side:,} px JPEG" + (", fast decoding" if fast else "")
    notes = f"16 photos to normalised float32, normalised by both; values (sd 1) differ by {off:.4f} on average"
    return timed_row(name, *times, floor, goal, notes=notes)


def rows(quick: bool) -> list[Row]:
    """Both rows."""
    rounds = 15 if quick else 45  # short ones, in which another process's work shows
    return [decode_row(1024, True, 4.0, 5.5, rounds), decode_row(256, False, 1.5, 2.0, rounds)]


def main(argv: list[str] | None = None) -> int:
    """Run and print; returns the exit code, 1 where a floor was missed."""
    given = arguments(__doc__).parse_args(argv)
    torch.set_num_threads(given.threads)
    return print_rows(rows(given.quick), given.json)


if __name__ == "__main__":
    sys.exit(main())
