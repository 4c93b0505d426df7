"""Tar shards: read in place, converted and checked from end to end, whole and damaged; trained on like any corpus."""

import gzip
import io
import json
import logging
import multiprocessing
import pickle
import re
import tarfile

import datasets
import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from syncmask.processing.check import check_corpus
from syncmask.processing.collator import PhotoDataset, UnreadablePhoto, read_photo
from syncmask.processing.convert import convert
from syncmask.processing.corpus import CorpusIndex, fingerprint, load_corpus, open_streams
from syncmask.processing.readers_shards import open_shards, read_shard
from syncmask.processing.streams import stream_of_table
from syncmask.processing.tar_photos import read_tar_place, shards_of, tar_place


def add(shard, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    shard.addfile(member, io.BytesIO(content))


def photo(number, size=(6, 5)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(file, rows, mode="w"):
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode) as shard:
        for number in rows:
            add(shard, f"set/{number:05d}.png", photo(number))
            fields = {"item_ID": f"i{number // 2}", "price": number, "tags": ["a"], "name": None}
            add(shard, f"set/{number:05d}.json", json.dumps(fields).encode())
            add(shard, f"set/{number:05d}.txt", f" a shirt, number {number}\n".encode())
    return file


def undecoded(rows):
    return rows.cast_column("image", datasets.Image(decode=False))


def colour(image):
    return image.getpixel((0, 0))[0]


@pytest.fixture
def shards(tmp_path):
    """Two shards of train (the second compressed) and one of validation; row n's photo is (n, 0, 0)."""
    write_shard(tmp_path / "set" / "train" / "a.tar", range(6))
    write_shard(tmp_path / "set" / "train" / "b.tar.gz", range(6, 12), "w:gz")
    write_shard(tmp_path / "set" / "val-0000.tar", range(12, 16))
    return tmp_path / "set"


def test_shards_give_the_schema(shards, tmp_path):
    corpus = load_corpus(shards)
    assert {name: len(rows) for name, rows in corpus.items()} == {"train": 12, "validation": 4}
    row = corpus["train"][4]
    assert row["image"].getpixel((0, 0)) == (4, 0, 0) and row["text"] == "a shirt, number 4" and row["item_id"] == "i2"
    assert (row["price"], row["tags"], row["name"]) == ("4", '["a"]', None)
    assert [colour(row["image"]) for row in corpus["train"]] == list(range(12))
    streams = open_streams(shards)
    assert {name: [r["item_id"] for r in s] for name, s in streams.items()} == {
        name: rows["item_id"][:] for name, rows in corpus.items()
    }
    assert [row["image"]["bytes"] for row in streams["train"]] == [photo(number) for number in range(12)]
    done = convert(shards, tmp_path / "out")
    assert done.rows == {"train": 12, "validation": 4}
    assert undecoded(load_corpus(tmp_path / "out")["train"])[7]["image"]["bytes"] == photo(7)


def test_photos_are_not_copied_unless_they_must_be(shards, caplog):
    with caplog.at_level(logging.WARNING):
        cells = undecoded(load_corpus(shards)["train"])["image"][:]
    assert [cell["bytes"] is None for cell in cells] == [True] * 6 + [False] * 6
    content = (shards / "train" / "a.tar").read_bytes()
    for number, cell in enumerate(cells[:6]):
        offset, size = map(int, re.match(r"tarphoto://(\d+)\+(\d+)@", cell["path"]).groups())
        assert content[offset : offset + size] == photo(number)
    assert "b.tar.gz is compressed: its photos are copied" in caplog.text and "a.tar is compressed" not in caplog.text


def test_photos_are_passed_over_when_shards_are_loaded(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "x.tar", "w") as shard:
        for number in range(40):
            add(shard, f"{number}.jpg", bytes([number]) * 100_000)
            add(shard, f"{number}.txt", b"a hat")
    read = []
    plain = tarfile.TarFile.extractfile
    monkeypatch.setattr(
        tarfile.TarFile, "extractfile", lambda self, member: read.append(member.name) or plain(self, member)
    )
    (stream,) = open_shards(tmp_path / "x.tar", in_place=True).values()
    read.clear()  # The first samples tell the columns.
    assert len(list(stream)) == 40 and read == [f"{number}.txt" for number in range(40)]


def test_places_are_read_again_only_when_a_shard_changed(tmp_path):
    file = write_shard(tmp_path / "x.tar", range(8))
    first = load_corpus(file, shares=(1, 0, 0))["train"]
    again = load_corpus(file, shares=(1, 0, 0))["train"]
    assert fingerprint(again) == fingerprint(first) and again.cache_files == first.cache_files
    write_shard(file, range(20, 28))
    new = load_corpus(file, shares=(1, 0, 0))["train"]
    assert [colour(row["image"]) for row in new] == list(range(20, 28)) and fingerprint(new) != fingerprint(first)


def test_odd_names_are_found_again(tmp_path, monkeypatch):
    file = tmp_path / "a [1]*?#%41::x!y" / "träin.tar"
    file.parent.mkdir()
    names = ["set/1.png", "ä b*#!@%41.png", "./2//3.png", "4+5@6.png", f"{'long/' * 60}7.png"]
    with tarfile.open(file, "w") as shard:
        for number, name in enumerate(names):
            add(shard, name, photo(number))
            add(shard, name.replace("png", "txt"), b"a hat")
    monkeypatch.chdir(file.parent)
    rows = load_corpus("träin.tar", shares=(1, 0, 0))["train"]
    monkeypatch.chdir(tmp_path)
    cells = undecoded(rows)["image"][:]
    for number in range(len(names)):
        assert colour(rows[number]["image"]) == colour(read_photo(cells[number], 0)) == number
        assert read_tar_place(cells[number]["path"]) == photo(number)
        assert fsspec.open(cells[number]["path"], "rb").open().read() == photo(number)
    assert cells[1]["path"].endswith("!/%C3%A4%20b%2A%23%21%40%2541.png")


@pytest.mark.parametrize("read", [open_streams, load_corpus])
def test_names_in_latin_1_stop_nothing(read, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as shard:
        for number, name in enumerate(("bücher", "hut")):
            add(shard, f"{name}.png", photo(number))
            add(shard, f"{name}.txt", b"a hat")
    found = sorted(row["item_id"] for rows in read(tmp_path / "x.tar").values() for row in rows)
    assert found == ["b\ufffdcher", "hut"]


def test_places_that_cannot_be_read_are_named(tmp_path):
    file = write_shard(tmp_path / "x.tar", range(2))
    cells = undecoded(load_corpus(file, shares=(1, 0, 0))["train"])["image"][:]
    file.write_bytes(file.read_bytes()[:540])
    with pytest.raises(UnreadablePhoto, match=r"row 3 .*x\.tar ends inside 'set/00000.png': it changed"):
        read_photo(cells[0], 3)
    file.write_bytes(bytes(20_000))
    with pytest.raises(UnreadablePhoto, match=r"row 4 .*x\.tar!/set/00001.png: image of .. bytes cannot be read"):
        read_photo(cells[1], 4)
    file.unlink()
    with pytest.raises(UnreadablePhoto, match="No such file"):
        read_photo(cells[0], 3)
    with pytest.raises(ValueError, match="names no photo in a tar shard; wanted tarphoto://OFFSET"):
        read_tar_place("tarphoto:///etc/passwd")
    with pytest.raises(ValueError, match="mode is 'wb', wanted 'rb'"):
        fsspec.open(cells[0]["path"], "wb").open()


def _last_colour(rows):
    return colour(rows[len(rows) - 1]["image"])


def test_rows_of_shards_are_rows_like_others(tmp_path):
    rows = load_corpus(write_shard(tmp_path / "x.tar", range(9)), shares=(1, 0, 0))["train"]
    some = pickle.loads(pickle.dumps(rows.select([7, 2])))
    assert [colour(row["image"]) for row in some] == [7, 2]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_last_colour, (rows,)) == 8
    rows.save_to_disk(tmp_path / "saved")
    saved = load_corpus(tmp_path / "saved", shares=(1, 0, 0))["train"]
    assert undecoded(saved)["image"][:] == undecoded(rows)["image"][:] and _last_colour(saved) == 8
    assert [row["image"]["bytes"] for row in stream_of_table(saved)] == [photo(number) for number in range(9)]
    report, found, _ = check_corpus(tmp_path / "saved")
    assert {facts.problem for facts in found.photos} == {"tiny"}
    (tmp_path / "x.tar").unlink()
    assert all(row["image"]["bytes"] is None for row in stream_of_table(saved))  # for its reader to name


@pytest.mark.parametrize("workers", [0, 2])
def test_training_reads_shards_as_it_reads_a_table(workers, shards, tmp_path):
    convert(shards, tmp_path / "out")
    keys = [(epoch, row) for epoch in range(2) for row in (3, 9, 0, 5)]
    batches = []
    for source in (shards, tmp_path / "out"):
        rows = load_corpus(source)["train"]
        index = CorpusIndex.from_dataset(rows)
        photos = PhotoDataset(rows, index, image_size=8, seed=1, augment=True)
        batches.append(list(DataLoader(photos, sampler=keys, batch_size=4, collate_fn=list, num_workers=workers)))
    for ours, theirs in zip(*(sum(found, []) for found in batches), strict=True):
        assert np.array_equal(ours.pop("pixel_values"), theirs.pop("pixel_values")) and ours == theirs


def test_a_photo_broken_in_its_shard_costs_its_row_alone(tmp_path):
    file = write_shard(tmp_path / "x.tar", range(4))
    content = file.read_bytes()
    place = content.index(photo(2))
    file.write_bytes(content[: place + 8] + bytes(30) + content[place + 38 :])
    rows = load_corpus(file, shares=(1, 0, 0))["train"]
    photos = PhotoDataset(rows, CorpusIndex.from_dataset(rows), image_size=8, seed=0, augment=False)
    assert photos[3]["pixel_values"][0, 0, 0] == 3
    with pytest.raises(UnreadablePhoto, match=r"photo of row 2 cannot be read: tarphoto.*x.tar!/set/00002.png"):
        photos[2]


def test_rows_tell_their_shards(shards, garments, tmp_path):
    rows = load_corpus(shards)["train"]
    assert shards_of(rows).tolist() == [0] * 6 + [-1] * 6
    for number in (3, 1, 2):
        write_shard(tmp_path / "more" / f"{number}.tar", range(number * 10, number * 10 + number))
    more = load_corpus(tmp_path / "more", shares=(1, 0, 0))["train"]
    assert shards_of(more).tolist() == [0, 1, 1, 2, 2, 2]
    assert shards_of(more.select([5, 0, 4])).tolist() == [0, 1, 0]
    assert shards_of(garments) is None


def test_odd_samples(tmp_path, caplog):
    with tarfile.open(tmp_path / "x.tar", "w") as shard:
        add(shard, "1.txt", b"no photo")
        add(shard, "2.JPG", photo(2))
        add(shard, "2.json", b"{oops")
        add(shard, "3.png", photo(3))
        add(shard, "._3.png", b"what some systems leave")
        add(shard, "3.json", b'{"caption": "a hat", "text": "a cap", "item_id": ""}')
        add(shard, "4.a.png", photo(4))
    for in_place in (False, True):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            rows = list(read_shard(str(tmp_path / "x.tar"), ("text", "item_id", "caption"), in_place))
        assert [(row["text"], row["item_id"], row["caption"]) for row in rows] == [
            (None, "2", None),
            ("a cap", "3", "a hat"),
        ]
        assert "skipped 2 samples without a photo" in caplog.text and "JSON cannot be read" in caplog.text
        assert (rows[0]["image"]["bytes"] is None) == in_place


# --------------------------------------------------------------------------------------------- damage
@pytest.mark.parametrize("in_place", [False, True])
def test_a_shard_cut_anywhere_gives_whole_samples_and_a_warning(in_place, tmp_path, caplog):
    """A sample is known to be whole when what is behind it, the next sample's photo or the end mark, can be read."""
    file = write_shard(tmp_path / "x.tar", range(3))
    whole = file.read_bytes()
    rows = list(read_shard(str(file), ("text", "price"), in_place))
    size = 3 * 1024  # header and content of three members
    assert whole[3 * size :] == bytes(len(whole) - 3 * size) and whole[3 * size - 1024 :][:512] != bytes(512)
    known = [size + 512 + len(photo(1)), 2 * size + 512 + len(photo(2)), 3 * size + 512]
    for cut in [*range(512, 3 * size + 1024, 128), *known, *(cut - 1 for cut in known)]:
        caplog.clear()
        file.write_bytes(whole[:cut])
        with caplog.at_level(logging.WARNING):
            assert (
                list(read_shard(str(file), ("text", "price"), in_place)) == rows[: sum(end <= cut for end in known)]
            ), cut
        assert ("is cut short" in caplog.text) == (cut < 3 * size + 512), cut


def test_a_cut_or_broken_shard_is_reported(tmp_path, caplog):
    file = write_shard(tmp_path / "x.tar", range(20))
    whole = file.read_bytes()
    file.write_bytes(whole[: 512 * 55])
    report, _, _ = check_corpus(file)
    assert any("is cut short" in finding.message for finding in report.findings)
    assert len(load_corpus(file, shares=(1, 0, 0))["train"]) == 8
    file.write_bytes(whole[: 1024 * 30] + b"oops" + whole[1024 * 30 + 4 :])  # the header of sample 10's photo
    with caplog.at_level(logging.WARNING):
        assert len(list(read_shard(str(file), ("text",), in_place=True))) == 9
    assert "is cut short (or damaged, at byte 30,720)" in caplog.text
    packed = gzip.compress(whole)
    (tmp_path / "y.tar.gz").write_bytes(packed[: len(packed) // 2])
    rows = list(read_shard(str(tmp_path / "y.tar.gz"), ("text",)))
    assert 0 < len(rows) < 20 and "y.tar.gz is cut short" in caplog.text
    file.write_bytes(b"no tar at all")
    with pytest.raises(ValueError, match=r"x\.tar cannot be read as a tar shard.*again"):
        load_corpus(file)


@pytest.mark.parametrize("read", [open_streams, load_corpus])
def test_members_that_lead_out_are_refused(read, tmp_path):
    def refused(member, message, late=False):
        with tarfile.open(tmp_path / "x.tar", "w") as shard:
            for number in range(150 if late else 0):
                add(shard, f"{number}.png", photo(0))
            shard.addfile(member, io.BytesIO(bytes(member.size)))
        with pytest.raises(ValueError, match=message):
            for stream in read(tmp_path / "x.tar").values():
                list(stream)

    for name in ("../out.png", "/etc/out.png", "a/../../out.png", "../out.txt"):
        for late in (False, True):  # among the samples that tell the columns, and behind them
            refused(tarfile.TarInfo(name), r"x\.tar names .*out\....', which leads out of its folder", late)
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = kind, "/etc/passwd"
        refused(link, "'1.png' is a link to '/etc/passwd'.*dereference")


def test_members_with_holes_or_too_large_are_refused(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "x.tar", "w") as shard:
        holes = tarfile.TarInfo("1.png")
        holes.type = tarfile.GNUTYPE_SPARSE
        shard.addfile(holes)
    with pytest.raises(ValueError, match="'1.png' is stored with holes.*without tar's --sparse"):
        load_corpus(tmp_path / "x.tar")
    file = write_shard(tmp_path / "y.tar", range(1))
    monkeypatch.setattr("syncmask.processing.readers_shards.LARGEST_MEMBER", 60)
    with pytest.raises(ValueError, match="'set/00000.png' has 69 bytes; wanted at most 60. Leave it out"):
        load_corpus(file)


def test_addresses_of_shards_are_refused():
    for source in ("s3://bucket/shards", "https://host/train-{0000..0009}.tar", "file:///data"):
        with pytest.raises(ValueError, match="is an address; wanted a file or folder here.*download or mount it"):
            load_corpus(source)


def test_a_table_from_elsewhere_may_not_name_places_in_files(tmp_path):
    secret = write_shard(tmp_path / "secret.tar", range(1))
    (tmp_path / "set").mkdir()
    for name in (tar_place(secret, 512, 69, "1.png"), f"file://{secret}", f"simplecache::file://{secret}"):
        rows = {"image": [name] * 3, "text": ["a"] * 3, "item_id": ["1", "2", "3"]}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "set" / "rows.parquet")
        with pytest.raises(ValueError, match="names .*; wanted files in its folder or http://"):
            load_corpus(tmp_path / "set")
        rows["image"] = [{"bytes": None, "path": name}] * 3
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "set" / "rows.parquet")
        found = undecoded(load_corpus(tmp_path / "set", shares=(1, 0, 0))["train"])[0]["image"]
        with pytest.raises(UnreadablePhoto, match="does not exist"):
            read_photo(found, 0)


# ------------------------------------------------------------------------------------------- a whole run
class Killed(Exception):
    pass


@pytest.fixture
def _restore_torch():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.usefixtures("_restore_torch")
def test_a_run_on_shards_groups_in_blocks_and_resumes_bit_for_bit(garments, tmp_path, monkeypatch):
    from syncmask.training import contrast, resume
    from syncmask.training.pretrain import main

    for number in range(4):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as shard:
            for row in garments.select(range(number * 29, number * 29 + 29)):
                key, drawn = f"{row['item_id']}-{row['view']}", io.BytesIO()
                row["image"].save(drawn, "PNG")
                add(shard, f"{key}.png", drawn.getvalue())
                add(shard, f"{key}.json", json.dumps({"item_id": row["item_id"], "text": row["text"]}).encode())
    monkeypatch.setattr(contrast, "ITM_LEARNED", 9.0)  # grouped batches from the second epoch on

    def train(folder, *more):
        settings = (
            f"--corpus {tmp_path} --shuffle_buffer 40 --image_size 32 --preset tiny --grouping grouped --num_workers 2 "
            "--per_device_batch_size 8 --epochs 3 --num_threads 1 --log_every 1 --log_batches --deterministic "
            "--checkpoint_every 5 --no-evaluate --run_name run"
        )
        overrides = ["--model_overrides", '{"patch_size": 8, "projection_dim": 16}']
        main([*settings.split(), *overrides, "--output_dir", str(folder), *more])
        lines = [json.loads(line) for line in (folder / "run" / "batches.jsonl").read_text().splitlines()]
        return lines, (folder / "run" / "final" / "model.safetensors").read_bytes()

    whole = train(tmp_path / "whole")
    calls, save = [], resume.save_checkpoint

    def save_and_die(*args, **kwargs):
        save(*args, **kwargs)
        calls.append(1)
        if len(calls) == 4:
            raise Killed

    monkeypatch.setattr(resume, "save_checkpoint", save_and_die)
    with pytest.raises(Killed):
        train(tmp_path / "cut")
    monkeypatch.setattr(resume, "save_checkpoint", save)
    assert train(tmp_path / "cut", "--resume") == whole
    metrics = [json.loads(line) for line in (tmp_path / "whole" / "run" / "metrics.jsonl").read_text().splitlines()]
    plans = [line for line in metrics if line["split"] == "batches"]
    assert [plan["grouped"] for plan in plans] == [False, True, True]
    assert all(plan["same_item_pairs"] == 0 for plan in plans)
    # The rows of the first batch of an epoch are of one block of at most 40 consecutive rows.
    assert all(max(line["rows"]) - min(line["rows"]) < 40 for line in whole[0] if line["step"] == 1)
