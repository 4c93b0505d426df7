"""A change of the model: what it costs, what readers see, what is written meanwhile, what a kill leaves."""

import datetime

import numpy as np
import pytest
from PIL import Image

from syncmask.retrieval import reembedding, writing
from syncmask.retrieval.catalogue import Catalogue, Outdated
from syncmask.retrieval.store import Store


def vectors_of(catalogue):
    return {row["photo_id"]: row["vector"] for row in catalogue.snapshot().table.to_arrow().to_pylist()}


def test_re_embedding_is_indexing_anew(shop, files, other, tmp_path, forwards, contents, counts):
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
def test_what_is_written_meanwhile_is_taken_along(shop, files, encoder, other, monkeypatch, moment, contents):
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


def test_a_token_left_by_a_killed_re_embedding_holds_nobody_up(shop, files, counts):
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


def test_a_photo_changed_since_is_embedded_as_it_is_now(shop, files, other, forwards, counts):
    shop.add(files[:3])
    Image.new("RGB", (32, 32), "purple").save(files[0]["image"])
    shop.reembed(other)
    forwards.clear()
    assert counts(shop.add(files[:3])) == (0, 1, 2, 0) and sum(forwards) == 0  # its vector is right already
    name = f"{files[0]['item_id']}/00.png"
    np.testing.assert_allclose(vectors_of(shop)[name], other.encode_image([files[0]["image"]])[0], atol=1e-5)


def test_a_photo_changed_and_changed_back_is_encoded_again(shop, files, other, counts):
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
    shop.prepare(encoder)
    shop.optimise()  # takes nothing away that is in use again
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
