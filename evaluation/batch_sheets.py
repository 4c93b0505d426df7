"""A random and a grouped batch side by side: how alike their pairs are, and which are false negatives.

Training writes what it takes (names of photos, cosines, counts) to grouping.json at the end of a run; photos are read
from the corpus again when the report is made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from . import fragments
from .archive import write_text
from .false_negatives import in_batches
from .figures import beside, enlarge, framed, over
from .parts import Part
from .typeset import FRAME, ORANGE, PAPER, font, paragraph

RECORD = "grouping.json"
TITLE = "A random and a grouped batch"
MOST = 64  # rows of a batch that are kept for the picture
NAMES = {"random": "random batch", "grouped": "grouped batch"}


@dataclass(frozen=True)
class Batch:
    """One batch, or the first `MOST` rows of a larger one, and the means over all batches of its kind.

    Attributes:
        photos: names, as in `protocols.photo_names` of the train split.
        cosines: (B, B), photo i with text j, in hundredths.
        false_negatives: (photo, text) whose text is true of the photo, though of another item; None without truth.
        same_item_pairs: of all batches together.
        hardest: mean over all photos of all batches of the best cosine with another item's text of the batch.
        own: mean cosine of a photo with its own text.
        false_share: share of false negatives among all pairs of different items; None without truth.
        batches: how many there are.
        batch_size: rows of each.
    """

    photos: list[str]
    cosines: list[list[int]]
    false_negatives: list[list[int]] | None
    same_item_pairs: int
    hardest: float
    own: float
    false_share: float | None
    batches: int
    batch_size: int


def describe(
    order: np.ndarray,
    batch_size: int,
    names: Sequence[str],
    item_ids: np.ndarray,
    image_feats: np.ndarray,
    text_feats: np.ndarray,
    truth=None,
) -> Batch:
    """The first batch of an order, and means over all of them.

    Args:
        order: rows, batch after batch; batches are in random order, so the first is any.
        batch_size: B.
        names: (rows,) of the photos.
        item_ids: (rows,).
        image_feats: (rows, P) unit length.
        text_feats: (rows, P) of each row's text.
        truth: see `false_negatives.pair_rates`; None where it is not known.
    """
    hardest, own, same, wrong, other = [], [], 0, 0, 0
    batches = in_batches(order, batch_size)
    for rows in batches:
        cosines = image_feats[rows] @ text_feats[rows].T
        alike = item_ids[rows, None] == item_ids[rows]
        own.append(cosines.diagonal().mean())
        best = np.where(alike, -np.inf, cosines).max(axis=1)
        hardest.append(best[np.isfinite(best)].mean() if np.isfinite(best).any() else np.nan)
        same += int(alike.sum()) - len(rows)
        other += int((~alike).sum())
        wrong += 0 if truth is None else int((truth.text_true_of_photo(rows[:, None], rows[None]) & ~alike).sum())
    rows = batches[0][:MOST]
    alike = item_ids[rows, None] == item_ids[rows]
    false = None if truth is None else np.argwhere(truth.text_true_of_photo(rows[:, None], rows[None]) & ~alike)
    return Batch(
        photos=[str(names[row]) for row in rows],
        cosines=(100 * image_feats[rows] @ text_feats[rows].T).round().astype(int).tolist(),
        false_negatives=None if false is None else false.tolist(),
        same_item_pairs=same,
        hardest=float(np.nanmean(hardest)),
        own=float(np.mean(own)),
        false_share=None if truth is None else wrong / max(1, other),
        batches=len(batches),
        batch_size=batch_size,
    )


def save_batches(run: str | Path, batches: Mapping[str, Batch], used: bool) -> Path:
    """Writes grouping.json; `used` = the run trained on grouped batches."""
    content = {"used": used, "batches": {name: asdict(batch) for name, batch in batches.items()}}
    return write_text(Path(run) / RECORD, json.dumps(content) + "\n")


def read_batches(run: str | Path) -> tuple[dict[str, Batch], bool]:
    """What `save_batches` wrote; ({}, False) where a run has none."""
    path = Path(run) / RECORD
    if not path.exists():
        return {}, False
    content = json.loads(path.read_text(encoding="utf-8"))
    return {name: Batch(**batch) for name, batch in content["batches"].items()}, content["used"]


# --------------------------------------------------------------------------------------------------------- the part


def batch_part(batches: Mapping[str, Batch], photos: Mapping[str, Sequence[Image.Image]], used: bool) -> Part:
    """Contact sheets of both batches and their tables of cosines.

    Args:
        batches: by kind, "random" and "grouped".
        photos: of each batch, in its order.
        used: the run trained on grouped batches.
    """
    note = "Two batches by the final model's features. " + (
        "" if used else "This run itself trained on random batches. "
    )
    note += (
        "The table below each holds the cosine of every photo (rows) with every text (columns): its diagonal are the "
        "right pairs, and the darker the rest, the harder the batch. Grouping wants neighbours, but never two photos "
        "of an item, and no text that is true of another's photo"
    )
    known = any(batch.false_negatives is not None for batch in batches.values())
    note += " (such photos have an orange frame, and such pairs an orange dot)." if known else "."
    cut = next((batch for batch in batches.values() if batch.batch_size > len(batch.photos)), None)
    note += "" if cut is None else f" Shown are the first {len(cut.photos)} of {cut.batch_size} rows."
    figures, sheets = [], []
    for name, batch in batches.items():
        head, told = NAMES[name], "; ".join(f"{what}: {value}" for what, value in facts(batch).items())
        sheet, table = contact_sheet(batch, photos[name]), cosine_table(batch)
        pictures = fragments.image(sheet, f"{head}. {told}", photo=True)
        pictures += fragments.image(table, f"cosines of the {head}", photo=True)
        figures.append(f'<figure class="batch"><b>{escape(head)}</b>{pictures}</figure>')
        heads = [paragraph([(head, "plain")], sheet.width, font(18, bold=True)), sheet]
        sheets.append(over([*heads, paragraph([(told, "plain")], sheet.width, font(14)), table], 10))
    rows = [[what, *(facts(batch)[what] for batch in batches.values())] for what in facts(next(iter(batches.values())))]
    compared = fragments.table(rows, ("over all batches", *(NAMES[name] for name in batches)))
    body = f'{compared}<div class="pair">{"".join(figures)}</div>'
    return Part(TITLE, note, body, {"batches": framed(beside(sheets, 40))})


def facts(batch: Batch) -> dict[str, str]:
    """What to compare, over all batches of the kind."""
    false = "unknown here" if batch.false_share is None else f"{100 * batch.false_share:.2g} %"
    return {
        "mean cosine of a photo with its own text": f"{batch.own:.2f}",
        "with the hardest other text of its batch": f"{batch.hardest:.2f}",
        "pairs of one item": str(batch.same_item_pairs),
        "false negatives among the pairs (a text that is true of another item's photo)": false,
    }


def contact_sheet(batch: Batch, photos: Sequence[Image.Image], side: int = 60) -> Image.Image:
    """All photos as a square; those with a false negative have an orange frame."""
    columns = max(1, round(len(photos) ** 0.5))
    rows = -(-len(photos) // columns)
    marked = {place for pair in batch.false_negatives or [] for place in pair}
    sheet = Image.new("RGB", (columns * (side + 4) - 4, rows * (side + 4) - 4), PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, photo in enumerate(photos):
        x, y = (place % columns) * (side + 4), (place // columns) * (side + 4)
        sheet.paste(enlarge(photo, side), (x, y))
        colour, width = (ORANGE, 4) if place in marked else (FRAME, 1)
        draw.rectangle([x, y, x + side - 1, y + side - 1], outline=colour, width=width)
    return sheet


def cosine_table(batch: Batch, size: int = 508) -> Image.Image:
    """Photos by texts, white = cosine 0 or below, dark = 1; false negatives have an orange dot."""
    cosines = np.clip(np.array(batch.cosines) / 100, 0, 1)
    ink = np.array([255, 255, 255]) - cosines[..., None] ** 1.2 * (np.array([255, 255, 255]) - np.array([14, 52, 96]))
    side = max(1, size // len(cosines))
    table = Image.fromarray(ink.astype(np.uint8)).resize((side * len(cosines),) * 2, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(table)
    for photo, text in batch.false_negatives or []:
        draw.ellipse([text * side + 1, photo * side + 1, (text + 1) * side - 2, (photo + 1) * side - 2], fill=ORANGE)
    draw.rectangle([0, 0, table.width - 1, table.height - 1], outline=FRAME)
    return table
