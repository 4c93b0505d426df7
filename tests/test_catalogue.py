"""What a catalogue keeps, and what costs a forward pass or a write."""

import datetime

import numpy as np
import pytest
from PIL import Image

from syncmask.retrieval import writing

# --------------------------------------------------------------------------------------------------- what adding costs


def test_rows_are_kept_with_all_that_was_given(shop, files, encoder, contents, counts):
    assert counts(shop.add(files)) == (12, 0, 0, 0) and len(shop) == 12
    kept = contents(shop)
    for row in files:
        name = f"{row['item_id']}/{row['image'].name}"
        assert kept[name] == {"photo_id": name, **{key: row[key] for key in ("item_id", "text", "category", "price")}}
    vectors = shop.snapshot().known([name], ["vector", "revision", "photo_sha256", "photo_path", "photo_bytes"])[name]
    np.testing.assert_allclose(vectors["vector"], encoder.encode_image([files[-1]["image"]])[0], atol=1e-5)
    assert vectors["revision"] == encoder.revision and len(vectors["photo_sha256"]) == 64
    assert vectors["photo_path"] == str(files[-1]["image"]) and vectors["photo_bytes"] is None


def test_what_is_there_costs_no_forward_and_no_write(shop, files, forwards, counts):
    assert shop.add(files).encoded == sum(forwards) == 12
    version = shop.snapshot().version
    assert counts(shop.add(files)) == (0, 0, 12, 0)
    assert sum(forwards) == 12 and shop.snapshot().version == version


def test_new_words_and_prices_cost_a_write_but_no_forward(shop, files, forwards, contents, counts):
    shop.add(files)
    before = shop.snapshot().known(list(contents(shop)), ["vector"])
    files[0] |= {"text": "quite another text"}
    files[1] |= {"price": 99.0, "season": "spring"}
    assert counts(shop.add(files)) == (0, 2, 10, 0) and sum(forwards) == 12
    kept = contents(shop, ("text", "price", "season", "vector"))
    first, second = (f"{row['item_id']}/{row['image'].name}" for row in files[:2])
    assert kept[first]["text"] == "quite another text" and kept[second]["price"] == 99.0
    assert [row["season"] for row in kept.values()].count("spring") == 1
    assert all(row["vector"] == before[name]["vector"] for name, row in kept.items())


def test_a_change_in_the_middle_of_a_long_array_is_seen(shop, files, counts):
    shop.add([files[0] | {"popularity": np.zeros(2000)}])
    assert counts(shop.add([files[0] | {"popularity": np.zeros(2000)}])) == (0, 0, 1, 0)
    changed = np.zeros(2000)
    changed[1000] = 1.0
    assert counts(shop.add([files[0] | {"popularity": changed}])) == (0, 1, 0, 0)


def test_a_new_photo_under_an_old_name_is_encoded(shop, files, forwards, encoder, counts):
    shop.add(files)
    Image.new("RGB", (40, 40), "purple").save(files[4]["image"])
    assert counts(shop.add(files)) == (0, 1, 11, 0) and sum(forwards) == 13
    name = f"{files[4]['item_id']}/{files[4]['image'].name}"
    vector = shop.snapshot().known([name], ["vector"])[name]["vector"]
    np.testing.assert_allclose(vector, encoder.encode_image([files[4]["image"]])[0], atol=1e-5)


def test_photos_that_moved_or_are_to_be_kept_inside_are_written_but_not_encoded(
    shop, files, forwards, tmp_path, counts
):
    shop.add(files[:2])
    moved = tmp_path / "elsewhere" / files[0]["image"].name
    moved.parent.mkdir()
    files[0]["image"] = files[0]["image"].rename(moved)
    assert counts(shop.add(files[:2])) == (0, 1, 1, 0)
    assert counts(shop.add(files[:2], store_photos=True)) == (0, 2, 0, 0) and sum(forwards) == 2
    moved.unlink()
    assert all(photo.open() for hit in shop.search(text="hat") for photo in hit.photos)
    assert str(moved) in {photo.path for hit in shop.search(text="hat") for photo in hit.photos}


def test_pixels_and_bytes_are_kept_in_the_catalogue(shop, files, tmp_path):
    photo = Image.open(files[0]["image"])
    shop.add([{"image": photo, "item_id": "a"}, {"image": files[1]["image"].read_bytes(), "item_id": "b"}])
    shop.add([{"image": {"bytes": None, "path": str(files[2]["image"])}, "item_id": "c"}])
    shop.add([{"image": files[3]["image"], "item_id": "d"}], store_photos=True)
    wanted = {"a": 0, "b": 1, "c": 2, "d": 3}
    (files[3]["image"]).rename(tmp_path / "gone.png")
    (files[0]["image"]).rename(files[3]["image"])  # another photo now lies where the stored one came from
    for hit in shop.search(text="hat", k=4):
        source = {0: files[3]["image"], 3: tmp_path / "gone.png"}.get(
            wanted[hit.item_id], files[wanted[hit.item_id]]["image"]
        )
        assert hit.photos[0].open().tobytes() == Image.open(source).convert("RGB").tobytes()
        assert (hit.photos[0].path is None) == (hit.item_id in "ab")


def test_ids_are_made_up_where_none_are_given(shop, files, contents):
    path = files[0]["image"]
    shop.add(
        [{"image": path}, {"image": path, "item_id": 7}, {"image": path, "photo_id": 8}, {"image": path.read_bytes()}]
    )
    kept = contents(shop)
    assert {name: row["item_id"] for name, row in kept.items() if "/" not in name or "00.png" in name} == {
        "00/00.png": "00",
        "7/00.png": "7",
        "8": "8",
    }
    assert len(kept) == 4


def test_commits_come_in_batches_and_are_told(shop, files, monkeypatch, contents):
    monkeypatch.setattr(writing, "CHUNK", 3)
    monkeypatch.setattr(writing, "COMMIT_ROWS", 6)
    safe = []
    shop.add(files[:7], on_commit=lambda ids: safe.append((set(ids), set(contents(shop)))))
    assert [len(ids) for ids, _ in safe] == [6, 1] and all(ids <= there for ids, there in safe)
    safe.clear()
    shop.add(files, on_commit=lambda ids: safe.append((set(ids), set())))
    assert set().union(*(ids for ids, _ in safe)) == set(contents(shop))
    monkeypatch.setattr(writing, "COMMIT_BYTES", 1)
    shop.add(
        [{**row, "photo_id": n} for n, row in enumerate(files)], store_photos=True, on_commit=lambda i: safe.append(i)
    )
    assert [len(ids) for ids in safe[-4:]] == [3, 3, 3, 3]


def test_photos_that_stay_in_files_do_not_wait_in_memory(shop, files, monkeypatch):
    waiting, real = [], writing.to_table
    monkeypatch.setattr(writing, "to_table", lambda records, *a: (waiting.extend(records), real(records, *a))[1])
    shop.add(files[:3])
    assert [record.photo for record in waiting] == [None] * 3


# ------------------------------------------------------------------------------------------------------- odd rows


def test_a_broken_photo_among_many_is_listed_and_stops_nothing(shop, garments, tmp_path, counts):
    """A thousand rows over a few photos; the broken ones are of every kind."""
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut short")
    bad = [
        {"image": tmp_path / "broken.jpg", "photo_id": "broken"},
        {"image": tmp_path / "nowhere.jpg", "photo_id": "missing"},
        {"image": None, "photo_id": "none"},
        {"image": {"bytes": None, "path": None}, "photo_id": "empty cell"},
        {"image": b"", "photo_id": "no bytes"},
        {"image": tmp_path, "photo_id": "folder"},
        {"image": "https://example.org/a.jpg", "photo_id": "remote"},
    ]
    rows = [{"image": garments[n % 5]["image"], "photo_id": f"good {n}"} for n in range(1000)]
    for place, row in enumerate(bad):
        rows.insert(100 * place + 50, row)
    report = shop.add(rows)
    assert counts(report) == (1000, 0, 0, 7) and len(shop) == 1000
    reasons = dict(report.skipped)
    assert set(reasons) == {row["photo_id"] for row in bad}
    assert "broken.jpg" in reasons["broken"] and "No such file" in reasons["missing"]
    assert "no photo" in reasons["none"] and "download" in reasons["remote"]


def test_an_id_that_comes_twice_is_kept_once(shop, files, contents, counts):
    report = shop.add([files[0], files[1], files[0] | {"text": "second"}])
    assert counts(report) == (2, 0, 0, 1) and "given before" in report.skipped[0][1]
    assert "second" not in {row["text"] for row in contents(shop).values()}


@pytest.mark.parametrize(
    "name", ["vector", "revision", "photo_sha256", "row_sha256", "photo_bytes", "a.b", 'a"b', "a`b", ""]
)
def test_names_that_cannot_be_kept_are_refused(shop, files, name):
    with pytest.raises(ValueError, match="rename it|cannot be kept"):
        shop.add([files[0] | {name: 1}])
    assert len(shop) == 0


def test_columns_of_many_kinds(shop, files, contents):
    day, moment = datetime.date(2026, 1, 2), datetime.datetime(2026, 1, 2, 3, 4)
    odd = {
        "Colour Name": "it's",
        "n": 3,
        "x": 0.5,
        "sale": True,
        "day": day,
        "at": moment,
        "tags": ["a", "b"],
        "empty": None,
    }
    shop.add([files[0] | odd, files[1]])
    shop.add([files[2] | {"n": 2, "empty": "now a text", "x": 2, "Colour Name": 17}])
    kept = contents(shop, (*odd, "item_id"))
    assert next(iter(kept.values())) == odd | {"item_id": files[0]["item_id"]}
    assert [row["Colour Name"] for row in kept.values()] == ["it's", None, "17"]
    assert [row["empty"] for row in kept.values()] == [None, None, "now a text"]
    found = shop.search(text="hat", filter={"Colour Name": "it's", "day": {"<=": day}, "at": moment, "sale": True})
    assert [hit.columns["tags"] for hit in found] == [["a", "b"]]


def test_values_of_another_kind_are_refused_by_name(shop, files):
    shop.add(files[:3])
    with pytest.raises(ValueError, match="column 'price' holds str; the catalogue keeps it as double"):
        shop.add([files[3] | {"price": "cheap"}])
    with pytest.raises(ValueError, match="column 'size' holds int, str; wanted one kind"):
        shop.add([files[4] | {"size": 1}, files[5] | {"size": "L"}])
    with pytest.raises(ValueError, match="a row is a str"):
        shop.add(["photo.jpg"])
    with pytest.raises(ValueError, match="'image' is a int"):
        shop.add([{"image": 7, "item_id": "x"}])
    assert len(shop) == 3 and shop.snapshot().columns == ["category", "price"]


# ----------------------------------------------------------------------------------------------- update and delete


def test_updates_change_what_they_name(shop, files, forwards, contents, counts):
    shop.add(files)
    before = contents(shop)
    item = files[0]["item_id"]
    name = next(name for name, row in before.items() if row["item_id"] != item)
    report = shop.update(
        [{"item_id": item, "price": 1.0, "sale": True}, {"photo_id": name, "text": "new", "price": None}]
    )
    touched = [n for n, row in before.items() if row["item_id"] == item]
    assert counts(report) == (0, len(touched) + 1, 0, 0) and sum(forwards) == 12
    wanted = {n: row | {"sale": None} for n, row in before.items()}
    for n in touched:
        wanted[n] |= {"price": 1.0, "sale": True}
    wanted[name] |= {"text": "new", "price": None}
    assert contents(shop, ("photo_id", "item_id", "text", "category", "price", "sale")) == wanted
    assert counts(shop.update([{"photo_id": name, "text": "new"}])) == (0, 0, 1, 0)


def test_an_updated_photo_is_encoded(shop, files, forwards, encoder):
    shop.add(files[:3])
    name = f"{files[0]['item_id']}/00.png"
    shop.update([{"photo_id": name, "image": Image.new("RGB", (32, 32), "green")}])
    assert sum(forwards) == 4
    row = shop.snapshot().known([name], ["vector", "photo_path", "text", "price"])[name]
    np.testing.assert_allclose(row["vector"], encoder.encode_image([Image.new("RGB", (32, 32), "green")])[0], atol=1e-5)
    assert row["photo_path"] is None and row["text"] == files[0]["text"] and row["price"] == 0.5


def test_updates_of_photos_kept_inside_keep_them(shop, files):
    shop.add([{"image": files[0]["image"].read_bytes(), "photo_id": "a", "price": 1}])
    shop.update([{"photo_id": "a", "price": 2}])
    hit = shop.search(text="hat")[0]
    assert hit.columns["price"] == 2
    assert hit.photos[0].open().tobytes() == Image.open(files[0]["image"]).convert("RGB").tobytes()


def test_updates_of_what_is_not_there_write_nothing(shop, files):
    shop.add(files[:3])
    version = shop.snapshot().version
    with pytest.raises(ValueError, match="2 ids are not in the catalogue, such as 'no', 'nobody'"):
        shop.update(
            [{"photo_id": f"{files[0]['item_id']}/00.png", "price": 5}, {"photo_id": "nobody"}, {"item_id": "no"}]
        )
    with pytest.raises(ValueError, match="row 0 has no photo_id or item_id"):
        shop.update([{"price": 5}])
    with pytest.raises(ValueError, match="no photo_id for its image"):
        shop.update([{"item_id": files[0]["item_id"], "image": files[0]["image"]}])
    assert shop.snapshot().version == version


def test_deleting_photos_and_items(shop, files, contents):
    shop.add(files)
    names = list(contents(shop))
    gone = names[0], "not there' OR 1=1 --"
    assert shop.delete(photo_ids=gone) == 1 and set(contents(shop)) == set(names[1:])
    item = files[-1]["item_id"]
    assert shop.delete(item_ids=[item]) == sum(row["item_id"] == item for row in files)
    assert item not in {row["item_id"] for row in contents(shop).values()}
    assert shop.delete() == 0


# ---------------------------------------------------------------------------------------------------------- real photos


def test_real_photos(real_data, shop, counts):
    photos = sorted((real_data / "luma" / "test").glob("*.jpg"))[:20]
    assert counts(shop.add({"image": path} for path in photos)) == (20, 0, 0, 0)
    assert shop.search(image=photos[7])[0].item_id == photos[7].stem
