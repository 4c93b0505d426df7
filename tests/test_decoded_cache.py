"""Photos that are decoded once: the same pixels as without a cache, whole or absent, never another photo's."""

import errno
import io
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import tarfile
import time
from collections import namedtuple

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from syncmask.evaluation.history import read_history
from syncmask.processing import collator, decoded_cache
from syncmask.processing.augment import Augmentation
from syncmask.processing.collator import PhotoDataset, UnreadablePhoto
from syncmask.processing.corpus import CorpusIndex
from syncmask.processing.decoded_cache import decoding_name, photo_name
from syncmask.processing.tar_photos import tar_place
from syncmask.training import photo_cache
from syncmask.training.faults import RunStopped
from syncmask.training.photo_cache import check_cache, distinct_photos


def table(images, **columns):
    many = {"image": images, "text": ["a coat"] * len(images), "item_id": [str(row) for row in range(len(images))]}
    rows = datasets.Dataset.from_dict(many | columns)
    for name in ("image", *columns):
        rows = rows.cast_column(name, datasets.Image())
    return rows


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Photos of several sizes, modes and formats; one lies on its side."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (6, 9, 4), dtype=np.uint8)).resize((300, 200))
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.convert("RGB").save(folder / "0.jpg", exif=exif)
    for number, mode in enumerate(("RGBA", "L", "P", "LA"), start=1):
        noise.convert(mode).resize((32, 20 + number)).save(folder / f"{number}.png")
    return sorted(map(str, folder.iterdir()))


def photos(rows, cache=None, **options):
    options = {"image_size": 32, "seed": 0, "augment": True, "decoded_cache": cache} | options
    return PhotoDataset(rows, CorpusIndex.from_dataset(rows), **options)


def pixels_of(dataset, epochs=2):
    keys = [(epoch, row) for epoch in range(epochs) for row in range(len(dataset))]
    records = dataset.__getitems__(keys)
    return [record[name] for record in records for name in record if name.endswith("pixel_values")]


def same(one, other):
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other))


def kept(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def no_decoding(monkeypatch):
    """A function from whose call on no photo can be decoded."""

    def fail(*_):
        raise AssertionError("decoded")

    return lambda: monkeypatch.setattr(collator, "read_photo", fail)


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"augment": False}, {"fast_decode": True}, {"augment": Augmentation((0.3, 1))}]
)
def test_pixels_are_the_same_without_a_cache_with_a_new_one_and_with_a_full_one(
    files, tmp_path, no_decoding, options, embedded
):
    cells = [{"bytes": open(path, "rb").read(), "path": None} for path in files] if embedded else files
    rows = table(cells, candidate=cells[::-1])
    options |= {"reference_column": "candidate"}
    wanted = pixels_of(photos(rows, **options))
    assert same(pixels_of(photos(rows, str(tmp_path), **options)), wanted)
    assert len(kept(tmp_path)) == len(files)  # references are the same photos
    no_decoding()
    again = photos(rows.select([2, 0, 1, 4, 3]), str(tmp_path), **options)  # another run's rows
    assert np.array_equal(again[(0, 1)]["pixel_values"], pixels_of(again)[2])
    assert same(pixels_of(photos(rows, str(tmp_path), **options)), wanted)


def test_a_photo_in_a_shard_is_kept(files, tmp_path, no_decoding):
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as file:
        file.add(files[1], "1.png")
    with tarfile.open(shard) as file:
        at = file.getmember("1.png")
    rows = table([tar_place(shard, at.offset_data, at.size, at.name)])
    wanted = pixels_of(photos(table(files[1:2])))
    assert same(pixels_of(photos(rows, str(tmp_path / "cache"))), wanted)
    no_decoding()
    assert same(pixels_of(photos(rows, str(tmp_path / "cache"))), wanted)


def test_another_photo_or_another_decoding_is_never_taken(files, tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    shutil.copy(files[0], path)
    rows, cache = table([str(path)]), str(tmp_path / "cache")
    pixels_of(photos(rows, cache))
    Image.new("RGB", (40, 30), "red").save(path)  # the photo was mended: same place, other bytes
    assert same(pixels_of(photos(rows, cache)), pixels_of(photos(rows)))
    # A file of the same size at the same place, later; and one of the same size and time at another place.
    before = photo_name({"bytes": None, "path": str(path)})
    os.utime(path, ns=(1, 1))
    shutil.copy2(path, tmp_path / "b.jpg")
    names = {before, *(photo_name({"bytes": None, "path": str(tmp_path / name)}) for name in ("a.jpg", "b.jpg"))}
    names |= {photo_name({"bytes": content, "path": "a.jpg"}) for content in (b"1", b"2")}
    assert len(names) == 5 and None not in names
    monkeypatch.chdir(tmp_path)
    assert photo_name({"bytes": None, "path": "a.jpg"}) in names  # by whatever path
    for cell in (None, {"bytes": None, "path": None}, {"bytes": None, "path": "https://no.where/a.jpg"}):
        assert photo_name(cell) is None
    settings = {decoding_name(None, 3), *(decoding_name(*fast) for fast in ((263, 3), (264, 3), (263, 5)))}
    with monkeypatch.context() as patch:
        patch.setattr(decoded_cache.features, "version", lambda name: f"{name} of tomorrow")
        settings.add(decoding_name(None, 3))
    with monkeypatch.context() as patch:
        patch.setattr(decoded_cache.PIL, "__version__", "99.0")
        settings.add(decoding_name(None, 3))
    with monkeypatch.context() as patch:
        patch.setattr(decoded_cache, "DECODING", 99)
        settings.add(decoding_name(None, 3))
    assert len(settings) == 7


def test_a_photo_that_cannot_be_read_is_as_without_a_cache(files, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(open(files[1], "rb").read()[:60])
    rows, cache = table([str(path)]), tmp_path / "cache"
    for _ in range(2):
        with pytest.raises(UnreadablePhoto) as problem:
            photos(rows, str(cache))[0]
        with pytest.raises(UnreadablePhoto) as plain:
            photos(rows)[0]
        assert str(problem.value) == str(plain.value) and kept(cache) == []
    shutil.copy(files[1], path)
    photos(rows, str(cache))[0]
    assert len(kept(cache)) == 1
    path.unlink()  # kept, but it is the same run as one without a cache
    with pytest.raises(UnreadablePhoto):
        photos(rows, str(cache))[0]


class Evil:
    def __reduce__(self):
        return os.putenv, ("SYNCMASK_EVIL", "1")


def evil():
    file = io.BytesIO()
    np.save(file, np.array([Evil()], dtype=object), allow_pickle=True)
    return file.getvalue()


def test_what_a_power_cut_leaves_is_written_anew_and_nothing_is_unpickled(files, tmp_path, monkeypatch):
    rows, cache = table(files[:1]), tmp_path / "cache"
    wanted = pixels_of(photos(rows, str(cache)))
    (path,) = kept(cache)
    whole = path.read_bytes()
    other = io.BytesIO()
    np.save(other, np.zeros((2, 2), dtype=np.uint8))
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled"))
    for broken in (b"", whole[:40], whole[:-1], b"\0" * len(whole), other.getvalue(), evil()):
        path.write_bytes(broken)
        assert same(pixels_of(photos(rows, str(cache))), wanted)
        assert path.read_bytes() == whole


def test_a_full_disk_ends_the_keeping_alone(files, tmp_path, monkeypatch, caplog):
    rows, real, calls = table(files), np.lib.format.write_array, []

    def write(file, *args, **kwargs):
        calls.append(1)
        if len(calls) > 2:
            file.write(b"half a photo")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, *args, **kwargs)

    monkeypatch.setattr(np.lib.format, "write_array", write)
    assert same(pixels_of(photos(rows, str(tmp_path))), pixels_of(photos(rows)))
    assert len(calls) == 3 and len(kept(tmp_path)) == 2
    assert len(caplog.records) == 1 and "No space left" in caplog.text and str(tmp_path) in caplog.text


def fill(rows, cache, order, started):
    torch.set_num_threads(1)
    dataset = photos(rows, cache)
    for row in order:
        dataset[int(row)]
        started.set()


def test_processes_that_write_at_once_and_are_killed_leave_whole_photos_alone(files, tmp_path):
    rng = np.random.default_rng(1)
    big = []
    for _ in range(12):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (300, 300, 3), dtype=np.uint8)).save(file, "BMP")
        big.append({"bytes": file.getvalue(), "path": None})
    rows, fork = table(big), multiprocessing.get_context("fork")
    wanted, seen = pixels_of(photos(rows), epochs=1), set()
    for number in range(4):
        cache, started = tmp_path / str(number), fork.Event()
        writers = [
            fork.Process(target=fill, args=(rows, str(cache), np.roll(np.arange(12), -shift), started))
            for shift in (0, 0, 3)
        ]
        for one in writers:
            one.start()
        started.wait(20)
        time.sleep(0.003 * number)
        for one in writers:
            os.kill(one.pid, signal.SIGKILL)
        for one in writers:
            one.join()
        whole = [path for path in kept(cache) if path.suffix == ".npy"]
        seen.add(len(whole))
        for path in whole:
            assert np.load(path, allow_pickle=False).shape == (300, 300, 3)
        assert same(pixels_of(photos(rows, str(cache)), epochs=1), wanted)
        assert same(pixels_of(photos(rows, str(cache)), epochs=1), wanted)
    assert max(seen) > 0


def test_workers_fill_one_cache(files, tmp_path, no_decoding):
    rows = table(files)
    keys = [[(0, 0), (0, 1)], [(0, 2), (0, 0)], [(0, 3), (0, 4)]]
    loader = DataLoader(photos(rows, str(tmp_path)), batch_sampler=keys, collate_fn=list, num_workers=2)
    found = [record["pixel_values"] for batch in loader for record in batch]
    assert len(kept(tmp_path)) == len(files)
    no_decoding()
    assert same(found, [photos(rows, str(tmp_path))[key]["pixel_values"] for batch in keys for key in batch])


# --------------------------------------------------------------------------------------------- before training


def test_what_is_kept_is_told_before_training(files, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    dataset = photos(table(files, candidate=files[::-1]), str(tmp_path), fast_decode=True, reference_column="candidate")
    assert distinct_photos(dataset) == 5
    check_cache(dataset)
    assert caplog.messages[-1] == f"decoded cache: 0 of 5 photos, 0 MB of 0 MB at {dataset.cache.folder}"
    before = [dataset.cache.bytes_of({"bytes": None, "path": path}) for path in files]
    pixels_of(dataset)
    after = [dataset.cache.bytes_of({"bytes": None, "path": path}) for path in files]
    for (told, here), (size, there) in zip(before, after):
        assert not here and there and told == size - 128  # a header of 128 bytes
    assert before[0][0] == 3 * 38 * 38  # the JPEG, shrunk to what crops need
    check_cache(dataset)
    assert caplog.messages[-1].startswith("decoded cache: 5 of 5 photos")
    embedded = photos(table([{"bytes": open(path, "rb").read(), "path": None} for path in files]), str(tmp_path))
    assert distinct_photos(embedded) == 5
    assert embedded.cache.bytes_of(embedded.rows[0]["image"]) == (3 * 300 * 200, False)  # exact decoding: its own size
    assert embedded.cache.bytes_of({"bytes": b"no photo", "path": None}) == (0, False)


def test_a_large_corpus_is_told_by_a_sample(files, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(photo_cache, "SAMPLE", 4)
    dataset = photos(table([*files[1:3]] * 10), str(tmp_path))
    sizes = []
    monkeypatch.setattr(dataset.cache, "bytes_of", lambda cell: (sizes.append(cell), (3_000_000, len(sizes) > 2))[1])
    monkeypatch.setattr(photo_cache, "distinct_photos", lambda _: 1000)
    check_cache(dataset)
    assert len(sizes) == 4
    assert caplog.messages[-1].startswith("decoded cache: about 500 of 1,000 photos, 1.5 GB of 3.0 GB at ")


def test_a_disk_without_room_or_rights_is_told_before_training(files, tmp_path, monkeypatch):
    dataset = photos(table(files), str(tmp_path / "cache"))
    monkeypatch.setattr(dataset.cache, "bytes_of", lambda cell: (10_000_000_000, False))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 52_000_000_000))
    with pytest.raises(RunStopped, match=r"5 photos take about 50\.0 GB.* 52\.5 GB .*52\.0 GB are free.*--fast_decode"):
        check_cache(dataset)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 53_000_000_000))
    check_cache(dataset)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(RunStopped, match="nothing can be written to .*--decoded_cache"):
        check_cache(photos(table(files), str(tmp_path / "file")))


@pytest.mark.slow
def test_a_run_is_the_same_bit_for_bit_with_and_without_a_cache(tmp_path, pretrain_tiny):
    shared = ("--num_items", "60", "--epochs", "2", "--log_every", "1", "--no-evaluate")
    cache = ("--decoded_cache", str(tmp_path / "cache"))
    pretrain_tiny(tmp_path / "none", *shared, "--estimate", *cache)
    assert not (tmp_path / "cache").exists()
    plain = pretrain_tiny(tmp_path / "plain", *shared)
    cold = pretrain_tiny(tmp_path / "cold", *shared, *cache, "--num_workers", "2")
    assert kept(tmp_path / "cache")
    warm = pretrain_tiny(tmp_path / "warm", *shared, *cache)
    lines = [[{**line, "time_s": 0} for line in read_history(run)] for run in (plain, cold, warm)]
    assert len(lines[0]) > 10 and lines[0] == lines[1] == lines[2]
    models = [(run / "final" / "model.safetensors").read_bytes() for run in (plain, cold, warm)]
    assert models[0] == models[1] == models[2]
