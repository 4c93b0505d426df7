"""Files of a run: texts and named arrays that are there whole or not at all, records that are appended to."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def write_text(path: Path, text: str) -> Path:
    """Write a text file in UTF-8, over an older one if there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    return partial.replace(path)


def complete_lines(path: Path) -> list[str]:
    """Lines of a record that is appended to; one that a kill cut short is left out, no file gives none."""
    text = path.read_text(encoding="utf-8").rpartition("\n")[0] if path.is_file() else ""
    return [line for line in text.split("\n") if line.strip()]


def write_arrays(path: str | Path, arrays: Mapping[str, np.ndarray]) -> str:
    """Write numbers and strings (no objects, so nothing is unpickled when reading); returns `arrays_sha256`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **{name: np.asarray(array) for name, array in arrays.items()})
    partial.replace(path)
    return arrays_sha256(arrays)


def read_arrays(path: str | Path, sha256: str = "") -> dict[str, np.ndarray]:
    """Read what `write_arrays` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no .npz file, or contents with another hash than `sha256` (where that is given).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it is written beside a result: evaluate again")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no file of arrays (.npz), or is cut short: {error}; evaluate again") from error
    found = arrays_sha256(arrays)
    if sha256 and found != sha256:
        raise ValueError(f"{path} has the hash {found[:12]}..., wanted {sha256[:12]}...: it is of another evaluation")
    return arrays


def arrays_sha256(arrays: Mapping[str, np.ndarray]) -> str:
    """A hash of names and contents: the same for the same lists, on any machine, however the file was packed.

    Example: equal for `{"a": [1]}` as int32 and as int64, since numbers are hashed as int64 or float64.
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        digest.update(f"{name}{array.shape}".encode())
        if array.dtype.kind in "US":
            digest.update("\0".join(array.reshape(-1).tolist()).encode())
        else:
            wide = array.astype("<f8" if array.dtype.kind == "f" else "<i8")
            digest.update(np.ascontiguousarray(wide).tobytes())
    return digest.hexdigest()
