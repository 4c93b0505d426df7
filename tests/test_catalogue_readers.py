"""Opening a catalogue, and what readers and writers see of each other."""

import datetime
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import lancedb
import pyarrow as pa
import pytest
import torch

from syncmask.retrieval import store
from syncmask.retrieval.catalogue import Catalogue, NoCatalogue, Outdated
from syncmask.retrieval.encoder import Encoder
from syncmask.retrieval.rows import schema_of
from syncmask.retrieval.snapshot import PROBES
from syncmask.retrieval.store import Store, retrying

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
    about = Store(shop._store.place).db.open_table("about")
    about.add_columns(pa.schema([pa.field("shards", pa.int64())]))  # which this one knows nothing of
    with pytest.raises(ValueError, match="has format 99"):
        shop.search(text="hat")


def test_an_empty_catalogue_answers(shop, counts):
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


def test_a_model_of_another_revision_is_refused(shop, files, other, counts):
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


def test_two_writers_of_the_same_new_photos_keep_each_once(shop, files, encoder, monkeypatch, contents):
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


def test_writers_who_delete_and_add_at_once_lose_nothing(shop, files, encoder, contents):
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


def test_conflicts_are_tried_again_and_other_errors_are_not(monkeypatch):
    monkeypatch.setattr(store.time, "sleep", lambda seconds: None)
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


def test_the_index_looks_at_few_and_finds_nearly_all_however_often_it_is_optimised(tmp_path):
    """Vectors without photos, as many as an index needs; new ones come between."""
    vectors = torch.nn.functional.normalize(torch.randn(8000, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    schema = schema_of(16)
    place = Store.create(str(tmp_path / "c"), schema, "0" * 64, "", 16)
    catalogue = Catalogue(place, exact_up_to=0)
    for part in (range(7000), range(7000, 8000)):
        rows = [{"photo_id": str(row), "item_id": str(row), "vector": vectors[row].tolist()} for row in part]
        place.table(place.state().table).add(pa.Table.from_pylist(rows, schema))
        catalogue.optimise()
    queries = vectors[:40] + 0.1 * torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    snapshot = catalogue.snapshot()
    found = [snapshot.nearest(query.numpy(), 10, None) for query in queries]
    wanted = (queries @ vectors.T).topk(10, dim=1).indices.tolist()
    shared = sum(len(set(map(int, f)) & set(w)) for f, w in zip(found, wanted))
    assert shared >= 0.98 * 400
    plan = snapshot.table.search(queries[0].numpy()).nprobes(PROBES).limit(10).analyze_plan()
    looked = [float(n) * (1000 if k else 1) for n, k in re.findall(r"index_comparisons=([\d.]+) ?(K?)", plan)]
    assert 100 < sum(looked) < 6000


def test_optimising_changes_nothing_but_files(shop, files, monkeypatch, contents, counts):
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
