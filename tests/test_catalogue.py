"""What a catalogue keeps, what costs a forward pass, what readers see while others write, and a change of the model."""

import datetime
import threading
from concurrent.futures import ThreadPoolExecutor

import lancedb
import numpy as np
import pytest
import torch
from PIL import Image

from syncmask import SyncMaskConfig, SyncMaskForImageTextRetrieval
from syncmask.retrieval import reembedding, writing
from syncmask.retrieval.catalogue import Catalogue, NoCatalogue, Outdated
from syncmask.retrieval.encoder import Encoder
from syncmask.retrieval.store import Store, retrying


def make_encoder(processor, seed, **overrides):
    ids = {"vocab_size": len(processor.tokenizer), "mask_token_id": processor.tokenizer.mask_token_id}
    torch.manual_seed(seed)
    model = SyncMaskForImageTextRetrieval(SyncMaskConfig.tiny(image_size=32, **ids, **overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return Encoder(model, processor, device="cpu")


@pytest.fixture(scope="module")
def encoder(processor):
    return make_encoder(processor, 0)


@pytest.fixture(scope="module")
def other(processor):
    """Another model, with shorter vectors."""
    return make_encoder(processor, 1, projection_dim=16)


@pytest.fixture
def files(garments, tmp_path):
    """Twelve photos of a few items as files, and the rows that name them."""
    rows = []
    for place in range(12):
        row, path = garments[place], tmp_path / "photos" / f"{place:02}.png"
        path.parent.mkdir(exist_ok=True)
        row["image"].save(path)
        columns = {"category": row["category"], "price": place + 0.5}
        rows.append({"image": path, "item_id": row["item_id"], "text": row["text"], **columns})
    return rows


@pytest.fixture
def shop(tmp_path, encoder):
    return Catalogue.open(tmp_path / "shop", encoder, create=True)


@pytest.fixture
def forwards(monkeypatch):
    """Photos that went through the image tower, by call."""
    calls = []
    real = Encoder._image_embeds
    monkeypatch.setattr(
        Encoder, "_image_embeds", lambda self, photos: (calls.append(len(photos)), real(self, photos))[1]
    )
    return calls


def contents(catalogue, names=("photo_id", "item_id", "text", "category", "price")):
    """All rows as {photo id: row}."""
    rows = catalogue.snapshot().table.to_arrow().to_pylist()
    assert len({row["photo_id"] for row in rows}) == len(rows)
    return {row["photo_id"]: {name: row.get(name) for name in names} for row in rows}


def counts(report):
    return report.added, report.updated, report.unchanged, len(report.skipped)


# --------------------------------------------------------------------------------------------------- what adding costs


def test_rows_are_kept_with_all_that_was_given(shop, files, encoder):
    assert counts(shop.add(files)) == (12, 0, 0, 0) and len(shop) == 12
    kept = contents(shop)
    for row in files:
        name = f"{row['item_id']}/{row['image'].name}"
        assert kept[name] == {"photo_id": name, **{key: row[key] for key in ("item_id", "text", "category", "price")}}
    vectors = shop.snapshot().known([name], ["vector", "revision", "photo_sha256", "photo_path", "photo_bytes"])[name]
    np.testing.assert_allclose(vectors["vector"], encoder.encode_image([files[-1]["image"]])[0], atol=1e-5)
    assert vectors["revision"] == encoder.revision and len(vectors["photo_sha256"]) == 64
    assert vectors["photo_path"] == str(files[-1]["image"]) and vectors["photo_bytes"] is None


def test_what_is_there_costs_no_forward_and_no_write(shop, files, forwards):
    assert shop.add(files).encoded == sum(forwards) == 12
    version = shop.snapshot().version
    assert counts(shop.add(files)) == (0, 0, 12, 0)
    assert sum(forwards) == 12 and shop.snapshot().version == version


def test_new_words_and_prices_cost_a_write_but_no_forward(shop, files, forwards):
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


def test_a_new_photo_under_an_old_name_is_encoded(shop, files, forwards, encoder):
    shop.add(files)
    Image.new("RGB", (40, 40), "purple").save(files[4]["image"])
    assert counts(shop.add(files)) == (0, 1, 11, 0) and sum(forwards) == 13
    name = f"{files[4]['item_id']}/{files[4]['image'].name}"
    vector = shop.snapshot().known([name], ["vector"])[name]["vector"]
    np.testing.assert_allclose(vector, encoder.encode_image([files[4]["image"]])[0], atol=1e-5)


def test_photos_that_moved_or_are_to_be_kept_inside_are_written_but_not_encoded(shop, files, forwards, tmp_path):
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


def test_ids_are_made_up_where_none_are_given(shop, files):
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


def test_commits_come_in_batches_and_are_told(shop, files, monkeypatch):
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


def test_a_broken_photo_among_many_is_listed_and_stops_nothing(shop, garments, tmp_path):
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


def test_an_id_that_comes_twice_is_kept_once(shop, files):
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


def test_columns_of_many_kinds(shop, files):
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


def test_updates_change_what_they_name(shop, files, forwards):
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
    with pytest.raises(ValueError, match="2 ids are not in the catalogue, such as 'None', 'nobody'"):
        shop.update(
            [{"photo_id": f"{files[0]['item_id']}/00.png", "price": 5}, {"photo_id": "nobody"}, {"item_id": "no"}]
        )
    with pytest.raises(ValueError, match="row 0 has no photo_id or item_id"):
        shop.update([{"price": 5}])
    with pytest.raises(ValueError, match="no photo_id for its image"):
        shop.update([{"item_id": files[0]["item_id"], "image": files[0]["image"]}])
    assert shop.snapshot().version == version


def test_deleting_photos_and_items(shop, files):
    shop.add(files)
    names = list(contents(shop))
    gone = names[0], "not there' OR 1=1 --"
    assert shop.delete(photo_ids=gone) == 1 and set(contents(shop)) == set(names[1:])
    item = files[-1]["item_id"]
    assert shop.delete(item_ids=[item]) == sum(row["item_id"] == item for row in files)
    assert item not in {row["item_id"] for row in contents(shop).values()}
    assert shop.delete() == 0


# ------------------------------------------------------------------------------------------------------------ opening


def test_opening_what_is_no_catalogue(tmp_path, encoder):
    with pytest.raises(NoCatalogue, match="does not exist. Make one: syncmask index"):
        Catalogue.open(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match="is no catalogue"):
        Catalogue.open(tmp_path / "other")
    with pytest.raises(ValueError, match=r"holds other files \(precious.txt\)"):
        Catalogue.open(tmp_path / "other", encoder, create=True)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["precious.txt"]
    with pytest.raises(ValueError, match="precious.txt is a file"):
        Catalogue.open(tmp_path / "other" / "precious.txt", encoder, create=True)
    with pytest.raises(ValueError, match="give the encoder"):
        Catalogue.open(tmp_path / "new", create=True)
    lancedb.connect(str(tmp_path / "db")).create_table("things", [{"a": 1}])
    with pytest.raises(NoCatalogue):
        Catalogue.open(tmp_path / "db")


def test_a_newer_format_is_refused(shop):
    Store.open(shop.describe()["path"]).db.open_table("about").update(values={"format": 99})
    with pytest.raises(ValueError, match="has format 99, this package reads 1"):
        Catalogue.open(shop.describe()["path"])


def test_an_empty_catalogue_answers(shop):
    found = shop.search(text="hat", filter=None, k=5)
    assert list(found) == [] and found.notes == ["the catalogue is empty"]
    assert shop.describe()["photos"] == shop.describe()["items"] == len(shop) == 0
    assert counts(shop.add([])) == (0, 0, 0, 0) and shop.delete(["x"]) == 0
    shop.optimise()


def test_the_catalogue_loads_the_model_that_it_names(tmp_path, encoder, processor, files):
    encoder.model.save_pretrained(tmp_path / "run" / "final")
    processor.save_pretrained(tmp_path / "run" / "final")
    named = Encoder.from_pretrained(tmp_path / "run", device="cpu")
    Catalogue.open(tmp_path / "shop", named, create=True).add(files)
    opened = Catalogue.open(tmp_path / "shop")
    assert len(opened.search(text="hat", k=2)) == 2 and opened.encoder.revision == encoder.revision
    assert opened.describe()["model"] == str(tmp_path / "run" / "final")
    nameless = Catalogue.open(tmp_path / "nameless", encoder, create=True)
    with pytest.raises(ValueError, match="does not name its model"):
        Catalogue.open(nameless.describe()["path"]).search(text="hat")


def test_a_model_of_another_revision_is_refused(shop, files, other):
    shop.add(files)
    stranger = Catalogue.open(shop.describe()["path"], other)
    for action in (lambda: stranger.search(text="hat"), lambda: stranger.add(files), lambda: stranger.update([])):
        with pytest.raises(
            Outdated, match=r"re-embed with the second: catalogue.reembed\(encoder\), or syncmask index"
        ):
            action()
    assert counts(shop.add(files)) == (0, 0, 12, 0)


# ------------------------------------------------------------------------------------------------------------ reading


def test_a_snapshot_does_not_change(shop, files):
    shop.add(files[:6])
    before, query = shop.snapshot(), shop.encoder.encode_text(["hat"], as_numpy=True)[0]
    seen = before.nearest(query, 20, None)
    shop.add(files[6:])
    shop.delete(photo_ids=[f"{files[0]['item_id']}/00.png"])
    shop.update([{"item_id": files[1]["item_id"], "price": 77.0}])
    assert before.nearest(query, 20, None) == seen and len(seen) == before.table.count_rows() == 6
    assert 77.0 not in before.photos_of(seen, None)["price"].to_pylist()
    assert len(shop.snapshot().nearest(query, 20, None)) == 11


def test_readers_see_whole_batches_while_another_writes(shop, files, monkeypatch):
    """Every add is of four photos of a new item: a reader never sees one, two or three of them."""
    failures, stop = [], threading.Event()
    path = shop.describe()["path"]
    reader = Catalogue.open(path, shop.encoder)

    def read():
        while not stop.is_set():
            found = reader.search(text="hat", k=50)
            failures.extend(hit.item_id for hit in found if len(hit.photos) != 4)

    thread = threading.Thread(target=read)
    thread.start()
    for item in range(8):
        shop.add([{"image": row["image"], "item_id": f"i{item}"} for row in files[:4]])
    stop.set()
    thread.join()
    assert failures == [] and len(reader) == 32


def at_once(*actions):
    """Run actions in threads of their own; what one raises is raised here."""
    with ThreadPoolExecutor(len(actions)) as pool:
        for future in [pool.submit(action) for action in actions]:
            future.result()


def test_two_writers_of_the_same_new_photos_keep_each_once(shop, files, encoder, monkeypatch):
    """Both have encoded the photos and commit at the same moment, many times."""
    meet, real = threading.Barrier(2), Store.merge
    monkeypatch.setattr(Store, "merge", lambda *args: (meet.wait(60), real(*args)))
    path = shop.describe()["path"]

    def write(price):
        catalogue = Catalogue.open(path, encoder)
        for row in files[:8]:
            catalogue.add([row | {"price": price}])

    at_once(lambda: write(1.0), lambda: write(2.0))
    assert len(contents(shop)) == 8 and {row["price"] for row in contents(shop).values()} <= {1.0, 2.0}


def test_writers_who_delete_and_add_at_once_lose_nothing(shop, files, encoder):
    shop.add([row | {"photo_id": f"old {place}"} for place, row in enumerate(files)])
    path = shop.describe()["path"]
    at_once(
        lambda: [Catalogue.open(path, encoder).delete(photo_ids=[f"old {place}"]) for place in range(6)],
        lambda: [Catalogue.open(path, encoder).add([row | {"column": 1.0}]) for row in files[:6]],
        lambda: Catalogue.open(path, encoder).update([{"photo_id": f"old {n}", "column": 2.0} for n in range(6, 12)]),
    )
    kept = contents(shop, ("column",))
    assert {name for name in kept if name.startswith("old")} == {f"old {place}" for place in range(6, 12)}
    assert sorted(row["column"] for row in kept.values()) == [1.0] * 6 + [2.0] * 6


def test_conflicts_are_tried_again_and_other_errors_are_not():
    messages = ["lance error: Retryable commit conflict for version 2", "Too many concurrent writers"]
    answers = iter([*messages, None])

    def act():
        message = next(answers)
        if message:
            raise RuntimeError(message)
        return "done"

    assert retrying(act) == "done"
    answers = iter(["disk full", None])
    with pytest.raises(RuntimeError, match="disk full"):
        retrying(act)
    answers = iter(messages[:1] * 100)
    with pytest.raises(RuntimeError, match="conflict"):
        retrying(act)


def test_of_two_who_change_the_state_one_comes_first(shop):
    path = shop.describe()["path"]
    for _ in range(6):
        stores = [Store.open(path), Store.open(path)]
        meet, table = threading.Barrier(2), stores[0].db.open_table("about")
        before = table.version

        def take(number, stores=stores, meet=meet):
            meet.wait(60)
            stores[number].set_state({"switching": f"token {number}"}, only_if=("switching", ""))

        at_once(lambda: take(0), lambda: take(1))  # noqa: B023
        table.checkout_latest()
        seen = []
        for version in range(before + 1, table.version + 1):
            table.checkout(version)
            seen.append(table.search().to_arrow()["switching"][0].as_py())
        assert len(set(seen)) == 1 and seen[0].startswith("token")
        stores[0].set_state({"switching": ""}, only_if=("switching", seen[0]))


@pytest.mark.parametrize("filter", [None, {"price": {"<": 9}}])
def test_above_the_limit_the_index_is_asked(tmp_path, encoder, files, filter):
    path = tmp_path / "shop"
    exact = Catalogue.open(path, encoder, create=True)
    exact.add({**row, "photo_id": f"{copy}-{place}"} for copy in range(5) for place, row in enumerate(files))
    large = Catalogue.open(path, encoder, exact_up_to=10)
    wanted = [
        (hit.item_id, pytest.approx(hit.vector, abs=1e-5)) for hit in exact.search(text="hat", filter=filter, k=4)
    ]
    assert "exact scan in memory" in exact.describe()["search"] and "slow" in large.describe()["search"]
    assert [(hit.item_id, hit.vector) for hit in large.search(text="hat", filter=filter, k=4)] == wanted
    large.optimise()
    assert "IVF index" in large.describe()["search"] and large.snapshot()._scan is None
    assert [(hit.item_id, hit.vector) for hit in large.search(text="hat", filter=filter, k=4)] == wanted
    worst = exact.search(text="hat", k=99)[-1].item_id  # too far behind to be found without the filter
    assert [hit.item_id for hit in large.search(text="hat", filter={"item_id": worst}, k=1)] == [worst]
    large.add(
        [{"image": files[0]["image"], "item_id": "late", "price": 1.0}]
    )  # not in the index yet, found all the same
    assert "late" in [hit.item_id for hit in large.search(image=files[0]["image"], filter=filter, k=2)]


def test_optimising_changes_nothing_but_files(shop, files, monkeypatch):
    from syncmask.retrieval import catalogue as module

    monkeypatch.setattr(module, "INDEXED_FROM", 5)
    for row in files:
        shop.add([row])
    shop.delete(photo_ids=[f"{files[0]['item_id']}/00.png"])
    before, found = contents(shop), [hit.content() for hit in shop.search(text="hat", k=9)]
    with pytest.warns(UserWarning, match="removes every version except the latest"):
        shop.optimise(keep=datetime.timedelta(0))
    table = shop.snapshot().table
    assert {name for index in table.list_indices() for name in index.columns} == {"photo_id", "item_id"}
    assert len(table.list_versions()) <= 3
    assert contents(shop) == before and [hit.content() for hit in shop.search(text="hat", k=9)] == found
    assert counts(shop.add(files)) == (1, 0, 11, 0)


def test_what_describe_says(shop, files, encoder):
    shop.add(files)
    about = shop.describe()
    assert about["photos"] == 12 and about["items"] == len({row["item_id"] for row in files})
    assert about["columns"] == ["category", "price"] and about["unfinished"] == []
    assert about["filterable"] == ["photo_id", "item_id", "text", "category", "price"]
    assert about["revision"] == encoder.revision and about["dim"] == encoder.dim


# -------------------------------------------------------------------------------------------------------- re-embedding


def vectors_of(catalogue):
    return {row["photo_id"]: row["vector"] for row in catalogue.snapshot().table.to_arrow().to_pylist()}


def test_re_embedding_is_indexing_anew(shop, files, other, tmp_path, forwards):
    shop.add([row | {"day": datetime.date(2026, 1, 1)} for row in files])
    shop.add([{"image": files[0]["image"].read_bytes(), "photo_id": "inside"}])
    before = contents(shop, ("text", "category", "price", "day", "item_id"))
    forwards.clear()
    report = shop.reembed(other)
    assert report.encoded == sum(forwards) == 13
    assert contents(shop, ("text", "category", "price", "day", "item_id")) == before
    fresh = Catalogue.open(tmp_path / "fresh", other, create=True)
    fresh.add(files)
    found, wanted = vectors_of(shop), vectors_of(fresh)
    assert all(np.allclose(found[name], vector, atol=1e-5) for name, vector in wanted.items())
    assert [hit.item_id for hit in shop.search(text="hat", k=3)] == [
        hit.item_id for hit in Catalogue.open(shop.describe()["path"], other).search(text="hat", k=3)
    ]
    assert counts(shop.add(files)) == (0, 12, 0, 0) and sum(forwards) == 13 + 12  # `day` is emptied
    assert shop.describe()["dim"] == other.dim == 16
    assert shop.reembed(other).unchanged == 13


def test_readers_keep_the_old_vectors_until_the_switch(shop, files, encoder, other, monkeypatch):
    shop.add(files)
    reader = Catalogue.open(shop.describe()["path"], encoder)
    before = [hit.content() for hit in reader.search(text="hat")]
    seen = []
    monkeypatch.setattr(writing, "COMMIT_ROWS", 4)
    monkeypatch.setattr(writing, "CHUNK", 4)
    shop.reembed(other, on_commit=lambda ids: seen.append([hit.content() for hit in reader.search(text="hat")]))
    assert len(seen) == 3 and all(found == before for found in seen)
    with pytest.raises(Outdated):
        reader.search(text="hat")


def test_re_embedding_goes_on_where_it_stopped(shop, files, encoder, other, forwards, monkeypatch):
    shop.add(files)
    monkeypatch.setattr(writing, "COMMIT_ROWS", 4)
    monkeypatch.setattr(writing, "CHUNK", 4)

    class Killed(Exception):
        pass

    def stop(ids):
        raise Killed

    with pytest.raises(Killed):
        shop.reembed(other, on_commit=stop)
    again = Catalogue.open(shop.describe()["path"], encoder)
    assert len(again.search(text="hat", k=3)) == 3 and again.describe()["unfinished"] == [
        f"photos_{other.revision[:16]}"
    ]
    again.optimise()  # it is not thrown away
    forwards.clear()
    Catalogue.open(shop.describe()["path"]).reembed(other)
    assert sum(forwards) == 8
    assert again.describe()["unfinished"] == [] and len(vectors_of(again)) == 12


@pytest.mark.parametrize("moment", ["before the token", "after the token", "just before the switch"])
def test_what_is_written_meanwhile_is_taken_along(shop, files, encoder, other, monkeypatch, moment):
    """A writer of the old revision adds, changes and deletes at a bad moment; all of it is there after the switch."""
    shop.add(files[:8])
    writer = Catalogue.open(shop.describe()["path"], encoder)
    rounds, real_copy, real_set = [], reembedding._copy, Store.set_state

    def write():
        writer.add(files[8:10])
        writer.update([{"item_id": files[1]["item_id"], "price": 77.0}])
        writer.delete(photo_ids=[f"{files[0]['item_id']}/00.png"])

    def copy(*args, **kwargs):
        done = real_copy(*args, **kwargs)
        rounds.append("copy")
        if (moment, len(rounds)) in {("before the token", 1), ("just before the switch", 2)}:
            write()
        return done

    def set_state(self, values, only_if):
        real_set(self, values, only_if)
        if moment == "after the token" and values.get("switching") and len(rounds) == 1:
            write()

    monkeypatch.setattr(reembedding, "_copy", copy)
    monkeypatch.setattr(Store, "set_state", set_state)
    shop.reembed(other)
    kept = contents(shop)
    assert set(kept) == {f"{row['item_id']}/{row['image'].name}" for row in files[1:10]}
    assert {row["price"] for row in kept.values() if row["item_id"] == files[1]["item_id"]} == {77.0}
    assert all(len(vector) == 16 for vector in vectors_of(shop).values())
    assert len(rounds) == (2 if moment == "before the token" else 3)


def test_a_write_that_comes_after_the_switch_is_not_acknowledged(shop, files, encoder, other, monkeypatch):
    shop.add(files[:4])
    writer, safe = Catalogue.open(shop.describe()["path"], encoder), []
    real = Store.merge

    def late(self, *args):
        monkeypatch.undo()
        shop.reembed(other)
        real(self, *args)

    monkeypatch.setattr(Store, "merge", late)
    with pytest.raises(Outdated, match="re-embedded by .* in the meantime; the last rows were not kept"):
        writer.add(files[4:6], on_commit=safe.extend)
    assert safe == [] and len(shop) == 4


def test_a_token_left_by_a_killed_re_embedding_holds_nobody_up(shop, files):
    shop.add(files[:2])
    store = Store.open(shop.describe()["path"])
    store.set_state({"switching": "of a dead process"}, only_if=("switching", ""))
    assert counts(shop.add(files[2:4])) == (2, 0, 0, 0) and store.state().switching == ""


def test_photos_that_are_gone_stop_the_switch(shop, files, other):
    shop.add(files)
    files[0]["image"].unlink()
    files[1]["image"].write_bytes(b"no photo any more")
    name = f"{files[0]['item_id']}/00.png"
    with pytest.raises(ValueError, match=f"2 photos cannot be read, such as '{name}'.*Nothing was switched"):
        shop.reembed(other)
    assert len(shop.search(text="hat")) > 0 and len(shop) == 12
    shop.delete(photo_ids=[name])
    report = shop.reembed(other, drop_unreadable=True)
    assert len(report.skipped) == 1 and len(shop) == 10


def test_a_photo_changed_since_is_embedded_as_it_is_now(shop, files, other, forwards):
    shop.add(files[:3])
    Image.new("RGB", (32, 32), "purple").save(files[0]["image"])
    shop.reembed(other)
    forwards.clear()
    assert counts(shop.add(files[:3])) == (0, 1, 2, 0) and sum(forwards) == 0  # its vector is right already
    name = f"{files[0]['item_id']}/00.png"
    np.testing.assert_allclose(vectors_of(shop)[name], other.encode_image([files[0]["image"]])[0], atol=1e-5)


def test_a_photo_changed_and_changed_back_is_encoded_again(shop, files, other):
    shop.add(files[:2])
    before = files[0]["image"].read_bytes()
    Image.new("RGB", (32, 32), "purple").save(files[0]["image"])
    shop.reembed(other)
    files[0]["image"].write_bytes(before)
    assert counts(shop.add(files[:2])) == (0, 1, 1, 0)
    name = f"{files[0]['item_id']}/00.png"
    np.testing.assert_allclose(vectors_of(shop)[name], other.encode_image([files[0]["image"]])[0], atol=1e-5)


def test_re_embedding_back_uses_what_is_left(shop, files, encoder, other, forwards):
    shop.add(files)
    shop.reembed(other)
    forwards.clear()
    shop.reembed(encoder)
    assert sum(forwards) == 0 and len(shop.search(text="hat", k=2)) == 2
    shop.optimise()
    assert Store.open(shop.describe()["path"]).tables() == sorted(["about", f"photos_{encoder.revision[:16]}"])


def test_shares_of_a_re_embedding_make_the_whole(shop, files, other, forwards):
    shop.add(files)
    forwards.clear()
    done = [shop.prepare(other, share=(number, 2)).encoded for number in range(2)]
    assert done == [6, 6] and len(shop.search(text="hat", k=2)) == 2
    shop.reembed(other)
    assert sum(forwards) == 12 and len(shop) == 12


# ---------------------------------------------------------------------------------------------------------- real photos


def test_real_photos(real_data, shop):
    photos = sorted((real_data / "luma" / "test").glob("*.jpg"))[:20]
    assert counts(shop.add({"image": path} for path in photos)) == (20, 0, 0, 0)
    assert shop.search(image=photos[7])[0].item_id == photos[7].stem
