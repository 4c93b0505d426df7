"""Whose photos the pictures of a report show: who publishes a picture must know, and a picture does not tell."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from .archive import write_text

NOTE = "photos_of.json"


def note_photos(report: Path, source: str) -> None:
    """Note beside the pictures of a report what kind of source their photos come from.

    Args:
        report: the folder of the pictures. source: see `syncmask.processing.corpus.source_kind`.
    """
    pictures = {picture.name: _sha256(picture) for picture in sorted(report.glob("*.png"))}
    note = {"source": source, "pictures": pictures}
    write_text(report / NOTE, json.dumps(note, indent=1) + "\n")


def photo_source(picture: Path) -> str:
    """What was noted of a picture; "unknown" where nothing was, or of another picture of that name."""
    note = picture.with_name(NOTE)
    if not note.is_file():
        return "unknown"
    content = json.loads(note.read_text(encoding="utf-8"))
    return content["source"] if content["pictures"].get(picture.name) == _sha256(picture) else "unknown"


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
