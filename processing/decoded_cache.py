"""Decoded photos on a disk, so that later epochs and later runs do not decode them again.

The cut lies right before all that is random: what is kept is the upright RGB photo that the augmentation crops. So
training is the same bit for bit with a cache, without one, and with one that is half full. Exact decoding leaves a
photo at its own size, and resizing that is most of the work. Fast decoding shrinks it, with and without a cache, to
what the smallest crop needs: there a cache is small and saves nearly everything. To shrink exactly decoded photos for
the cache alone would give their crops other pixels than a run without one has.

A file a photo, named by what the photo is (our choice). It is written under another name and then renamed, so it is
whole or absent, whichever worker of whichever process wrote it, whenever that was killed: no index, flag or lock has to
keep in step with the pixels, photos may be of any size, and nothing is reserved before it is needed. A table of
rows would be another one for each seed, task and split, since each trains on other rows; here a photo is kept once
for all of them. `Dataset.map` to arrays was looked at: it decodes the whole corpus before the first step, begins anew
after a kill (its file gets its name at the end), and does so again for each selection of rows.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from uuid import uuid4

import numpy as np
import PIL
from PIL import Image, features

from .tar_photos import is_tar_place, read_tar_place, shard_of

logger = logging.getLogger(__name__)

# To be raised with any change of `open_image`, `to_rgb` or fast decoding after which a photo has other pixels.
DECODING = 1
CODECS = ("jpg", "libjpeg_turbo", "jpg_2000", "libtiff", "webp", "avif")


class DecodedCache:
    """Photos of undecoded cells ({"bytes", "path"}), decoded the first time that they are asked for.

    Args:
        folder: made where it is absent; may be used by several runs, corpora and processes at once.
        at_least: pixels a side that fast decoding leaves at least; None = exact decoding.
        shrink: Pillow's filter, with which fast decoding shrinks. Both name the subfolder, with the versions of
            Pillow and its codecs, so pixels of other settings are never taken.

    Example:
        >>> import tempfile
        >>> cache, file = DecodedCache(tempfile.mkdtemp(), None, Image.Resampling.HAMMING), BytesIO()
        >>> Image.new("RGB", (2, 1), "red").save(file, "PNG")
        >>> cell = {"bytes": file.getvalue(), "path": None}
        >>> first = cache.read(cell, lambda: Image.open(file))
        >>> cache.read(cell, lambda: None).getpixel((1, 0))
        (255, 0, 0)
    """

    def __init__(self, folder: str | os.PathLike, at_least: int | None, shrink: int):
        self.folder = Path(folder).expanduser().absolute() / decoding_name(at_least, shrink)
        self.at_least = at_least
        self.no_room = False  # in this process

    def read(self, cell: dict | None, decode: Callable[[], Image.Image]) -> Image.Image:
        """Return a cell's photo: as it is kept, or from `decode`, which may raise; then nothing is kept."""
        path = self.path_of(cell)
        if path is None:
            return decode()
        photo = load_photo(path)
        if photo is None:
            photo = decode()
            self._keep(path, photo)
        return photo

    def path_of(self, cell: dict | None) -> Path | None:
        """Where a cell's photo is kept; None where it cannot be."""
        name = photo_name(cell)
        return None if name is None else self.folder / name[:2] / f"{name[2:]}.npy"

    def bytes_of(self, cell: dict | None) -> tuple[int, bool]:
        """How many bytes a cell's photo takes here, and whether it is here; (0, False) where it cannot be kept.

        Of one that is not, the header alone is read.
        """
        path = self.path_of(cell)
        if path is None:
            return 0, False
        if path.is_file():
            return path.stat().st_size, True
        source = cell.get("bytes") or cell["path"]
        try:
            source = read_tar_place(source) if is_tar_place(source) else source
            with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
                most = self.at_least or max(image.size)
                return 3 * min(image.width, most) * min(image.height, most), False
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return 0, False

    def _keep(self, path: Path, photo: Image.Image):
        """Write a photo, whole or not at all; a disk that is full or cannot be written to ends the keeping alone."""
        if self.no_room:
            return
        partial = path.with_suffix(f".{uuid4().hex}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("xb") as file:
                    np.lib.format.write_array(file, np.asarray(photo), allow_pickle=False)
                os.replace(partial, path)
            except OSError:
                partial.unlink(missing_ok=True)
                raise
        except OSError as problem:
            self.no_room = True
            logger.warning(
                "process %d keeps no more decoded photos in %s, they are decoded each time from here on: %s",
                *(os.getpid(), self.folder, problem),
            )


def decoding_name(at_least: int | None, shrink: int) -> str:
    """Name all that a decoded photo's pixels depend on beside its file, as a folder."""
    codecs = "".join(f"{name} {features.version(name)};" for name in CODECS)
    digest = hashlib.sha256(f"{DECODING};{codecs}".encode()).hexdigest()[:8]
    return f"pillow-{PIL.__version__}-{digest}-{'exact' if at_least is None else f'fast-{at_least}-{int(shrink)}'}"


def photo_name(cell: dict | None) -> str | None:
    """32 hex digits that name an undecoded cell's photo: by its bytes, or by its file's path, size and time.

    None for no photo and for one whose file is gone or not on a disk (a web address).
    """
    content, path = (cell or {}).get("bytes"), (cell or {}).get("path")
    if not content and path is None:
        return None
    if not content:
        try:
            state = os.stat(shard_of(path) if is_tar_place(path) else path)
        except OSError:
            return None
        place = path if is_tar_place(path) else os.path.abspath(path)
        content = f"{state.st_size} {state.st_mtime_ns} {place}".encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def load_photo(path: Path) -> Image.Image | None:
    """Read a kept photo; None where there is none, or one that a power cut left broken (it is then written anew)."""
    try:
        with path.open("rb") as file:
            pixels = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    whole = pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    return Image.fromarray(pixels) if whole else None
