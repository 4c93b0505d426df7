"""The generated corpus: determinism, the truth of words, regions and pairs, and that pictures obey attributes."""

import dataclasses
import io
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from syncmask.processing import garments
from syncmask.processing.garments import (
    ATTRIBUTES,
    GarmentTruth,
    family_of,
    item_rows,
    make_garments,
    make_item,
)
from syncmask.processing.garments_draw import draw_view
from syncmask.processing.garments_shape import Look, View, shape_of
from syncmask.processing.garments_text import CATEGORY_WORDS, COLOUR_WORDS, PHRASES, write_text
from syncmask.processing.processing_syncmask import split_words

COUNT = 200


@pytest.fixture(scope="module")
def rows():
    """(row, attribute that each word names) of 200 items."""
    return [(row, item.named) for item in map(lambda i: make_item(3, i), range(COUNT)) for row in item_rows(item, 64)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_garments(COUNT, seed=3, cache_dir=str(tmp_path_factory.mktemp("garments")))


def _plain(dataset):
    return dataset.cast_column("image", garments.datasets.Image(decode=False))[:]


# ---------------------------------------------------------------- one result, however it is made


def test_the_number_of_processes_changes_nothing(dataset, tmp_path):
    parallel = make_garments(COUNT, seed=3, num_proc=2, cache_dir=str(tmp_path))
    assert _plain(parallel) == _plain(dataset)


def test_second_call_reads_the_cache_and_a_new_version_does_not(tmp_path, monkeypatch):
    first = make_garments(3, cache_dir=str(tmp_path))
    monkeypatch.setattr(garments, "item_rows", lambda *_: pytest.fail("generated again"))
    assert make_garments(3, cache_dir=str(tmp_path)).cache_files == first.cache_files
    monkeypatch.undo()
    for change in ({"seed": 1}, {"image_size": 48}):
        assert make_garments(3, cache_dir=str(tmp_path), **change).cache_files != first.cache_files
    monkeypatch.setattr(garments, "VERSION", garments.VERSION + 1)
    assert make_garments(3, cache_dir=str(tmp_path)).cache_files != first.cache_files


def test_more_items_never_change_those_before(dataset, tmp_path):
    few = _plain(make_garments(17, seed=3, cache_dir=str(tmp_path)))
    many = _plain(dataset)
    for column, values in few.items():
        assert values == many[column][: len(values)], column
    assert few["text"] != _plain(make_garments(17, seed=4, cache_dir=str(tmp_path)))["text"]


def test_schema(dataset):
    assert dataset.column_names == (
        "image text item_id view category words visible regions attributes revealed claimed".split()
    )
    photo = dataset[0]["image"]
    assert photo.size == (64, 64) and photo.mode == "RGB" and dataset[0]["item_id"] == "garment-000000"
    assert dataset["item_id"] == sorted(dataset["item_id"])


@pytest.mark.parametrize("wrong", [{"num_items": 0}, {"num_items": 5, "image_size": 16}])
def test_refuses_what_it_cannot_make(wrong):
    with pytest.raises(ValueError, match="must be|under 32"):
        make_garments(**wrong)


# ---------------------------------------------------------------- words and regions


def test_words_are_those_of_split_words(rows):
    for row, named in rows:
        assert row["words"] == [row["text"][a:b].lower() for a, b in split_words(row["text"])]
        assert len(row["words"]) == len(row["visible"]) == len(row["regions"]) == len(named)
        assert 18 <= len(row["words"]) <= 32


def test_a_word_is_visible_where_its_attribute_is_revealed(rows):
    for row, named in rows:
        assert set(row["claimed"]) == set(named) - {None}
        assert "category" in row["claimed"] and {"main_colour", "second_colour"} & set(row["claimed"])
        for visible, attribute in zip(row["visible"], named):
            assert visible == (attribute is not None and attribute in row["revealed"])
        assert all(row["attributes"][name] != "none" for name in row["claimed"])


def test_regions_are_boxes_inside_the_frame(rows):
    for row, _ in rows:
        for visible, box in zip(row["visible"], row["regions"]):
            assert bool(box) == visible
            if box:
                x0, y0, x1, y1 = box
                assert 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64


def test_each_side_hides_the_other_sides_words(rows):
    front, back = {"neckline", "closure", "pocket", "front_print"}, {"back_print", "texture"}
    seen = {"front": Counter(), "back": Counter()}
    for row, named in rows:
        side = row["view"].split("_")[0]
        if side in seen:
            seen[side].update(name for name, visible in zip(named, row["visible"]) if visible)
    assert not front & set(seen["back"]) and not back & set(seen["front"])
    assert front <= set(seen["front"]) and back <= set(seen["back"])


def test_words_of_different_attributes_do_not_collide(rows):
    shared = {"front", "back"}  # said of whatever is there
    meaning = defaultdict(set)
    for row, named in rows:
        for word, attribute in zip(row["words"], named):
            if attribute and attribute not in ("main_colour", "second_colour"):
                meaning[word].add(attribute)
    assert {word for word, names in meaning.items() if len(names) > 1} <= shared
    colours = {word for words in COLOUR_WORDS.values() for word in words}
    assert not colours & set(meaning)


def test_every_value_can_be_said():
    for attribute, values in ATTRIBUTES.items():
        words = {"category": CATEGORY_WORDS, "main_colour": COLOUR_WORDS}.get(attribute, PHRASES.get(attribute))
        if attribute != "second_colour":
            assert set(words) == set(values) - {"none"}, attribute


def test_text_names_the_values_it_claims():
    import random

    base = make_item(0, 0).attributes | {"pattern": "striped", "second_colour": "pink", "main_colour": "black"}
    text, named = write_text(base, ["main_colour", "second_colour", "pattern"], random.Random(1))
    words = {a: [] for a in (*ATTRIBUTES, None)}
    for (start, end), attribute in zip(split_words(text), named):
        words[attribute].append(text[start:end].lower())
    assert words["main_colour"] == ["black"] and words["second_colour"] == ["pink"] and words["pattern"] == ["stripes"]


# ---------------------------------------------------------------- pictures obey attributes

BASE = {
    "category": "dress",
    "main_colour": "blue",
    "second_colour": "orange",
    "pattern": "plain",
    "sleeve": "long",
    "neckline": "round",
    "closure": "none",
    "pocket": "none",
    "front_print": "none",
    "back_print": "none",
    "hem": "straight",
    "cuff": "ribbed",
    "belt": "none",
    "texture": "smooth",
}
LOOK = Look(1.0, 1.0, 0.45, (0,) * 6)
LOCAL = ("neckline", "closure", "pocket", "front_print", "back_print", "hem", "cuff", "belt")


def _photo(attributes, side, scale=0.43, angle=0.0):
    view = View(side, side, 0.5, 0.5, scale, angle, 0)
    image, seen = draw_view(attributes, shape_of(attributes, LOOK), LOOK, view, 64)
    return np.asarray(image, np.int32), seen


@pytest.mark.parametrize("attribute", LOCAL)
@pytest.mark.parametrize("category", ["dress", "jumpsuit"])
def test_a_value_changes_its_region_and_hardly_anything_else(attribute, category):
    side = "back" if attribute == "back_print" else "front"
    values = [value for value, weight in ATTRIBUTES[attribute].items() if weight]
    photos = {value: _photo(BASE | {"category": category, attribute: value}, side) for value in values}
    for a in values:
        for b in values:
            if a < b:
                inside = np.zeros((64, 64), bool)
                for x0, y0, x1, y1 in photos[a][1][attribute] + photos[b][1][attribute]:
                    inside[max(0, int(y0) - 1) : int(y1) + 2, max(0, int(x0) - 1) : int(x1) + 2] = True
                changed = np.abs(photos[a][0] - photos[b][0]).max(-1) > 40
                assert changed[inside].sum() >= 6, (a, b)
                assert changed[~inside].sum() <= 0.15 * changed.sum(), (a, b)


@pytest.mark.parametrize("attribute", ["category", "main_colour", "second_colour", "pattern", "sleeve", "texture"])
def test_values_of_the_whole_garment_look_different(attribute):
    side = "back" if attribute == "texture" else "front"
    values = [value for value, weight in ATTRIBUTES[attribute].items() if weight]
    photos = [_photo(BASE | {attribute: value}, side)[0] for value in values if value != "orange"]
    for i, one in enumerate(photos):
        for other in photos[:i]:
            assert (np.abs(one - other).max(-1) > 25).sum() >= 60


def test_small_or_cut_off_places_are_not_seen():
    assert "closure" in _photo(BASE, "front")[1] and "closure" not in _photo(BASE, "front", scale=0.08)[1]
    attributes = BASE | {"pocket": "patch"}
    view = View("detail", "front", 0.5, 1.4, 0.6, 0.0, 0)  # the upper half of the dress alone
    _, seen = draw_view(attributes, shape_of(attributes, LOOK), LOOK, dataclasses.replace(view, y=1.05), 64)
    assert "neckline" in seen and "main_colour" in seen
    assert "hem" not in seen and "pocket" not in seen and "category" not in seen


def test_what_one_side_has_is_not_drawn_on_the_other():
    plain = _photo(BASE, "back")[0]
    for change in ({"neckline": "collar"}, {"closure": "zip"}, {"pocket": "flap"}, {"front_print": "star"}):
        assert (_photo(BASE | change, "back")[0] == plain).all(), change
    plain = _photo(BASE, "front")[0]
    for change in ({"back_print": "sun"}, {"texture": "fluffy"}):
        assert (_photo(BASE | change, "front")[0] == plain).all(), change


# ---------------------------------------------------------------- families and false negatives


def _slow_truth(photo, text):
    for name in photo["revealed"]:
        if name in text["claimed"] and photo["attributes"][name] != text["attributes"][name]:
            return False
    return True


def test_truth_equals_a_slow_loop(dataset):
    truth = GarmentTruth.from_dataset(dataset)
    rows = dataset.remove_columns("image").to_list()[:120]
    fast = truth.text_true_of_photo(np.arange(120)[:, None], np.arange(120)[None])
    assert fast.tolist() == [[_slow_truth(photo, text) for text in rows] for photo in rows]
    assert truth.text_true_of_photo(5, 5) and fast.shape == (120, 120)


def test_the_own_text_is_always_true(dataset):
    truth = GarmentTruth.from_dataset(dataset)
    items = np.array(dataset["item_id"])
    same = np.nonzero(items[:, None] == items)
    assert truth.text_true_of_photo(*same).all()


def test_truth_asks_for_the_generated_corpus(dataset):
    with pytest.raises(ValueError, match="revealed"):
        GarmentTruth.from_dataset(dataset.remove_columns("revealed"))


def test_families_are_near_twins():
    differences = []
    for index in range(COUNT):
        first, members = family_of(3, index)
        assert first <= index < first + members and 2 <= members <= 6
        assert family_of(3, first) == (first, members)
        one, other = make_item(3, first).attributes, make_item(3, index).attributes
        if index != first:
            differences.append(sum(one[name] != other[name] for name in ATTRIBUTES))
    # Two attributes at most are varied; the cuff and a colliding second colour may have to follow.
    assert max(differences) <= 4 and 1 <= np.mean(differences) <= 2.5


def test_a_garment_has_only_what_its_category_has_a_place_for():
    for attributes in (make_item(seed, index).attributes for seed in (0, 1) for index in range(COUNT)):
        category = attributes["category"]
        for name, without in (
            ("sleeve", {"skirt", "pants", "shorts", "poncho"}),
            ("neckline", {"skirt", "pants", "shorts", "hoodie", "jacket", "coat"}),
            ("hem", {"hoodie", "jacket"}),
        ):
            assert (attributes[name] == "none") == (category in without)
        assert (attributes["cuff"] == "none") == (attributes["sleeve"] != "long")
        assert attributes["main_colour"] != attributes["second_colour"]


def test_base_rates(dataset):
    per_item = Counter(dataset["item_id"])
    assert set(per_item.values()) == {2, 3, 4}
    assert 0.28 <= np.mean([np.mean(v) for v in dataset["visible"]]) <= 0.4
    assert 6 <= np.mean([len(c) for c in dataset["claimed"]]) <= 8
    words = {word for row in dataset["words"] for word in row}
    assert 120 <= len(words) <= 200
    assert set(dataset["view"]) == {"front", "back", "detail", "front_shifted", "back_shifted"}


def test_false_negatives_are_rare_but_there(dataset):
    truth, items = GarmentTruth.from_dataset(dataset), np.array(dataset["item_id"])
    true = truth.text_true_of_photo(np.arange(len(items))[:, None], np.arange(len(items))[None])
    families = np.array([family_of(3, int(item.split("-")[1]))[0] for item in items])
    strangers = families[:, None] != families
    assert 0.001 <= true[strangers].mean() <= 0.008
    assert true[~strangers & (items[:, None] != items)].mean() > 20 * true[strangers].mean()


def test_some_families_share_a_text():
    owners = defaultdict(set)
    for index in range(1200):
        owners[make_item(0, index).text].add(index)
    shared = [indices for indices in owners.values() if len(indices) > 1]
    assert 0.002 <= sum(map(len, shared)) / 1200 <= 0.06
    assert all(len({family_of(0, index) for index in indices}) == 1 for indices in shared)


def test_colours_are_where_the_regions_say():
    """A garment's box holds its main colour, the rest of the photo does not."""
    photo, seen = _photo(BASE | {"main_colour": "red"}, "front", scale=0.25)
    red = (photo[..., 0] > 150) & (photo[..., 1:] < 80).all(-1)
    ((x0, y0, x1, y1),) = seen["main_colour"]
    box = np.zeros((64, 64), bool)
    box[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = True
    assert red[box].mean() > 0.25 and red[~box].mean() < 0.02


def test_photos_are_png(rows):
    data = rows[0][0]["image"]["bytes"]
    assert Image.open(io.BytesIO(data)).format == "PNG"
