"""A picture of some items of a corpus: what a person looks at before anything else."""

from __future__ import annotations

import textwrap

import datasets
from PIL import Image, ImageDraw

from .processing_syncmask import to_rgb


def contact_sheet(rows: datasets.Dataset, num_items: int = 12, side: int = 128) -> Image.Image:
    """One line an item: its text, then its photos, `side` pixels each; the first `num_items` of the rows."""
    photos: dict[str, list[int]] = {}
    for row, item in enumerate(rows["item_id"]):
        photos.setdefault(item, []).append(row)
    items = list(photos.values())[:num_items]
    text_width = 3 * side
    sheet = Image.new("RGB", (text_width + max(map(len, items)) * side, len(items) * side), "white")
    draw = ImageDraw.Draw(sheet)
    for line, members in enumerate(items):
        text = textwrap.fill(rows[members[0]]["text"], text_width // 7)
        draw.multiline_text((6, line * side + 6), text, fill="black")
        for column, row in enumerate(members):
            photo = to_rgb(rows[row]["image"]).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(photo, (text_width + column * side, line * side))
    return sheet
