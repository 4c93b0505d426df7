"""Conversion to sharded parquet: the same corpus, the photos' own bytes, resumed where it was stopped."""

import json

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from syncmask.processing import cli
from syncmask.processing import convert as module
from syncmask.processing.convert import convert
from syncmask.processing.corpus import fingerprint, load_corpus
from syncmask.processing.streams import row_ranges, stream_of_table


@pytest.fixture
def folder(tmp_path):
    """60 photos of 30 items as JPEG, PNG and WebP, flat."""
    root = tmp_path / "photos"
    root.mkdir()
    rows = []
    for number in range(60):
        name = f"{number:02d}.{('jpg', 'png', 'webp')[number % 3]}"
        Image.new("RGB", (9, 8), (number * 4, 0, 0)).save(root / name)
        rows.append(
            {"file_name": name, "text": f"shirt number {number // 2}", "item_id": f"i{number // 2}", "n": number}
        )
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def files(out):
    return sorted(str(file.relative_to(out)) for file in out.rglob("*.parquet"))


def test_the_corpus_stays_the_same(folder, tmp_path):
    done = convert(folder, tmp_path / "out", piece_rows=25)
    assert done.rows == {"data": 60} and done.skipped == [] and done.resumed == 0
    assert files(tmp_path / "out") == [f"data-{n:05d}-of-00003.parquet" for n in range(3)]
    assert (tmp_path / "out" / "skipped.jsonl").read_text() == ""
    ours, theirs = load_corpus(folder), load_corpus(tmp_path / "out")
    for split, rows in ours.items():
        assert fingerprint(rows).split("-")[1:] == fingerprint(theirs[split]).split("-")[1:]
        assert rows["n"][:] == theirs[split]["n"][:]
        raw = theirs[split].cast_column("image", datasets.Image(decode=False))
        for row in raw:
            assert row["image"]["bytes"] == (folder / row["image"]["path"]).read_bytes()


def test_truth_columns_survive(garments, tmp_path):
    garments.save_to_disk(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "out", where={"view": "front"})
    ours = load_corpus(tmp_path / "saved", where={"view": "front"}, shares=(1, 0, 0))["train"]
    theirs = load_corpus(tmp_path / "out", shares=(1, 0, 0))["train"]
    assert theirs.features == ours.features
    for one, other in zip(ours, theirs, strict=True):
        assert np.array_equal(np.asarray(one.pop("image")), np.asarray(other.pop("image"))) and one == other


def test_a_stopped_conversion_goes_on(folder, tmp_path, monkeypatch):
    (folder / "03.jpg").unlink()
    whole = convert(folder, tmp_path / "whole", piece_rows=7)
    calls = []

    def stop():
        calls.append(1)
        if len(calls) == 31:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "out", piece_rows=7, on_row=stop)
    assert len(files(tmp_path / "out")) == 4
    with pytest.raises(ValueError, match="never finished: 5 of 9 files.*data-00004-of-00009.*Run the same"):
        load_corpus(tmp_path / "out")
    times = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in files(tmp_path / "out")}
    again = convert(folder, tmp_path / "out", piece_rows=7)
    assert again.resumed == 4 and again.rows == whole.rows and again.skipped == whole.skipped
    assert len(whole.skipped) == 1 and "03.jpg cannot be read" in whole.skipped[0]["reason"]
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in times.items())
    for name in files(tmp_path / "whole"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "out").glob("*.partial"))


def test_other_settings_or_another_source_are_refused(folder, tmp_path):
    convert(folder, tmp_path / "out")
    for other in ({"piece_rows": 9}, {"verify": True}, {"text_column": "item_id"}, {"min_words": 2}):
        with pytest.raises(FileExistsError, match="another source.*Name a new folder"):
            convert(folder, tmp_path / "out", **other)
    with open(folder / "metadata.jsonl", "a") as lines:
        lines.write('{"file_name": "00.jpg", "text": "one more", "item_id": "x", "n": 60}\n')
    with pytest.raises(FileExistsError, match="changed"):
        convert(folder, tmp_path / "out")
    with pytest.raises(FileExistsError, match="not empty and no conversion"):
        convert(folder, folder)


def test_what_is_left_out_is_listed(folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[0]["text"], rows[1]["item_id"], rows[2]["text"] = " - ", "", "None"
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "03.jpg").write_bytes(b"")
    (folder / "04.png").unlink()
    (folder / "06.jpg").write_bytes((folder / "06.jpg").read_bytes()[:200])
    done = convert(folder, tmp_path / "out")
    reasons = [(one["row_of_piece"], one["reason"].replace(str(folder), "")) for one in done.skipped]
    assert [row for row, _ in reasons] == [0, 1, 3, 4]
    assert [reason.split(": ")[-1] for _, reason in reasons] == [
        "no text",
        "no item id",
        "/03.jpg is a file of zero bytes",
        "/04.png cannot be read (No such file or directory)",
    ]
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert listed == done.skipped and done.rows == {"data": 56}
    verified = convert(folder, tmp_path / "verified", verify=True)
    assert verified.rows == {"data": 55} and verified.skipped[-1]["row_of_piece"] == 6
    assert "unreadable: " in verified.skipped[-1]["reason"]
    for file in folder.glob("*.*g"):
        file.unlink()
    for file in folder.glob("*.webp"):
        file.unlink()
    with pytest.raises(ValueError, match="no row was left of 60; see .*skipped.jsonl"):
        convert(folder, tmp_path / "none")


def test_row_groups_stay_small(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GROUP_BYTES", 2000)
    convert(folder, tmp_path / "out")
    metadata = pq.read_metadata(tmp_path / "out" / "data-00000-of-00001.parquet")
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    assert sum(sizes) == 60 and max(sizes) < 30


def test_given_splits_stay(folder, tmp_path):
    load_corpus(folder).save_to_disk(tmp_path / "splits")
    done = convert(tmp_path / "splits", tmp_path / "out")
    assert set(done.rows) == {"train", "validation", "test"}
    assert {name: rows["n"][:] for name, rows in load_corpus(tmp_path / "out").items()} == {
        name: rows["n"][:] for name, rows in load_corpus(folder).items()
    }
    alone = convert(tmp_path / "splits", tmp_path / "alone", split="test")
    assert alone.rows == {"data": done.rows["test"]}


def test_streams_read_any_range(garments):
    stream = stream_of_table(garments, piece_rows=11, batch=4)
    assert row_ranges(0, 3) == () and stream.pieces[-1][1] == len(garments) == stream.rows
    rows = list(stream)
    assert [row["item_id"] for row in rows] == garments["item_id"][:]
    assert isinstance(rows[0]["image"], dict) and rows[0]["image"]["bytes"][:4] == b"\x89PNG"
    assert [row["view"] for row in stream.read(5, 14)] == garments[5:14]["view"]


def test_command(folder, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(cli.app, ["convert", *map(str, arguments)])

    (folder / "03.jpg").unlink()
    done = run(folder, tmp_path / "out", "--piece-rows", "20", "--where", "n=3", "--where", "item_id=i1")
    assert done.exit_code == 2 and "no row was left" in done.stderr
    done = run(folder, tmp_path / "all", "--piece-rows", "20")
    assert done.exit_code == 0 and "59 rows" in done.stdout and "left out 1 rows" in done.stdout
    assert "3 files were there already" in run(folder, tmp_path / "all", "--piece-rows", "20").stdout
    assert run(folder, tmp_path / "all").exit_code == 2
    assert run(folder, tmp_path / "new", "--where", "n").exit_code == 2
