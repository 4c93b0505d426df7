"""Photos a second through the loader: `python -m benchmarks.loading [--quick] [--json]`.

Training's input (augmented crops of 224 pixels, batches of 16 through a DataLoader) from files: generated garments as
PNG of 224 pixels, and JPEG of 1,024 pixels; without a cache and with a full one, with exact and with fast decoding.
CPU seconds of the loader alone, one thread, no workers, in turns; files and cache are in the system's memory, so disks
do not count. A CPU second here is a second of one `--num_workers` process.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import datasets
import torch
from torch.utils.data import DataLoader

from syncmask.processing.collator import PhotoDataset
from syncmask.processing.corpus import CorpusIndex
from syncmask.processing.garments import make_garments

from .decoding import SIDE, jpeg
from .measure import arguments, in_turns, machine, number

PHOTOS, BATCH = 48, 16


def corpora(folder: Path) -> dict[str, datasets.Dataset]:
    """Rows of photos that lie in files."""
    drawn = make_garments(24, seed=0, image_size=SIDE, cache_dir=str(folder / "garments"))
    small, large = [], []
    for place in range(PHOTOS):
        small.append(folder / f"{place}.png")
        drawn[place]["image"].save(small[-1])
        large.append(folder / f"{place}.jpg")
        large[-1].write_bytes(jpeg(1024, place))
    return {f"garments, PNG of {SIDE} px": table(small), "JPEG of 1,024 px": table(large)}


def table(files: list[Path]) -> datasets.Dataset:
    """Rows of one item each."""
    columns = {"image": list(map(str, files)), "text": ["a text"] * len(files), "item_id": list(map(str, files))}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def load(photos: PhotoDataset) -> int:
    """One epoch; the photos that came."""
    return sum(len(batch) for batch in DataLoader(photos, batch_size=BATCH, collate_fn=list))


def measured(name: str, rows: datasets.Dataset, cache: str, rounds: int) -> list[dict]:
    """Photos a CPU second in four settings, and what a kept photo takes."""
    sides = list(itertools.product((False, True), (None, cache)))
    options = {"image_size": SIDE, "seed": 0, "augment": True}
    make = partial(PhotoDataset, rows, CorpusIndex.from_dataset(rows), **options)
    photos = [make(fast_decode=fast, decoded_cache=folder) for fast, folder in sides]
    # The first round, which does not count, fills the cache.
    times = in_turns(*(partial(load, one) for one in photos), rounds=rounds)
    speeds = [len(rows) / side.median for side in times]
    return [
        {
            "photos": name,
            "fast_decode": fast,
            "decoded_cache": folder is not None,
            "photos_per_cpu_s": speed,
            "ratio": speed / speeds[0],
            "kb_per_photo": one.cache.bytes_of(one.rows[0]["image"])[0] / 1e3 if folder else None,
        }
        for (fast, folder), speed, one in zip(sides, speeds, photos)
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    given = arguments(__doc__).parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        found = []
        for name, rows in corpora(Path(place)).items():
            found += measured(name, rows, f"{place}/cache", 3 if given.quick else 9)
    if given.json:
        print(json.dumps({"machine": machine(), "rows": found}, indent=2))
        return 0
    print("| photos | fast_decode | decoded_cache | photos a CPU second | ratio | kB a kept photo |\n|" + " --- |" * 6)
    for row in found:
        words = ["yes" if row[name] else "no" for name in ("fast_decode", "decoded_cache")]
        size = number(row["kb_per_photo"]) if row["decoded_cache"] else ""
        print(
            f"| {row['photos']} | {' | '.join(words)} | {row['photos_per_cpu_s']:.0f} | {row['ratio']:.1f} | {size} |"
        )
    print("\n" + ", ".join(f"{name} {value}" for name, value in machine().items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
