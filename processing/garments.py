"""The generated corpus: garments in 2-4 photos under one text, and the truth of which word is seen in which photo.

No photo shows all that its item's text says, as in a shop: prints on the back, closures in front, texts about washing.
Items come in families of near twins, so that other items' texts are sometimes true of a photo (false negatives).
Item i depends on (seed, i) alone and its family on (seed, family): more items never change those before. Source: ours.
"""

import io
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import datasets
import numpy as np
from PIL import Image

from .garments_draw import draw_view
from .garments_shape import WITH_BELT, WITH_HEM, WITH_NECKLINE, WITH_SLEEVES, Look, Shape, View, places, shape_of
from .garments_text import write_text
from .processing_syncmask import split_words

VERSION = 5
"""Part of the cache key: raise it with every change that changes a photo, a text or the truth."""

ATTRIBUTES: dict[str, dict[str, int]] = {
    "category": dict.fromkeys(
        ("tee", "dress", "hoodie", "jacket", "coat", "skirt", "pants", "shorts", "jumpsuit", "poncho"), 1
    ),
    "main_colour": dict.fromkeys(
        ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"), 1
    ),
    "second_colour": dict.fromkeys(
        ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"), 1
    ),
    "pattern": {"plain": 4, "striped": 2, "dotted": 2, "checked": 2, "zigzag": 2},
    "sleeve": {"none": 0, "sleeveless": 2, "short": 2, "long": 4, "puff": 2, "bell": 2},
    "neckline": {"none": 0, "round": 1, "v-neck": 1, "square": 1, "turtleneck": 1, "collar": 1},
    "closure": {"none": 3, "zip": 2, "buttons": 2, "laces": 2},
    "pocket": {"none": 3, "patch": 2, "flap": 2, "round": 2},
    "front_print": {"none": 4, "star": 2, "heart": 2, "moon": 2, "flower": 2, "bolt": 2},
    "back_print": {"none": 3, "wings": 2, "crown": 2, "tree": 2, "sun": 2},
    "hem": {"none": 0, "straight": 1, "ruffled": 1, "fringed": 1, "jagged": 1},
    "cuff": {"none": 0, "ribbed": 1, "fur": 1, "folded": 1},
    "belt": {"none": 2, "leather": 2, "sash": 2, "chain": 2},
    "texture": {"smooth": 3, "quilted": 2, "pleated": 2, "fluffy": 2},
}
"""Attribute -> its values and how often they are drawn. "none": nothing there, or no place for it (skirts: sleeve)."""

TOO_ALIKE = ({"red", "orange"}, {"yellow", "white"}, {"brown", "black"}, {"blue", "purple"}, {"pink", "white"})
FAMILY_SIZES = ((2, 4, 6), (3, 4, 5), (2, 5, 5), (6, 6), (2, 3, 3, 4), (2, 2, 2, 6))
BLOCK = 12  # items whose families are dealt out together: every entry above sums to it
EQUAL_TEXT_SHARE = 0.03  # of families: one text for all their items
SHARD = 8 * BLOCK  # items that one worker generates at a time

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "text": datasets.Value("string"),
        "item_id": datasets.Value("string"),
        "view": datasets.Value("string"),
        "category": datasets.Value("string"),
        "words": datasets.List(datasets.Value("string")),
        "visible": datasets.List(datasets.Value("bool")),
        "regions": datasets.List(datasets.List(datasets.Value("float32"))),
        "attributes": {name: datasets.Value("string") for name in ATTRIBUTES},
        "revealed": datasets.List(datasets.Value("string")),
        "claimed": datasets.List(datasets.Value("string")),
    }
)


def make_garments(
    num_items: int, *, seed: int = 0, image_size: int = 64, num_proc: int | None = None, cache_dir: str | None = None
) -> datasets.Dataset:
    """Generate the photos of `num_items` garments, or read them from the cache; rows are photos, sorted by item.

    Columns: image, text, item_id, view (front, back, detail, front_shifted, back_shifted), category, then the truth:
    words, and per word `visible` (what it names is seen in this photo) and `regions` ([x0, y0, x1, y1] in pixels, []
    where not visible; an attribute seen in two places, as sleeves are, deals them out to its words in turn),
    attributes, `revealed` (attributes whose value this photo shows), `claimed` (attributes that the text names).
    Raises ValueError for fewer than 1 item or photos under 32 pixels. Source: ours.

    >>> make_garments(3000, num_proc=2)[0]["item_id"]  # doctest: +SKIP
    'garment-000000'
    """
    if num_items < 1:
        raise ValueError(f"num_items is {num_items}; it must be at least 1")
    if image_size < 32:
        raise ValueError(f"image_size is {image_size}; details are lost under 32 pixels")
    shards = [(start, min(start + SHARD, num_items)) for start in range(0, num_items, SHARD)]
    processes = min(num_proc or 1, len(shards))
    return datasets.Dataset.from_generator(
        generate_rows,
        features=FEATURES,
        cache_dir=cache_dir,
        gen_kwargs={"shards": shards, "seed": seed, "image_size": image_size, "version": VERSION},
        num_proc=processes if processes > 1 else None,
    )


def generate_rows(shards: list[tuple[int, int]], seed: int, image_size: int, version: int) -> Iterator[dict]:
    """The rows of the items in these ranges (`version` is there to be part of the cache key)."""
    for start, stop in shards:
        for index in range(start, stop):
            yield from item_rows(make_item(seed, index), image_size)


# ---------------------------------------------------------------- items


@dataclass(frozen=True)
class Item:
    """One garment: its attributes, its text with the attribute that each word names, and how it is photographed."""

    index: int
    attributes: dict[str, str]
    text: str
    named: list[str | None]
    look: Look
    views: list[View]


def make_item(seed: int, index: int) -> Item:
    """Item `index` of the corpus `seed`; independent of all other items but its family."""
    rng = random.Random(f"{seed}/item/{index}")
    first, members = family_of(seed, index)
    family = random.Random(f"{seed}/family/{first}")
    base = {name: _draw(values, family) for name, values in ATTRIBUTES.items()}
    varied = _varied_attributes(base, family)
    attributes = _applicable(_vary(base, varied, index - first))
    differing = _differing(base, varied, members)
    equal_text = family.random() < EQUAL_TEXT_SHARE and not differing >= {"main_colour", "second_colour"}
    text_rng = random.Random(f"{seed}/text/{first}") if equal_text else rng
    claims = choose_claims(attributes, text_rng, without=differing if equal_text else ())
    text, named = write_text(attributes, claims, text_rng)
    look = _look(rng)
    return Item(index, attributes, text, named, look, choose_views(attributes, shape_of(attributes, look), look, rng))


def family_of(seed: int, index: int) -> tuple[int, int]:
    """The first item and the number of items of this item's family.

    >>> first, members = family_of(0, 17)
    >>> first <= 17 < first + members
    True
    """
    start = index - index % BLOCK
    for members in random.Random(f"{seed}/block/{index // BLOCK}").choice(FAMILY_SIZES):
        if index < start + members:
            return start, members
        start += members
    raise AssertionError("family sizes do not fill a block")


def _draw(values: dict[str, int], rng: random.Random) -> str:
    return rng.choices(list(values), list(values.values()))[0]


def _varied_attributes(base: dict[str, str], family: random.Random) -> list[str]:
    """One or two attributes in which the members of a family differ, among those that this garment has."""
    possible = [name for name, value in _applicable(base).items() if ATTRIBUTES[name].get(value) and name != "category"]
    return family.sample(possible, family.choice((1, 2, 2)))


def _vary(base: dict[str, str], varied: list[str], member: int) -> dict[str, str]:
    """Member 0 is the base; the others step through the values of the varied attributes at different paces."""
    attributes = dict(base)
    for pace, name in enumerate(varied):
        values = [value for value, weight in ATTRIBUTES[name].items() if weight]
        step = member if pace == 0 else (member + 1) // 2
        attributes[name] = values[(values.index(base[name]) + step) % len(values)]
    return attributes


def _differing(base: dict[str, str], varied: list[str], members: int) -> set[str]:
    """Attributes that are not the same in all members of a family, once none is where it cannot be."""
    family = [_applicable(_vary(base, varied, member)) for member in range(members)]
    return {name for name in ATTRIBUTES if len({attributes[name] for attributes in family}) > 1}


def _applicable(attributes: dict[str, str]) -> dict[str, str]:
    """The attributes with "none" where the category has no place for them, and with two distinct colours."""
    attributes, category = dict(attributes), attributes["category"]
    for name, wearers in (
        ("sleeve", WITH_SLEEVES),
        ("neckline", WITH_NECKLINE),
        ("hem", WITH_HEM),
        ("belt", WITH_BELT),
    ):
        if category not in wearers:
            attributes[name] = "none"
    if attributes["sleeve"] != "long":
        attributes["cuff"] = "none"
    colours, main = list(COLOUR_NAMES), attributes["main_colour"]
    while attributes["second_colour"] == main or {main, attributes["second_colour"]} in TOO_ALIKE:
        attributes["second_colour"] = colours[(colours.index(attributes["second_colour"]) + 3) % len(colours)]
    return attributes


COLOUR_NAMES = tuple(ATTRIBUTES["main_colour"])


def _look(rng: random.Random) -> Look:
    shade = tuple(rng.randint(-9, 9) for _ in range(6))
    return Look(rng.uniform(0.93, 1.07), rng.uniform(0.94, 1.06), rng.uniform(0.3, 0.62), shade)


def choose_claims(attributes: dict[str, str], rng: random.Random, without=()) -> set[str]:
    """Which 6-8 attributes the text names: the category, a colour, then any that have a value; none of `without`."""
    colours = [name for name in ("main_colour", "second_colour") if name not in without]
    claims = {"category", colours[0] if rng.random() < 0.85 else colours[-1]}
    unwanted = {*without, *claims, *(["pattern"] if rng.random() < 0.4 else [])}
    others = [name for name, value in attributes.items() if value != "none" and name not in unwanted]
    return claims | set(rng.sample(others, min(len(others), rng.randint(4, 6))))


# ---------------------------------------------------------------- views


def choose_views(attributes: dict[str, str], shape: Shape, look: Look, rng: random.Random) -> list[View]:
    """2-4 photos: a front first, then backs, details and more fronts."""
    names = [rng.choice(("front", "front_shifted"))]
    more = [rng.choice(("back", "back_shifted")), "detail", rng.choice(("front_shifted", "back_shifted", "detail"))]
    if rng.random() < 0.3:
        more[0], more[1] = more[1], more[0]
    names += more[: rng.choice((1, 2, 2, 3))]
    return [_view(name, attributes, shape, look, rng) for name in names]


def _view(name: str, attributes: dict[str, str], shape: Shape, look: Look, rng: random.Random) -> View:
    if name == "detail":
        return _detail(attributes, shape, look, rng)
    x0, y0, x1, y1 = shape.extent
    width, height = (x1 - x0) * look.width, (y1 - y0) * look.length
    shifted = name.endswith("_shifted")
    fill = rng.uniform(0.5, 0.85) if shifted else rng.uniform(0.86, 0.95)
    angle = math.radians(rng.uniform(-12, 12) if shifted else rng.uniform(-4, 4))
    scale = fill / max(width, height)
    centre = []
    for size in (width * scale, height * scale):
        slack = max(0.0, 1 - size) / 2
        centre.append(0.5 + rng.uniform(-slack, slack) * (1 if shifted else 0.4))
    return _aimed(name, name.split("_")[0], (x0 + x1) / 2, (y0 + y1) / 2, centre, scale, angle, look, rng)


def _detail(attributes: dict[str, str], shape: Shape, look: Look, rng: random.Random) -> View:
    """A close-up of one thing that this garment has."""
    side = rng.choice(("front", "front", "front", "back"))
    found = [outlines for name, outlines in places(attributes, shape, side).items() if attributes[name] != "none"]
    outlines = rng.choice(found or list(places(attributes, shape, side).values()))
    xs, ys = zip(*rng.choice(outlines))
    longest = max(max(xs) - min(xs), max(ys) - min(ys))
    scale = min(1.0, max(0.72, rng.uniform(0.45, 0.7) / longest))
    centre = [rng.uniform(0.42, 0.58), rng.uniform(0.42, 0.58)]
    angle = math.radians(rng.uniform(-10, 10))
    x, y = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
    return _aimed("detail", side, x, y, centre, scale, angle, look, rng)


def _aimed(name, side, x, y, centre, scale, angle, look: Look, rng: random.Random) -> View:
    """The view in which the garment's point (x, y) lies at `centre` of the frame."""
    x, y, cos, sin = x * look.width * scale, y * look.length * scale, math.cos(angle), math.sin(angle)
    shift = centre[0] - (cos * x - sin * y), centre[1] - (sin * x + cos * y)
    return View(name, side, *shift, scale, angle, rng.getrandbits(48))


# ---------------------------------------------------------------- rows


def item_rows(item: Item, image_size: int) -> Iterator[dict]:
    """The rows of one item, a photo each."""
    words = [item.text[start:end].lower() for start, end in split_words(item.text)]
    shape = shape_of(item.attributes, item.look)
    claimed = [name for name in ATTRIBUTES if name in item.named]
    for view in item.views:
        image, seen = draw_view(item.attributes, shape, item.look, view, image_size)
        regions = word_regions(item.named, seen)
        yield {
            "image": {"bytes": _png(image), "path": None},
            "text": item.text,
            "item_id": f"garment-{item.index:06d}",
            "view": view.name,
            "category": item.attributes["category"],
            "words": words,
            "visible": [bool(region) for region in regions],
            "regions": regions,
            "attributes": item.attributes,
            "revealed": revealed_by(item.attributes, seen),
            "claimed": claimed,
        }


def word_regions(named: list[str | None], seen: dict[str, list[list[float]]]) -> list[list[float]]:
    """Per word the box of what it names, [] where that is not seen; an attribute's boxes go to its words in turn."""
    used: dict[str, int] = {}
    regions = []
    for attribute in named:
        boxes = seen.get(attribute, [[]])
        turn = used.get(attribute, 0)
        used[attribute] = turn + 1
        regions.append(boxes[turn % len(boxes)])
    return regions


def revealed_by(attributes: dict[str, str], seen: dict[str, list]) -> list[str]:
    """The attributes whose value a photo shows: those seen, and the lack of what this garment has no place for."""
    lacking = set()
    if "category" in seen:
        lacking = {name for name in ("sleeve", "neckline", "hem", "belt") if attributes[name] == "none"}
    if attributes["cuff"] == "none" and ("sleeve" in seen or "sleeve" in lacking):
        lacking.add("cuff")
    return [name for name in ATTRIBUTES if name in seen or name in lacking]


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


# ---------------------------------------------------------------- truth


@dataclass(frozen=True)
class GarmentTruth:
    """What photos show and texts say, as arrays over the rows of a generated corpus.

    values (rows, A) int16: the item's value of each attribute, counted in ATTRIBUTES; revealed, claimed (rows, A) bool.
    """

    values: np.ndarray
    revealed: np.ndarray
    claimed: np.ndarray

    @classmethod
    def from_dataset(cls, dataset: datasets.Dataset) -> "GarmentTruth":
        """Read the truth columns (images are not touched); ValueError for a corpus that has none."""
        missing = {"attributes", "revealed", "claimed"} - set(dataset.column_names)
        if missing:
            raise ValueError(f"the corpus lacks {sorted(missing)}; only make_garments() writes ground truth")
        columns = dataset.select_columns(["attributes", "revealed", "claimed"]).with_format(None)[:]
        code = {name: {value: k for k, value in enumerate(values)} for name, values in ATTRIBUTES.items()}
        values = [[code[name][row[name]] for name in ATTRIBUTES] for row in columns["attributes"]]
        shape = (len(dataset), len(ATTRIBUTES))
        flags = [
            np.array([[n in row for n in ATTRIBUTES] for row in columns[c]], bool) for c in ("revealed", "claimed")
        ]
        return cls(np.array(values, np.int16).reshape(shape), flags[0].reshape(shape), flags[1].reshape(shape))

    def text_true_of_photo(self, photo_rows, text_rows) -> np.ndarray:
        """True where no attribute that the photo reveals contradicts the value that the text claims.

        Row numbers (ints or integer arrays) are broadcast against each other. A false negative is another item's text
        that is true of a photo.

        >>> truth.text_true_of_photo(rows[:, None], rows[None, :])  # doctest: +SKIP
        """
        photos, texts = np.broadcast_arrays(np.asarray(photo_rows), np.asarray(text_rows))
        true = np.ones(photos.shape, bool)
        for a in range(self.values.shape[1]):
            spoken = self.revealed[photos, a] & self.claimed[texts, a]
            true &= ~(spoken & (self.values[photos, a] != self.values[texts, a]))
        return true
