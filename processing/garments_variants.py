"""The generated corpus for composed retrieval: each garment drawn in three to five main colours, as triplets.

A photo alone does not tell which colour is wanted, and a text such as "the same but in red" not which garment: what is
wanted stands among red garments and among the same garment in other colours. Source: ours.
"""

import random
from collections.abc import Iterator
from dataclasses import replace

import datasets

from .garments import ATTRIBUTES, BLOCK, SHARD, TOO_ALIKE, Item, make_item
from .garments_draw import draw_view
from .garments_shape import View, shape_of
from .streams import photo_cell
from .variants import colour_variants

VERSION = 1
"""Part of the cache key: raise it with every change that changes a photo."""

FEWEST, MOST = 3, 5  # colours of a garment
PHOTO = datasets.Features(
    {
        "image": datasets.Image(),
        "category": datasets.Value("string"),
        "view": datasets.Value("string"),
        "product_id": datasets.Value("string"),
        "colour": datasets.Value("string"),
    }
)


def make_garment_variants(
    num_garments: int, *, seed: int = 0, image_size: int = 64, cache_dir: str | None = None
) -> datasets.Dataset:
    """Generate triplets of `num_garments` garments, one for each garment and colour as the target.

    Every garment is photographed from the front, once in each of its colours, with another backdrop, light and a
    slightly moved camera; cut, pattern, second colour and all that is sewn on are the same. The reference is the same
    garment in another colour, by chance. Garment i depends on (seed, i) alone, and is none of `make_garments` with the
    same seed.

    Returns:
        Rows as `colour_variants` gives them, with `family_id` = the garment. Raises ValueError for fewer than 1
        garment or photos under 32 pixels. Source: ours.

    >>> make_garment_variants(20)[0]["item_id"]  # doctest: +SKIP
    'garment-000000/brown'
    """
    if num_garments < 1:
        raise ValueError(f"num_garments is {num_garments}; it must be at least 1")
    if image_size < 32:
        raise ValueError(f"image_size is {image_size}; details are lost under 32 pixels")
    photos = datasets.Dataset.from_generator(
        generate_photos,
        features=PHOTO,
        cache_dir=cache_dir,
        gen_kwargs={
            "shards": [(start, min(start + SHARD, num_garments)) for start in range(0, num_garments, SHARD)],
            "seed": seed,
            "image_size": image_size,
            "version": VERSION,
        },
    )
    return colour_variants(photos, product_column="product_id", colour_column="colour", references=1, seed=seed)


def generate_photos(shards: list[tuple[int, int]], seed: int, image_size: int, version: int) -> Iterator[dict]:
    """The photos of the garments in these ranges (`version` is there to be part of the cache key)."""
    for start, stop in shards:
        for number in range(start, stop):
            yield from garment_photos(seed, number, image_size)


def garment_photos(seed: int, number: int, image_size: int) -> Iterator[dict]:
    """One front photo of a garment in each of its colours."""
    item, rng = garment(seed, number), random.Random(f"{seed}/variants/{number}")
    for colour in choose_colours(item.attributes, rng):
        attributes = item.attributes | {"main_colour": colour}
        image, _ = draw_view(
            attributes, shape_of(attributes, item.look), item.look, retaken(item.views[0], rng), image_size
        )
        yield {
            "image": photo_cell(image),
            "category": attributes["category"],
            "view": "front",
            "product_id": f"garment-{number:06d}",
            "colour": colour,
        }


def garment(seed: int, number: int) -> Item:
    """The garment that is recoloured: the first of a block, so no near twin of another; seeds below 0 are for these."""
    return make_item(-1 - seed, number * BLOCK)


def choose_colours(attributes: dict[str, str], rng: random.Random) -> list[str]:
    """Its own main colour and others, no two of which (nor its second colour) look alike.

    >>> choose_colours({"main_colour": "red", "second_colour": "white"}, random.Random(0))[0]
    'red'
    """
    taken, others = [attributes["second_colour"], attributes["main_colour"]], list(ATTRIBUTES["main_colour"])
    rng.shuffle(others)
    wanted = rng.randint(FEWEST, MOST)
    for colour in others:
        if len(taken) <= wanted and colour not in taken and not any({colour, one} in TOO_ALIKE for one in taken):
            taken.append(colour)
    return taken[1:]


def retaken(view: View, rng: random.Random) -> View:
    """The same view in a photo of its own: another backdrop and light, the camera moved a little."""
    return replace(
        view,
        x=view.x + rng.uniform(-0.02, 0.02),
        y=view.y + rng.uniform(-0.02, 0.02),
        scale=view.scale * rng.uniform(0.95, 1.03),
        angle=view.angle + rng.uniform(-0.06, 0.06),
        scenery=rng.getrandbits(48),
    )
