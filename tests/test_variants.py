"""Triplets of colour variants: generated ones, and those of a corpus that knows product and colour."""

import logging

import datasets
import numpy as np
import pytest
from PIL import Image

from syncmask.processing.corpus import load_corpus
from syncmask.processing.garments import TOO_ALIKE, make_item
from syncmask.processing.garments_draw import draw_view
from syncmask.processing.garments_shape import shape_of
from syncmask.processing.garments_variants import choose_colours, garment, garment_photos, make_garment_variants
from syncmask.processing.readers_fashioniq import TRIPLET
from syncmask.processing.streams import photo_cell
from syncmask.processing.variants import PHRASES, colour_variants, variant_splits


@pytest.fixture(scope="module")
def triplets(tmp_path_factory):
    return make_garment_variants(40, seed=0, image_size=32, cache_dir=str(tmp_path_factory.mktemp("variants")))


def content(photo):
    return np.asarray(photo.convert("RGB")).tobytes()


# ---------------------------------------------------------------------------------------------------------- generated


def test_a_triplet_is_one_garment_in_two_colours(triplets):
    assert {name: triplets.features[name] for name in TRIPLET} == dict(TRIPLET)
    for row in triplets:
        assert row["item_id"] == f"{row['family_id']}/{row['colour']}" and row["colour"] != row["candidate_colour"]
        assert row["candidate_id"] == f"{row['family_id']}/{row['candidate_colour']}"
        assert row["text"] == row["captions"][0] and row["colour"] in row["text"].replace(",", "").split()
        assert row["image"].size == row["candidate"].size == (32, 32)
    assert len(set(triplets["item_id"])) == len(triplets), "every variant is a target once"
    sentences = [
        text.replace(f" {row['colour']}", " {colour}").replace(row["candidate_colour"], "{other}")
        for row in triplets
        for text in row["captions"]
    ]
    assert set(sentences) == set(PHRASES)


def test_photos_belong_to_their_ids(triplets):
    """The photo of an item is the same wherever it stands, and the one that is drawn for it."""
    seen = {}
    for row in triplets:
        for item, photo in ((row["item_id"], row["image"]), (row["candidate_id"], row["candidate"])):
            assert seen.setdefault(item, content(photo)) == content(photo), item
    assert len(set(seen.values())) == len(seen)
    for drawn in garment_photos(0, 7, 32):
        cell = triplets.cast_column("image", datasets.Image(decode=False))
        (row,) = [n for n, item in enumerate(triplets["item_id"]) if item == f"garment-000007/{drawn['colour']}"]
        assert cell[row]["image"]["bytes"] == drawn["image"]["bytes"]


def test_a_garment_has_three_to_five_colours_that_cannot_be_confused(triplets):
    colours = {}
    for row in triplets:
        colours.setdefault(row["family_id"], []).append(row["colour"])
    assert len(colours) == 40 and {len(some) for some in colours.values()} == {3, 4, 5}
    for name, some in colours.items():
        attributes = garment(0, int(name.split("-")[1])).attributes
        assert some[0] == attributes["main_colour"] and attributes["second_colour"] not in some
        every = [*some, attributes["second_colour"]]
        assert not any({one, other} in TOO_ALIKE for one in every for other in every if one != other), (name, every)


def test_nothing_but_the_main_colour_changes(monkeypatch):
    """Where the same photo is taken of two colours, only the main colour and its shades differ."""
    monkeypatch.setattr("syncmask.processing.garments_variants.retaken", lambda view, rng: view)
    item, colours = garment(3, 5), {}
    for row in garment_photos(3, 5, 64):
        colours[row["colour"]] = row["image"]["bytes"]
    first, other = list(colours)[:2]
    for colour in (first, other):
        attributes = item.attributes | {"main_colour": colour}
        image, _ = draw_view(attributes, shape_of(item.attributes, item.look), item.look, item.views[0], 64)
        assert photo_cell(image)["bytes"] == colours[colour]


def test_garments_follow_from_seed_and_number_alone(triplets, tmp_path):
    fewer = make_garment_variants(9, seed=0, image_size=32, cache_dir=str(tmp_path))
    first = triplets.select(range(len(fewer)))
    for name in ("item_id", "candidate_id", "text"):
        assert fewer[name][:] == first[name][:]
    assert [content(photo) for photo in fewer["candidate"]] == [content(photo) for photo in first["candidate"]]
    other = make_garment_variants(9, seed=1, image_size=32, cache_dir=str(tmp_path))
    assert other["text"][:] != fewer["text"][:]
    # None of them is a garment of the corpus that a model is pretrained on, nor a near twin of another.
    assert all(garment(0, n).attributes != make_item(0, n * 12).attributes for n in range(20))
    assert len({tuple(garment(0, n).attributes.items()) for n in range(40)}) == 40


def test_colours_are_chosen_by_chance():
    import random

    chosen = [choose_colours({"main_colour": "green", "second_colour": "white"}, random.Random(n)) for n in range(200)]
    assert {len(some) for some in chosen} == {3, 4} and all(some[0] == "green" for some in chosen)
    assert {colour for some in chosen for colour in some} == {
        *("green", "red", "orange", "blue", "purple", "brown", "black")
    }


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="at least 1"):
        make_garment_variants(0)
    with pytest.raises(ValueError, match="under 32"):
        make_garment_variants(1, image_size=16)


def test_as_a_corpus_the_splits_keep_garments_whole():
    corpus = load_corpus("garment-variants", num_items=40, image_size=32, seed=0)
    families = [set(rows["family_id"]) for rows in corpus.values()]
    assert sum(map(len, families)) == 40 and all(families), "a garment in two splits"
    for rows in corpus.values():
        assert rows.column_names[:3] == ["image", "text", "item_id"]
    more = load_corpus("garment-variants", num_items=60, image_size=32, seed=0)
    assert families[2] <= set(more["test"]["family_id"]), "more garments move none"


# ------------------------------------------------------------------------------------------------------ from a corpus


def shop(rows, folder):
    """Photos of products: (product, colour, view) a row, all different."""
    paths = []
    for number in range(len(rows)):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
        paths.append(str(folder / f"{number}.png"))
    columns = dict(zip(("sku", "color", "view"), map(list, zip(*rows))))
    columns |= {"image": paths, "text": ["text"] * len(rows), "item_id": [f"item{n}" for n in range(len(rows))]}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


ROWS = [
    ("a", "Red", "front"),
    ("a", "Dark  Blue", "front"),
    ("a", "Red", "back"),
    ("a", "Green", "front"),
    ("a", "red", "front"),  # a second front photo of the red one
    ("b", "Red", "front"),
    ("b", None, "front"),
    ("b", "Blue", None),
    ("b", "Green", None),
    ("c", "Red", "front"),
    ("c", "Blue", "back"),
]


def test_pairs_are_of_one_product_and_view(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        found = colour_variants(shop(ROWS, tmp_path), product_column="sku")
    assert "left out 1 of 11 rows" in caplog.text
    pairs = {(row["candidate_id"], row["item_id"], row["view"]) for row in found}
    front = ["a/red", "a/dark blue", "a/green"]
    wanted = {(one, other, "front") for one in front for other in front if one != other}
    assert pairs == wanted | {("b/blue", "b/green", None), ("b/green", "b/blue", None)} and len(found) == len(pairs)
    photo = {"a/red": 0, "a/dark blue": 1, "a/green": 3, "b/blue": 7, "b/green": 8}
    for row in found:
        assert row["image"].getpixel((0, 0))[0] == photo[row["item_id"]]
        assert row["candidate"].getpixel((0, 0))[0] == photo[row["candidate_id"]]
        assert row["colour"] in row["text"] and row["family_id"] == row["item_id"].split("/")[0]


def test_triplets_follow_from_their_own_product_alone(tmp_path):
    rows = shop(ROWS, tmp_path)
    order = [8, 5, 3, 1, 0, 10, 9, 7, 6, 2]  # row 4 is away: it was a second photo
    one, other = (colour_variants(table, product_column="sku", seed=3) for table in (rows, rows.select(order)))

    def captions(found):
        return {(row["candidate_id"], row["item_id"]): row["text"] for row in found}

    assert captions(one) == captions(other)
    assert captions(one) != captions(colour_variants(rows, product_column="sku", seed=4))
    single = colour_variants(rows, product_column="sku", references=1, seed=3)
    again = colour_variants(rows.select(order), product_column="sku", references=1, seed=3)
    assert captions(single) == captions(again) and captions(single).items() <= captions(one).items()
    assert sorted(single["item_id"]) == ["a/dark blue", "a/green", "a/red", "b/blue", "b/green"]


def test_photos_are_not_opened(tmp_path):
    rows = shop(ROWS, tmp_path)
    for file in tmp_path.iterdir():
        file.write_bytes(b"broken")
    assert len(colour_variants(rows, product_column="sku")) == 8


def test_a_product_stays_in_one_split(tmp_path, caplog):
    rows = shop(ROWS, tmp_path)
    with caplog.at_level(logging.WARNING):
        found = variant_splits({"train": rows, "test": rows.select([7, 8])}, "sku, color", 0)
    assert list(found) == ["train", "test"] and "left out 2 triplets" in caplog.text
    assert set(found["train"]["family_id"]) == {"a"} and set(found["test"]["family_id"]) == {"b"}


def test_as_a_keyword_of_load_corpus(tmp_path):
    (tmp_path / "photos").mkdir()
    products = [(f"p{n:02d}", colour, "front") for n in range(30) for colour in ("red", "blue", "green")]
    shop(products, tmp_path / "photos").save_to_disk(tmp_path / "shop")
    corpus = load_corpus(tmp_path / "shop", variants="sku,color")
    families = [set(rows["family_id"]) for rows in corpus.values()]
    assert sum(map(len, families)) == 30 and all(families)
    assert sum(map(len, corpus.values())) == 180
    with pytest.raises(ValueError, match="wanted PRODUCT_COLUMN,COLOUR_COLUMN"):
        load_corpus(tmp_path / "shop", variants="sku")
    with pytest.raises(ValueError, match="need the column 'colour'; the corpus has"):
        load_corpus(tmp_path / "shop", variants="sku,colour")
    with pytest.raises(ValueError, match="has two colours"):
        load_corpus(tmp_path / "shop", variants="item_id,color")


def test_real_products(real_data):
    corpus = load_corpus(real_data / "luma", variants="product_id,color")
    assert {name: len(rows) for name, rows in corpus.items()} == {"train": 588, "validation": 84, "test": 156}
    assert corpus["test"][0]["image"].size[1] > 100 and len(set(corpus["test"]["item_id"])) == 78
