"""Triplets from colour variants: a photo, "the same but in red", and the photo of the same product in red.

For any corpus that knows each photo's product and colour. Rows are in FashionIQ's shape.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator

import datasets

from .readers_fashioniq import TRIPLET, join_captions

logger = logging.getLogger(__name__)

FAMILY = "family_id"
"""The column by which a corpus is split where it has one: items of one family never straddle splits."""

VARIANT = datasets.Features(
    TRIPLET | {name: datasets.Value("string") for name in (FAMILY, "view", "colour", "candidate_colour")}
)
PHRASES = (
    "the same but in {colour}",
    "is {colour} instead",
    "in {colour} instead of {other}",
    "make it {colour}",
    "is {colour}, not {other}",
    "exactly this one in {colour}",
    "the {colour} version of this",
    "looks the same, only the colour is {colour}",
)


def colour_variants(
    dataset: datasets.Dataset,
    *,
    product_column: str = "product_id",
    colour_column: str = "color",
    references: int | None = None,
    seed: int = 0,
) -> datasets.Dataset:
    """Pair the photos of one product and view in different colours, with a sentence that asks for the target's.

    An item here is a product in a colour, whatever the corpus calls an item. Of an item's photos of one view the first
    is taken. Rows without product or colour are left out and counted in a warning. Photos are not opened.

    Args:
        dataset: rows with `image`, product and colour; `view` and `category` are used where they are there (rows
            without a view pair with each other).
        product_column, colour_column: what the corpus calls them.
        references: at most so many reference photos a target, drawn by the seed; None = all others.
        seed: of references and sentences. A triplet's depends on its own product, view and colours alone.

    Returns:
        image and item_id ("product/colour") of the target, candidate and candidate_id of the reference, captions (one),
        text (the same), category, family_id (the product), view, colour, candidate_colour; in the order of targets.

    Raises:
        ValueError: no such column.

    Example:
        >>> colour_variants(luma, product_column="product_id", colour_column="color")[0]["text"]  # doctest: +SKIP
        'the same but in black'
    """
    for column in (product_column, colour_column):
        if column not in dataset.column_names:
            raise ValueError(
                f"colour variants need the column {column!r}; the corpus has {', '.join(dataset.column_names)}. "
                "Name the columns of product and colour."
            )
    photos = _photos(dataset, product_column, colour_column)
    pairs = list(_pairs(photos, references, seed))
    if not pairs:
        return datasets.Dataset.from_dict({name: [] for name in VARIANT}, features=VARIANT)
    categories = dataset["category"][:] if "category" in dataset.column_names else [None] * len(dataset)
    about = [_row(*pair, seed) | {"category": categories[photos[pair[0]]]} for pair in pairs]
    named = {name: kind for name, kind in VARIANT.items() if name not in ("image", "candidate")}
    columns = datasets.Dataset.from_dict(
        {name: [row[name] for row in about] for name in named}, features=datasets.Features(named)
    )
    images = dataset.with_format(None).select_columns(["image"]).cast_column("image", datasets.Image())
    targets = images.select([photos[target] for target, _ in pairs])
    shown = images.select([photos[reference] for _, reference in pairs]).rename_column("image", "candidate")
    return datasets.concatenate_datasets([targets, shown, columns], axis=1).select_columns(list(VARIANT))


Variant = tuple[str, str, str]
"""Product, view, colour."""


def _photos(dataset: datasets.Dataset, product_column: str, colour_column: str) -> dict[Variant, int]:
    """The row of each product, view and colour."""
    names = [product_column, colour_column, *(["view"] if "view" in dataset.column_names else [])]
    columns = dataset.with_format(None).select_columns(names)[:]
    views = columns.get("view", [None] * len(dataset))
    photos: dict[Variant, int] = {}
    unknown = 0
    for row, (product, colour, view) in enumerate(zip(columns[product_column], columns[colour_column], views)):
        product, colour = (" ".join(str("" if value is None else value).split()) for value in (product, colour))
        if product and colour:
            photos.setdefault((product, view or "", colour.lower()), row)
        unknown += not (product and colour)
    if unknown:
        logger.warning("colour variants: left out %d of %d rows without product or colour", unknown, len(dataset))
    return photos


def _pairs(photos: dict[Variant, int], references: int | None, seed: int) -> Iterator[tuple[Variant, Variant]]:
    """(target, reference) of one product and view."""
    groups: dict[tuple[str, str], list[Variant]] = {}
    for variant in photos:
        groups.setdefault(variant[:2], []).append(variant)
    for variants in groups.values():
        for target in variants:
            # Sorted, so that the order of a corpus's rows changes no triplet.
            others = sorted(variant for variant in variants if variant != target)
            if references is not None and references < len(others):
                others = random.Random(f"{seed}/references/{target}").sample(others, references)
            yield from ((target, other) for other in others)


def _row(target: Variant, reference: Variant, seed: int) -> dict:
    product, view, colour = target
    rng = random.Random(f"{seed}/caption/{target}/{reference}")
    caption = rng.choice(PHRASES).format(colour=colour, other=reference[2])
    return {
        "text": join_captions([caption]),
        "item_id": f"{product}/{colour}",
        "candidate_id": f"{product}/{reference[2]}",
        "captions": [caption],
        FAMILY: product,
        "view": view or None,
        "colour": colour,
        "candidate_colour": reference[2],
    }


def variant_splits(tables: dict[str, datasets.Dataset], columns: str, seed: int) -> dict[str, datasets.Dataset]:
    """`colour_variants` of every split; a product that several splits hold stays in the last of them alone.

    Args:
        tables: rows by split.
        columns: "PRODUCT_COLUMN,COLOUR_COLUMN".
        seed: see `colour_variants`.

    Raises:
        ValueError: `columns` is not two names, or one is missing.
    """
    names = [name.strip() for name in columns.split(",")]
    if len(names) != 2 or not all(names):
        raise ValueError(f"variants is {columns!r}; wanted PRODUCT_COLUMN,COLOUR_COLUMN, such as 'product_id,color'.")
    found, later = {}, set()
    for split in reversed(tables):
        rows = colour_variants(tables[split], product_column=names[0], colour_column=names[1], seed=seed)
        products = rows[FAMILY][:]
        apart = [row for row, product in enumerate(products) if product not in later]
        if len(apart) < len(rows):
            logger.warning("split %s: left out %d triplets of products of another split", split, len(rows) - len(apart))
        found[split] = rows if len(apart) == len(rows) else rows.select(apart)
        later |= set(products)
    return {split: found[split] for split in tables}
