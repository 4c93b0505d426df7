"""What is wrong with a photo, told cheaply, and which photos look the same: for the corpus check."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image

from .processing_syncmask import to_rgb

TINY = 32  # pixels on the shorter side
HUGE = 50_000_000  # pixels; more are never decoded here
BITS = 4  # of 64: photos whose hashes differ in at most so many look the same
COLOUR = 4  # of 255: and their colours differ by at most so much, in each of 4 x 4 fields on the average
BROKEN = (OSError, SyntaxError, ValueError, KeyError, IndexError, TypeError, ZeroDivisionError, EOFError)


@dataclass(frozen=True)
class PhotoFacts:
    """One photo: its size, what is wrong ("missing", "unreadable", "tiny", "huge" or None) and why, how it looks.

    `look` is the perceptual hash (64 bits as uint64), `colours` 4 x 4 mean colours (48 bytes); zero where the photo
    was not decoded.
    """

    width: int = 0
    height: int = 0
    problem: str | None = None
    reason: str = ""
    look: int = 0
    colours: bytes = bytes(48)


def probe(photo: Image.Image | dict | None) -> PhotoFacts:
    """Look at a photo: the header first, so that a decompression bomb stays packed; then decode it as small as can be.

    Args:
        photo: a PIL image, or an undecoded cell {"bytes", "path"}.

    Example:
        >>> probe({"bytes": b"no photo", "path": None}).problem
        'unreadable'
    """
    try:
        image = _open(photo)
    except Image.DecompressionBombError as error:
        return PhotoFacts(problem="huge", reason=str(error))
    except FileNotFoundError as error:
        return PhotoFacts(problem="missing", reason=str(error))
    except BROKEN as error:
        return PhotoFacts(problem="unreadable", reason=str(error))
    width, height = image.size
    if width * height > HUGE:
        return PhotoFacts(width, height, "huge", f"{width} x {height} pixels")
    try:
        look, colours = _look(image)
    except (*BROKEN, Image.DecompressionBombError) as error:
        return PhotoFacts(width, height, "unreadable", str(error))
    problem = "tiny" if min(width, height) < TINY else None
    return PhotoFacts(width, height, problem, f"{width} x {height} pixels" if problem else "", look, colours)


def _open(photo: Image.Image | dict | None) -> Image.Image:
    if isinstance(photo, Image.Image):
        return photo
    content, path = (None, None) if photo is None else (photo.get("bytes"), photo.get("path"))
    if content is None and not path:
        raise FileNotFoundError("the row holds no photo")
    if content is None and not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if content == b"" or (content is None and not Path(path).stat().st_size):
        raise ValueError("the file has zero bytes")
    return Image.open(path if content is None else BytesIO(content))


def _look(image: Image.Image) -> tuple[int, bytes]:
    """The photo's perceptual hash and its mean colours; reads the file to its end, so that a cut shows."""
    image.draft("RGB", (128, 128))  # JPEG unpacks to an eighth of the size at an eighth of the cost.
    photo = to_rgb(image)
    small = photo.resize((32, 32), Image.Resampling.BOX)
    bits = imagehash.phash(small).hash.ravel()
    return int(np.packbits(bits).view(">u8")[0]), small.resize((4, 4), Image.Resampling.BOX).tobytes()


def near_duplicates(
    looks: np.ndarray, colours: np.ndarray, other_looks: np.ndarray, other_colours: np.ndarray
) -> np.ndarray:
    """For each photo the first among the others that looks the same, -1 where none does.

    Same: hashes differ in at most 4 of 64 bits, and mean colours by at most 4 of 255 (the hash is blind to colour,
    and shops sell one garment in ten of them). Every pair is compared, a few billion a minute.

    Args:
        looks, other_looks: (n,), (m,) uint64.
        colours, other_colours: (n, 48), (m, 48) uint8.

    Returns:
        (n,) int64.

    Example:
        >>> grey = np.zeros((1, 48), np.uint8)
        >>> near_duplicates(np.array([7], np.uint64), grey, np.array([6], np.uint64), grey).tolist()
        [0]
    """
    found = np.full(len(looks), -1, dtype=np.int64)
    # Equal hashes once: corpora with many plain photos have few distinct ones.
    distinct, inverse = np.unique(looks, return_inverse=True)
    others, first = np.unique(other_looks, return_inverse=True)
    members = np.argsort(first, kind="stable")
    starts = np.searchsorted(first[members], np.arange(len(others) + 1))
    mine = np.argsort(inverse, kind="stable")
    ends = np.searchsorted(inverse[mine], np.arange(len(distinct) + 1))
    for number, look in enumerate(distinct):
        close = np.flatnonzero(np.bitwise_count(others ^ look) <= BITS)
        if not len(close):
            continue
        rows = np.sort(np.concatenate([members[starts[one] : starts[one + 1]] for one in close]))
        for row in mine[ends[number] : ends[number + 1]]:
            found[row] = _first_of_colour(colours[row], other_colours, rows)
    return found


def _first_of_colour(colour: np.ndarray, other_colours: np.ndarray, rows: np.ndarray, block: int = 4096) -> int:
    for start in range(0, len(rows), block):
        some = rows[start : start + block]
        apart = np.abs(other_colours[some].astype(np.int16) - colour.astype(np.int16)).mean(axis=1)
        if (apart <= COLOUR).any():
            return int(some[np.argmax(apart <= COLOUR)])
    return -1
