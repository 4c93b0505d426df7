"""FashionGen's HDF5, FashionIQ's folder: made here in their true layouts, whole and damaged."""

import io
import json
import logging
import multiprocessing
import pickle

import datasets
import h5py
import numpy as np
import pytest
from PIL import Image

from syncmask.processing.check import check_corpus
from syncmask.processing.convert import convert
from syncmask.processing.corpus import fingerprint, load_corpus, open_streams
from syncmask.processing.readers_fashiongen import FashionGenFile, read_rows
from syncmask.processing.readers_fashioniq import join_captions, load_fashioniq, read_fashioniq
from syncmask.processing.readers_folder import read_folder, split_of_file
from syncmask.processing.safe_paths import inside, refuse_climbing


# ------------------------------------------------------------------------------------------- fashiongen
@pytest.fixture
def fashiongen(write_fashiongen, garments, tmp_path):
    """Train and validation files of the generated corpus, items apart."""
    rows = list(garments)
    cut = next(n for n, row in enumerate(rows) if row["item_id"] == "garment-000030")
    (tmp_path / "fashiongen").mkdir()
    write_fashiongen(tmp_path / "fashiongen" / "fashiongen_256_256_train.h5", rows[:cut])
    write_fashiongen(tmp_path / "fashiongen" / "fashiongen_256_256_validation.h5", rows[cut:])
    return tmp_path / "fashiongen"


def test_fashiongen_rows(fashiongen, garments):
    corpus = load_corpus(fashiongen)
    assert set(corpus) == {"train", "validation"} and sum(map(len, corpus.values())) == len(garments)
    train = corpus["train"]
    for row, wanted in zip(train, garments, strict=False):
        assert row["text"] == row["description"] == f"{wanted['text']} Décolleté à l'été."
        assert row["name"] == f"Café {wanted['category']}" and row["category"] == wanted["category"].upper()
        assert row["item_id"] == str(int(wanted["item_id"].split("-")[1])) and row["view"] == wanted["view"]
        assert np.array_equal(np.asarray(row["image"]), np.asarray(wanted["image"].convert("RGB")))
    assert train[0]["name_and_description"].startswith(f"Café {garments[0]['category']}. ")
    assert [row["source_row"] for row in train.select_columns("source_row")] == list(range(len(train)))
    titled = load_corpus(fashiongen, text_column="concat_description")["train"]
    assert titled[0]["text"] == garments[0]["text"].replace(" ", ".") and titled[0]["source_text"] == train[0]["text"]
    streamed = open_streams(fashiongen, text_column="concat_description")["train"]
    assert next(iter(streamed))["text"] == titled[0]["text"]
    assert streamed.features == titled.features and streamed.rows == len(titled)
    assert len(set(load_corpus(fashiongen / "fashiongen_256_256_train.h5"))) == 3  # no second file: split by item


@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_fashiongen_reads_whole_chunks(chunk, write_fashiongen, garments, tmp_path, monkeypatch):
    rows = list(garments.select(range(30)))
    file = FashionGenFile(write_fashiongen(tmp_path / "train.h5", rows, chunk))
    monkeypatch.setattr("syncmask.processing.readers_fashiongen.BLOCK_BYTES", 10 * 32 * 32 * 3)
    assert file.block_rows == {None: 10, 1: 10, 7: 7}[chunk]
    read = []
    plain = h5py.Dataset.__getitem__
    monkeypatch.setattr(
        h5py.Dataset, "__getitem__", lambda self, key: (read.append((self.name, key)), plain(self, key))[1]
    )
    assert [row["source_row"] for row in file.rows(0, 30)] == list(range(30))
    starts = [key.start for name, key in read if name == "/input_image"]
    assert starts == list(range(0, 30, file.block_rows))
    monkeypatch.setattr("syncmask.processing.readers_fashiongen.LARGEST_BLOCK", 3 * 32 * 32 * 3)
    assert file.block_rows == 3  # a chunk that is too large for memory is read in parts


def _first_text(file):
    return file[0]["text"], file._owner


def test_fashiongen_handle_belongs_to_its_process(fashiongen):
    file = FashionGenFile(fashiongen / "fashiongen_256_256_train.h5")
    assert file._handle is None  # nothing is opened by making one
    text = file[0]["text"]
    assert pickle.loads(pickle.dumps(file))._handle is None
    with multiprocessing.get_context("fork").Pool(1) as pool:
        theirs, owner = pool.apply(_first_text, (file,))
    assert theirs == text and owner != file._owner
    assert file[len(file) - 1]["text"] == file[-1]["text"]
    with pytest.raises(IndexError, match="rows of"):
        file[len(file)]


def test_damaged_fashiongen_is_named(fashiongen, write_fashiongen, garments, tmp_path):
    whole = (fashiongen / "fashiongen_256_256_train.h5").read_bytes()
    (tmp_path / "half.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.h5 .* cut short.*download it again"):
        load_corpus(tmp_path / "half.h5")
    (tmp_path / "empty.h5").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.h5 \(0 bytes\)"):
        open_streams(tmp_path / "empty.h5")
    for change, message in (
        (lambda out: out.__delitem__("input_description"), "lacks the keys input_description; it has"),
        (
            lambda out: (out.__delitem__("input_name"), out.create_dataset("input_name", data=[[b"a"]])),
            "differ in length",
        ),
        (
            lambda out: (out.__delitem__("input_image"), out.create_dataset("input_image", data=np.ones(4))),
            "wanted .rows",
        ),
    ):
        file = write_fashiongen(tmp_path / "bad.h5", list(garments.select(range(4))))
        with h5py.File(file, "a") as out:
            change(out)
        with pytest.raises(ValueError, match=message):
            open_streams(file)
    (tmp_path / "two").mkdir()
    for name in ("a_train.h5", "b_train.h5"):
        (tmp_path / "two" / name).write_bytes(whole)
    with pytest.raises(ValueError, match="both look like split 'train'"):
        load_corpus(tmp_path / "two")


def test_a_damaged_chunk_costs_its_rows_alone(write_fashiongen, garments, tmp_path):
    file = write_fashiongen(tmp_path / "train.h5", list(garments.select(range(12))), chunk=4)
    with h5py.File(file, "r") as out:
        place = out["input_image"].id.get_chunk_info(1)
    content = bytearray(file.read_bytes())
    content[place.byte_offset : place.byte_offset + place.size] = bytes(place.size)
    file.write_bytes(content)
    found = list(read_rows(str(file), 0, 12))
    assert [row["image"] is None for row in found] == [False] * 4 + [True] * 4 + [False] * 4
    done = convert(file, tmp_path / "out")
    assert done.rows == {"train": 8} and {one["reason"] for one in done.skipped} == {"image: the row holds no photo"}


def test_fashiongen_without_h5py(fashiongen, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(ImportError, match=r"pip install 'syncmask\[fashiongen\]'"):
        load_corpus(fashiongen)


def test_fashiongen_converted_and_checked(fashiongen, tmp_path):
    done = convert(fashiongen, tmp_path / "out", piece_rows=10)
    direct, converted = load_corpus(fashiongen), load_corpus(tmp_path / "out")
    assert done.rows == {name: len(rows) for name, rows in direct.items()} and not done.skipped
    for name, rows in direct.items():
        assert fingerprint(rows).split("-")[1:] == fingerprint(converted[name]).split("-")[1:]
        assert converted[name].column_names == rows.column_names
        for one, other in ((rows[0], converted[name][0]), (rows[-1], converted[name][-1])):
            assert np.array_equal(np.asarray(one.pop("image")), np.asarray(other.pop("image"))) and one == other
    report, found, _ = check_corpus(fashiongen)
    again, _, _ = check_corpus(tmp_path / "out")
    assert report.may_start and report.splits == again.splits and report.classes == again.classes
    assert {photo.width for photo in found.photos} == {32}


# ------------------------------------------------------------------------------------------- fashioniq
@pytest.fixture
def fashioniq(write_fashioniq, garments, tmp_path):
    return write_fashioniq(tmp_path / "fashioniq", garments)


def test_fashioniq_triplets_and_galleries(fashioniq):
    found = read_fashioniq(fashioniq)
    assert {name: len(rows) for name, rows in found.triplets.items()} == {"train": 9, "validation": 9}
    row = found.triplets["train"][0]
    assert row["candidate_id"] == "B000000000" and row["item_id"] == "B000000001" and row["category"] == "dress"
    assert row["captions"] == ["is 1 tones", "is longer"] and row["text"] == "is 1 tones and is longer"
    assert row["image"].size == row["candidate"].size == (32, 32)
    assert found.triplets["validation"][3]["captions"] == ["has stripes"]
    original, val = found.gallery("original", "dress"), found.gallery("val", "dress")
    assert original["item_id"][:] == [f"B{n:09d}" for n in range(6, 11)]
    assert val["item_id"][:] == [f"B{n:09d}" for n in range(6, 10)]
    assert found.comparable and found.leaks == {"toptee in shirt": 1}
    with pytest.raises(ValueError, match="wanted .'original', 'val'."):
        found.gallery("all", "dress")
    assert join_captions(["a", " ", "b"], swapped=True) == "b and a"


def test_fashioniq_without_a_third_of_its_photos(fashioniq, caplog):
    gone = sorted((fashioniq / "images").iterdir())[::3]
    for file in gone[1:]:
        file.unlink()
    gone[0].write_bytes(b"")  # what a broken download leaves
    with caplog.at_level(logging.WARNING):
        found = read_fashioniq(fashioniq)
    assert not found.comparable
    assert set().union(*found.missing.values()) == {file.stem for file in gone if file.stem < "B000000039"} - {
        f"B{n:09d}"
        for n in (11, 12, 24, 25, 37, 38)  # the test split is not read
    }
    assert "dress/val: 2 photos are missing (B000000006, B000000009); scores with missing photos are not" in caplog.text
    assert len(found.gallery("original", "dress")) == 3
    report, _, _ = check_corpus(fashioniq)
    assert any("photos are missing" in finding.message for finding in report.findings)
    assert any("toptee in shirt" in finding.message for finding in report.findings)


def test_fashioniq_as_a_corpus_and_converted(fashioniq, tmp_path):
    (fashioniq / "images" / "B000000002.jpg").unlink()
    corpus = load_corpus(fashioniq)
    assert {name: len(rows) for name, rows in corpus.items()} == {"train": 8, "validation": 9}
    assert corpus["train"].column_names[:4] == ["image", "text", "item_id", "candidate"]
    done = convert(fashioniq, tmp_path / "out")
    assert done.rows == {"train": 8, "validation": 9, "galleries/gallery": 16}
    direct, converted = read_fashioniq(fashioniq), load_fashioniq(tmp_path / "out")
    assert converted.missing == direct.missing and converted.leaks == direct.leaks
    for gallery in ("original", "val"):
        for kind in ("dress", "shirt", "toptee"):
            ours, theirs = direct.gallery(gallery, kind), converted.gallery(gallery, kind)
            assert ours["item_id"][:] == theirs["item_id"][:]
            assert np.array_equal(np.asarray(ours[0]["image"]), np.asarray(theirs[0]["image"]))
    for name, rows in load_corpus(tmp_path / "out").items():
        assert rows["text"][:] == corpus[name]["text"][:] == converted.triplets[name]["text"][:]
        assert rows[0]["candidate"].tobytes() == corpus[name][0]["candidate"].tobytes()
    with pytest.raises(FileNotFoundError, match="is not FashionIQ"):
        load_fashioniq(tmp_path)


def test_bad_fashioniq_is_named(fashioniq):
    captions = fashioniq / "captions" / "cap.dress.train.json"
    good = captions.read_text()
    for content, message in (
        ("[{oops", "cap.dress.train.json is no JSON"),
        ("{}", "holds a dict; wanted a list"),
        ('[{"candidate": "A"}]', "entry 0 .* wanted candidate, target and captions"),
        ('[{"candidate": "../../secret", "target": "A", "captions": []}]', "names the photo '../../secret'"),
    ):
        captions.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_corpus(fashioniq)
    captions.write_text(good)
    (fashioniq / "image_splits" / "split.shirt.val.json").unlink()
    with pytest.raises(FileNotFoundError, match="split.shirt.val.json does not exist"):
        load_corpus(fashioniq)
    (fashioniq / "images").rename(fashioniq / "photos")
    with pytest.raises(FileNotFoundError, match="no images/ folder"):
        load_corpus(fashioniq)


@pytest.mark.slow
def test_the_true_fashioniq_files(real_data, tmp_path):
    """Counts of the published files; its photos are replaced by one, so that every id has one."""
    source = real_data / "fashion_iq"
    for name in ("captions", "image_splits"):
        (tmp_path / name).symlink_to(source / name)
    (tmp_path / "images").mkdir()
    pixel = io.BytesIO()
    Image.new("RGB", (2, 2)).save(pixel, "PNG")
    (tmp_path / "images" / "pixel.png").write_bytes(pixel.getvalue())
    ids = {one for file in (source / "image_splits").glob("*.val.json") for one in json.loads(file.read_text())}
    for one in ids:
        (tmp_path / "images" / f"{one}.png").hardlink_to(tmp_path / "images" / "pixel.png")
    found = read_fashioniq(tmp_path)
    sizes = [len(found.gallery(name, kind)) for name in ("original", "val") for kind in ("dress", "shirt", "toptee")]
    assert sizes == [3817, 6346, 5373, 2628, 3089, 2902] and len(found.triplets["validation"]) == 6016
    assert found.leaks == {"shirt in toptee": 419, "toptee in shirt": 392}
    assert found.comparable and len(found.missing["dress/train"]) > 11_000


# ---------------------------------------------------------------------------------------------- safety
def photo(number, size=(6, 5)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "x/../../a.png", "C:\\a.png", "..\\a.png", "\\\\host\\a.png"])
def test_names_that_climb_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="m.jsonl names .*, which leads out of its folder. Put the file inside"):
        refuse_climbing(name, "m.jsonl")
    with pytest.raises(ValueError, match="leads out"):
        inside(tmp_path, [name], "m.jsonl")
    for metadata in (json.dumps({"file_name": name, "text": "a", "item_id": "1"}),):
        (tmp_path / "metadata.jsonl").write_text(metadata + "\n")
        with pytest.raises(ValueError, match="metadata.jsonl names"):
            load_corpus(tmp_path)


def test_links_out_of_the_folder_are_refused(tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(photo(1))
    (folder / "sub" / "own.png").write_bytes(photo(2))
    (folder / "near.png").symlink_to(folder / "sub" / "own.png")
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    assert inside(folder, ["near.png", None, "sub/own.png", "sub/../sub/own.png", "none/gone.png"], "m") == [
        str(folder / "near.png"),
        None,
        *[str(folder / "sub" / "own.png")] * 2,
        str(folder / "none" / "gone.png"),
    ]
    for name in ("out.png", "up/secret.png"):
        with pytest.raises(ValueError, match=f"m names '{name}', a symbolic link out of .*folder"):
            inside(folder, [name], "m")
    (tmp_path / "linked").symlink_to(folder)  # the corpus itself may be reached by a link
    assert inside(tmp_path / "linked", ["sub/own.png"], "m") == [str(folder / "sub" / "own.png")]


def test_parquet_may_not_name_files_outside(tmp_path):
    (tmp_path / "secret.png").write_bytes(photo(1))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "own.png").write_bytes(photo(2))

    def write(image):
        rows = {"image": [image] * 3, "text": ["a"] * 3, "item_id": ["1", "2", "3"]}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "set" / "rows.parquet")

    for image in (str(tmp_path / "secret.png"), "../secret.png"):
        for cell in (image, {"bytes": None, "path": image}):
            write(cell)
            with pytest.raises(ValueError, match="secret.png', which leads out"):
                load_corpus(tmp_path / "set")
    for cell in ("own.png", {"bytes": None, "path": "own.png"}, {"bytes": photo(2), "path": "/elsewhere/own.png"}):
        write(cell)
        assert load_corpus(tmp_path / "set", shares=(1, 0, 0))["train"][0]["image"].getpixel((0, 0)) == (2, 0, 0)


# --------------------------------------------------------------------------------------------- hub names
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."),
            "it is gated. Accept",
        ),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist"), "no such dataset, or it is private"),
        (ConnectionError("Couldn't reach the Hub"), "cannot be reached from here"),
    ],
)
def test_hub_sets_that_cannot_be_had(error, message, monkeypatch):
    def fail(name):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(FileNotFoundError, match=f"'a/b'.*{message}.*pass their folder instead of 'a/b'"):
        load_corpus("a/b")


def test_marqo_columns(monkeypatch):
    rows = {
        "image": [{"bytes": photo(n), "path": None} for n in range(20)],
        "text": [f"shirt {n}" for n in range(20)],
        "item_ID": list(range(20)),
        **{f"category{level}": [f"c{level}"] * 20 for level in (1, 2, 3)},
    }
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(data=table))
    corpus = load_corpus("Marqo/some-set")
    assert set(corpus) == {"train", "validation", "test"}
    row = corpus["train"][0]
    assert (row["category"], row["subcategory"], row["category3"]) == ("c1", "c2", "c3")
    assert row["item_id"] == row["text"].split()[1]


def test_split_of_file(tmp_path):
    names = ["val-00000-of-00002.parquet", "train/x.tar", "part-0.tar", "dev.parquet", "test/val-1.tar"]
    found = [split_of_file(tmp_path / name, tmp_path) for name in names]
    assert found == ["validation", "train", "all", "validation", "validation"]
    assert split_of_file(tmp_path, tmp_path) == "all"


def test_lines_that_are_no_json(tmp_path):
    for line in (b"{oops", b"\xff\xfe", b"[1]"):
        (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png"}\n' + line + b"\n")
        with pytest.raises(ValueError, match="metadata.jsonl, line 2"):
            read_folder(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(ValueError, match="metadata.parquet cannot be read as parquet.*again"):
        read_folder(tmp_path)
