"""Names of files that come with a corpus stay inside its folder: no `..`, no absolute path, no link that leads out.

A corpus from elsewhere names its own files; a name that leads out would read this machine's other files and, once
converted and published, give them away.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

MEND = "Put the file inside that folder and name it by its path relative to it."


def refuse_climbing(name: str, where: str) -> None:
    """Raise ValueError for a name that is absolute or climbs out by `..`, judged by its letters alone.

    Args:
        name: as the corpus gives it, with slashes of either kind.
        where: what the message says the name stands in, such as "train/metadata.jsonl".

    Example:
        >>> refuse_climbing("photos/../photos/1.jpg", "metadata.jsonl")
    """
    parts = PurePosixPath(name.replace("\\", "/")).parts
    depth, climbs = 0, False
    for part in parts:
        depth += -1 if part == ".." else 0 if part == "." else 1
        climbs |= depth < 0
    if climbs or name.startswith(("/", "\\")) or PureWindowsPath(name).drive:
        raise ValueError(f"{where} names {name!r}, which leads out of its folder. {MEND}")


def inside(folder: Path, names: Iterable[str | None], where: str) -> list[str | None]:
    """Absolute paths of files that are named relative to a folder; names of files that do not exist are fine.

    Each folder on the way is looked into once, so that 260,000 photos cost no 260,000 system calls.

    Args:
        folder: the names' base; it may itself be reached through a link.
        names: None stays None.
        where: what the messages name as the place of the names.

    Raises:
        ValueError: a name that is absolute, climbs out, or passes through a symbolic link out of the folder.
    """
    root = folder.resolve()
    links: dict[str, set[str]] = {}
    paths = []
    for name in names:
        if name is None:
            paths.append(None)
            continue
        refuse_climbing(name, where)
        path = os.path.normpath(os.path.join(root, name))
        parent, leaf = os.path.split(path)
        if parent not in links:
            _refuse_outside(Path(parent), root, name, where)
            links[parent] = _links_in(parent)
        if leaf in links[parent]:
            _refuse_outside(Path(path), root, name, where)
        paths.append(path)
    return paths


def _links_in(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_symlink()}
    except OSError:
        return set()  # It does not exist; neither do its photos, which are counted as missing later.


def _refuse_outside(path: Path, root: Path, name: str, where: str) -> None:
    real = path.resolve()
    if real != root and root not in real.parents:
        raise ValueError(f"{where} names {name!r}, a symbolic link out of {root} (to {real}). {MEND}")
