"""Every source brought to the one schema; splits, the index, the fingerprint."""

import csv
import json
import logging
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from typer.testing import CliRunner

from syncmask.processing import cli
from syncmask.processing.corpus import CorpusIndex, fingerprint, load_corpus
from syncmask.processing.readers_folder import SPLITS, write_folder
from syncmask.processing.splits import item_fraction


def make_rows(items=30, photos=2):
    return [
        {
            "file_name": f"{item}_{view}.png",
            "text": f"a red shirt number {item}",
            "item_id": f"i{item}",
            "view": str(view),
        }
        for item in range(items)
        for view in range(photos)
    ]


def write_photos(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows):
        Image.new("RGB", (6, 5), (number % 256, 0, 0)).save(folder / row["file_name"])


def write_jsonl(folder, rows):
    write_photos(folder, rows)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def write_csv(folder, rows):
    write_photos(folder, rows)
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def write_parquet_metadata(folder, rows):
    write_photos(folder, rows)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")
    return folder


def photos_as_bytes(folder, rows):
    photos = [{"bytes": (folder / row["file_name"]).read_bytes(), "path": None} for row in rows]
    features = datasets.Features(
        {"image": datasets.Image(), **{name: datasets.Value("string") for name in ("text", "item_id", "view")}}
    )
    columns = {name: [row[name] for row in rows] for name in ("text", "item_id", "view")}
    return datasets.Dataset.from_dict({"image": photos, **columns}, features=features)


def all_rows(corpus):
    return sorted((row["item_id"], row["view"], row["text"]) for rows in corpus.values() for row in rows)


# -------------------------------------------------------------------------------------------- sources
def test_every_source_gives_the_same_corpus(tmp_path):
    rows = make_rows()
    wanted = load_corpus(write_jsonl(tmp_path / "jsonl", rows))
    assert {name: len(part) for name, part in wanted.items()}.keys() == set(SPLITS)
    saved = photos_as_bytes(tmp_path / "jsonl", rows)
    saved.to_parquet(tmp_path / "rows.parquet")
    saved.save_to_disk(tmp_path / "saved")
    (tmp_path / "several").mkdir()
    saved.select(range(40)).to_parquet(tmp_path / "several" / "part-0.parquet")
    saved.select(range(40, 60)).to_parquet(tmp_path / "several" / "part-1.parquet")
    write_photos(tmp_path / "paths", rows)
    paths = [{"image": row.pop("file_name"), **row} for row in make_rows()]
    pyarrow.parquet.write_table(pa.Table.from_pylist(paths), tmp_path / "paths" / "rows.parquet")
    sources = [
        write_csv(tmp_path / "csv", rows),
        write_parquet_metadata(tmp_path / "parquet", rows),
        tmp_path / "rows.parquet",
        tmp_path / "saved",
        str(tmp_path / "several"),
        next((tmp_path / "saved").glob("*.arrow")),
        tmp_path / "paths",
    ]
    for source in sources:
        corpus = load_corpus(source)
        for split in SPLITS:
            for column in ("text", "item_id", "view"):
                assert corpus[split][column][:] == wanted[split][column][:], (source, split)
            assert corpus[split].column_names[:3] == ["image", "text", "item_id"]
        photo = corpus["test"][-1]["image"]
        assert photo.size == (6, 5) and photo.getpixel((0, 0)) == wanted["test"][-1]["image"].getpixel((0, 0))


@pytest.mark.parametrize("writer", [write_csv, write_jsonl, write_parquet_metadata])
def test_none_and_na_stay_texts(writer, tmp_path, caplog):
    rows = make_rows(6, 1)
    for row, text in zip(rows, ["None", "NA", "null", "", "  ", "--"]):
        row["text"] = text
    with caplog.at_level(logging.WARNING):
        corpus = load_corpus(writer(tmp_path / "folder", rows), shares=(1, 0, 0))
    assert corpus["train"]["text"][:] == ["None", "NA", "null"]
    assert "dropped 3 rows without a text" in caplog.text


def test_null_texts_items_and_missing_keys(tmp_path, caplog):
    rows = make_rows(4, 1)
    rows[0]["text"] = None
    rows[1]["item_id"] = None
    del rows[2]["view"]
    rows[3]["color"] = "red"
    corpus = load_corpus(write_jsonl(tmp_path / "folder", rows), shares=(1, 0, 0))
    assert corpus["train"]["item_id"][:] == ["i2", "i3"]
    assert corpus["train"]["view"][:] == [None, "0"] and corpus["train"]["color"][:] == [None, "red"]
    assert "1 rows without an item id" in caplog.text


def test_numbers_become_item_ids_and_case_of_names_does_not_matter(tmp_path):
    rows = [{"file_name": row["file_name"], "text": row["text"], "item_ID": n} for n, row in enumerate(make_rows(5, 1))]
    corpus = load_corpus(write_jsonl(tmp_path / "folder", rows), shares=(1, 0, 0))
    assert corpus["train"]["item_id"][:] == ["0", "1", "2", "3", "4"]


def test_mapped_columns_keep_what_they_push_aside(tmp_path):
    rows = [{**row, "description": f"long {row['text']}"} for row in make_rows(4, 2)]
    folder = write_jsonl(tmp_path / "folder", rows)
    corpus = load_corpus(folder, text_column="description", shares=(1, 0, 0))["train"]
    assert corpus[0]["text"] == "long a red shirt number 0" and corpus[0]["source_text"] == "a red shirt number 0"
    by_text = load_corpus(folder, item_id_column="text", shares=(1, 0, 0))["train"]
    assert by_text["item_id"][:] == by_text["text"][:]
    assert by_text["source_item_id"][:] == corpus["item_id"][:]


def test_where_and_min_words(tmp_path):
    rows = make_rows(8, 2)
    rows[0]["text"] = "shirt"
    folder = write_jsonl(tmp_path / "folder", rows)
    corpus = load_corpus(folder, where={"view": 1}, shares=(1, 0, 0))
    assert set(corpus["train"]["view"]) == {"1"} and len(corpus["train"]) == 8
    assert len(load_corpus(folder, min_words=2, shares=(1, 0, 0))["train"]) == 15
    with pytest.raises(ValueError, match="no row left"):
        load_corpus(folder, where={"view": "back"})
    with pytest.raises(ValueError, match="column 'colour'.*columns are"):
        load_corpus(folder, where={"colour": "red"})


# --------------------------------------------------------------------------------------------- errors
def test_missing_columns_are_explained(tmp_path):
    rows = [
        {"file_name": row["file_name"], "caption": row["text"], "product": row["item_id"]} for row in make_rows(3, 1)
    ]
    folder = write_jsonl(tmp_path / "folder", rows)
    with pytest.raises(ValueError, match="no column 'text'.*caption, product.*`text_column`"):
        load_corpus(folder)
    with pytest.raises(ValueError, match="no column 'item_id'.*`item_id_column`"):
        load_corpus(folder, text_column="caption")
    with pytest.raises(ValueError, match="no column 'label' for item_id"):
        load_corpus(folder, text_column="caption", item_id_column="label")
    assert load_corpus(folder, text_column="caption", item_id_column="product")


def test_bad_metadata_is_named(tmp_path):
    folder = write_jsonl(tmp_path / "folder", make_rows(2, 1))
    (folder / "metadata.jsonl").write_text('{"file_name": "0_0.png"}\n{oops\n')
    with pytest.raises(ValueError, match="metadata.jsonl, line 2 is no JSON"):
        load_corpus(folder)
    (folder / "metadata.jsonl").write_text('{"text": "red"}\n')
    with pytest.raises(ValueError, match="no column file_name"):
        load_corpus(folder)
    (folder / "metadata.jsonl").write_text('{"file_name": "a", "text": 1}\n{"file_name": "b", "text": [1]}\n')
    with pytest.raises(ValueError, match="column 'text' mixes int, list"):
        load_corpus(folder)
    (folder / "metadata.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="file_name|no rows"):
        load_corpus(folder)
    (folder / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(ValueError, match="wanted one of them"):
        load_corpus(folder)


def test_unknown_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_corpus(tmp_path / "nothing here")
    with pytest.raises(FileNotFoundError, match="nobody/nothing.*Hub.*gated"):
        load_corpus("nobody/nothing")
    with pytest.raises(ValueError, match="cannot tell what"):
        load_corpus(tmp_path)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ValueError, match="bad.parquet cannot be read as parquet"):
        load_corpus(tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match="num_items"):
        load_corpus(write_jsonl(tmp_path / "folder", make_rows(2, 1)), num_items=3)


def test_a_list_of_texts_is_refused(tmp_path):
    rows = [{**row, "text": [row["text"], "another"]} for row in make_rows(3, 1)]
    with pytest.raises(ValueError, match="wanted one string a row"):
        load_corpus(write_jsonl(tmp_path / "folder", rows))


# --------------------------------------------------------------------------------------------- splits
def test_items_never_straddle_and_never_move(tmp_path):
    rows = make_rows(200)
    small = load_corpus(write_jsonl(tmp_path / "small", rows[100:300]))
    large = load_corpus(write_jsonl(tmp_path / "large", rows))
    place = {item: split for split in SPLITS for item in large[split]["item_id"]}
    for split in SPLITS:
        assert {place[item] for item in small[split]["item_id"]} <= {split}
        assert all(place[item] == split for item in large[split]["item_id"])
    assert all_rows(large) == sorted((row["item_id"], row["view"], row["text"]) for row in rows)
    sizes = [len(large[split]) / len(rows) for split in SPLITS]
    np.testing.assert_allclose(sizes, [0.75, 0.1, 0.15], atol=0.08)
    other = load_corpus(tmp_path / "large", seed=1)
    assert all_rows(other["train"].train_test_split(0.5)) != all_rows(large["train"].train_test_split(0.5))


def test_the_hash_is_pinned():
    """Splits of published results must survive any change of this code."""
    assert item_fraction("MH01-gray", 0) == pytest.approx(0.7286361, abs=1e-6)  # by sha256sum
    assert item_fraction("MH01-gray", 1) != item_fraction("MH01-gray", 0)


def test_given_splits_stay(tmp_path, caplog):
    rows = make_rows(40)
    write_jsonl(tmp_path / "train", rows[:60])
    write_jsonl(tmp_path / "test", rows[59:])
    corpus = load_corpus(tmp_path)
    assert set(corpus["test"]["item_id"]) == {f"i{n}" for n in range(29, 40)}
    assert len(corpus["train"]) + len(corpus["validation"]) == 60
    assert not set(corpus["train"]["item_id"]) & set(corpus["validation"]["item_id"])
    assert "1 items are in train and in test" in caplog.text
    alone = load_corpus(tmp_path, split="train")
    assert sum(map(len, alone.values())) == 60 and set(alone) == set(SPLITS)
    with pytest.raises(ValueError, match="no split 'data'.*'test', 'train'"):
        load_corpus(tmp_path, split="data")


def test_split_names(tmp_path):
    rows = photos_as_bytes(write_jsonl(tmp_path / "photos", make_rows(20)), make_rows(20))
    datasets.DatasetDict({"train": rows, "val": rows.select([0])}).save_to_disk(tmp_path / "val")
    assert set(load_corpus(tmp_path / "val")) == {"train", "validation"}
    datasets.DatasetDict({"data": rows}).save_to_disk(tmp_path / "data")
    assert set(load_corpus(tmp_path / "data")) == set(SPLITS)
    datasets.DatasetDict({"gallery": rows, "queries": rows}).save_to_disk(tmp_path / "odd")
    with pytest.raises(ValueError, match="'gallery', 'queries'; wanted train"):
        load_corpus(tmp_path / "odd")
    for name in ("train-00000-of-00001", "validation-00000-of-00001"):
        (tmp_path / "hub" / "data").mkdir(parents=True, exist_ok=True)
        rows.to_parquet(tmp_path / "hub" / "data" / f"{name}.parquet")
    assert {name: len(part) for name, part in load_corpus(tmp_path / "hub").items()} == {"train": 40, "validation": 40}


# -------------------------------------------------------------------------------- index, fingerprint
def test_index(tmp_path):
    rows = make_rows(3, 2)
    for row, text in zip(rows, ["Red  shirt", "red shirt ", "blue", "BLUE", "red shirt", "green"]):
        row["text"] = text
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = load_corpus(tmp_path / "folder", shares=(1, 0, 0))["train"]  # no photo exists: none is opened
    index = CorpusIndex.from_dataset(train)
    assert index.item_ids.tolist() == [0, 0, 1, 1, 2, 2] and index.item_ids.dtype == np.int64
    assert index.text_ids.tolist() == [0, 0, 1, 1, 0, 2] and index.text_ids.dtype == np.int64
    assert index.texts == ["Red  shirt", "blue", "green"]
    assert index.item_of_text.tolist() == [0, 1, 2]
    picked = CorpusIndex.from_dataset(train.select([5, 2]))
    assert picked.texts == ["green", "blue"] and picked.item_ids.tolist() == [0, 1]


def test_fingerprint(tmp_path):
    rows = make_rows(20)
    folder = write_jsonl(tmp_path / "folder", rows)
    train = load_corpus(folder)["train"]
    code = "import sys; from syncmask.processing.corpus import *; print(fingerprint(load_corpus(sys.argv[1])['train']))"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.stdout.strip() == fingerprint(train), done.stderr
    assert fingerprint(train).split("-")[1] == str(len(train))

    (tmp_path / "moved").mkdir()
    moved = fingerprint(load_corpus(folder.rename(tmp_path / "moved" / "folder"))["train"])
    assert moved.split("-")[1:] == fingerprint(train).split("-")[1:]
    rows[0]["text"] += "!"
    changed = fingerprint(load_corpus(write_jsonl(tmp_path / "changed", rows), seed=0)["train"])
    assert changed.split("-")[2] != fingerprint(train).split("-")[2]


# -------------------------------------------------------------------------------------------- garments
def test_generated_corpus_keeps_its_truth_through_a_folder(garments, tmp_path):
    count = []
    write_folder(datasets.DatasetDict(train=garments), tmp_path / "folder", on_photo=lambda: count.append(1))
    assert len(count) == len(garments)
    again = load_corpus(tmp_path / "folder", split="train", shares=(1, 0, 0))["train"]
    for name in garments.column_names:
        if name != "image":
            assert again[:][name] == garments[:][name], name
    assert np.array_equal(np.asarray(again[7]["image"]), np.asarray(garments[7]["image"]))
    with pytest.raises(FileExistsError, match="not empty"):
        write_folder(datasets.DatasetDict(train=garments), tmp_path / "folder")


def test_corpus_make(tmp_path):
    sheet = tmp_path / "sheet.png"
    arguments = ["make", str(tmp_path / "drawn"), "--num-items", "30", "--image-size", "32"]
    done = CliRunner().invoke(cli.app, [*arguments, "--contact-sheet", str(sheet), "--sheet-items", "4"])
    assert done.exit_code == 0, done.output
    drawn, direct = load_corpus(tmp_path / "drawn"), load_corpus("garments", num_items=30, image_size=32)
    for split in SPLITS:
        assert drawn[split]["text"][:] == direct[split]["text"][:]
    assert set(direct["train"].column_names) >= {"words", "visible", "regions", "attributes", "revealed", "claimed"}
    assert Image.open(sheet).height == 4 * 128
    again = CliRunner().invoke(cli.app, arguments)
    assert again.exit_code == 2 and "not empty" in again.output


def test_real_photos(real_data):
    corpus = load_corpus(real_data / "luma")
    assert [len(corpus[split]) for split in SPLITS] == [494, 73, 131]
    described = load_corpus(real_data / "luma", where={"text_origin": "description"})
    assert [len(set(described[split]["item_id"])) for split in SPLITS] == [119, 17, 34]
    assert CorpusIndex.from_dataset(corpus["train"]).item_ids.max() + 1 == 313
