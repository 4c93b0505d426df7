"""A part of the report: what it is called, how to read it, its HTML and its pictures; or why it is not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from PIL import Image


@dataclass(frozen=True)
class Part:
    """One part of the report.

    Attributes:
        title: its heading.
        note: plain sentences on what to see, and against what to read it.
        body: HTML, already escaped; empty where there is nothing to show.
        pictures: for slides, by the name of their PNG.
        missing: why there is nothing to show; said in the page's last lines.
    """

    title: str
    note: str = ""
    body: str = ""
    pictures: Mapping[str, Image.Image] = field(default_factory=dict)
    missing: str = ""
