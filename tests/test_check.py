"""The corpus check: every kind of bad row is found, counted and listed, and none of them stops it."""

import io
import itertools
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFile
from typer.testing import CliRunner

from syncmask.processing import cli
from syncmask.processing.check import check_corpus, placed
from syncmask.processing.check_photos import BITS, COLOUR, near_duplicates, probe
from syncmask.processing.check_report import as_json, save, sheet, table
from syncmask.processing.check_texts import near_identical
from syncmask.processing.corpus import load_corpus
from syncmask.processing.processing_syncmask import split_words
from syncmask.processing.readers_folder import SPLITS


def drawing(number, size=(60, 48)):
    """A photo like no other of another number."""
    rng = np.random.default_rng(number)
    image = Image.new("RGB", size, tuple(rng.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = rng.integers(0, size[0] - 20), rng.integers(0, size[1] - 20)
        draw.rectangle((x, y, x + 20, y + 16), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb(side=30_000):
    """A true PNG of side x side black pixels; packed it is small, unpacked it would be 900 MB."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(1)
    lines = packer.compress(bytes((1 + (side + 7) // 8) * side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


WORDS = "linen wool silk boxy slim long short red blue green striped dotted zipped belted hooded lined soft".split()


def good_rows(items, photos=1, start=0):
    rows = []
    for number in range(start, start + items):
        rng = np.random.default_rng([number, 1])
        text = " ".join(rng.permutation(WORDS)[:10]) + f" item{number}"
        for view in range(photos):
            rows.append({"file_name": f"{number}_{view}.png", "text": text, "item_id": f"i{number}", "category": "tee"})
    return rows


def write(folder, rows, photos=None):
    """A split's folder; photos maps file names to bytes, None = no file; any other is drawn."""
    folder.mkdir(parents=True)
    for number, row in enumerate(rows):
        content = (photos or {}).get(row["file_name"], b"draw")
        if content is not None:
            own = encoded(drawing(int(row["file_name"].split("_")[0]) * 10 + number % 10))
            (folder / row["file_name"]).write_bytes(own if content == b"draw" else content)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def by_name(report):
    return {finding.name: finding for finding in report.findings}


# ----------------------------------------------------------------------------------------------- whole
def test_a_good_corpus_has_no_findings(tmp_path):
    write(tmp_path / "train", good_rows(20, photos=2))
    write(tmp_path / "validation", good_rows(6, start=20))
    report, found, _ = check_corpus(tmp_path)
    assert report.may_start and report.findings == [] and len(found) == 46
    assert report.splits["train"] == {"rows": 40, "items": 20, "texts": 20}
    assert report.photos_an_item == {1: 6, 2: 20}
    assert report.classes == {"category": {"tee": {"train": 40, "validation": 6}}}
    assert report.tokens["cut"] == 0 and 11 <= report.tokens["longest"] <= report.tokens["limit"]
    assert sheet(report, found, _) is None


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A corpus with one of everything, in train/ and validation/."""
    root = tmp_path_factory.mktemp("bad")
    rows = good_rows(40)
    cut_short = encoded(drawing(1, (300, 300)), "JPEG")
    photos = {
        "0_0.png": cut_short[: len(cut_short) // 2],
        "1_0.png": b"",
        "2_0.png": bomb(),
        "3_0.png": None,
        "4_0.png": encoded(drawing(4).resize((9, 300))),
    }
    rows[5]["text"] = " -- "
    rows[6]["item_id"] = ""
    rows[7]["text"] = " ".join(f"word{n}" for n in range(10_000))
    rows[8]["item_id"] = "i9"
    rows[10]["text"] = rows[11]["text"].upper()
    rows[12]["text"] = rows[13]["text"] + " extra"
    validation = good_rows(6, start=50)
    validation[0] |= {"item_id": "i20", "text": rows[20]["text"]}
    validation[1]["category"] = "poncho"
    photos["52_0.png"] = encoded(drawing(22 * 10 + 2), "JPEG", quality=60)
    write(root / "train", rows, photos)
    write(root / "validation", validation, photos)
    return root


def test_everything_bad_is_found_and_nothing_stops_it(bad, monkeypatch):
    unpacked = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: (unpacked.append(self.size), load(self))[1])
    report, _, _ = check_corpus(bad)
    assert len(unpacked) > 40 and max(unpacked) <= (300, 300)  # the large photo stayed packed
    findings = by_name(report)
    wanted = {
        "missing photos": ["i3"],
        "unreadable photos": ["i0", "i1"],
        "huge photos": ["i2"],
        "tiny photos": ["i4"],
        "empty texts": ["i5"],
        "rows without an item": [None],
        "items across splits": ["i20", "i20"],
        "near-duplicate photos across splits": ["i52"],
        "items with conflicting texts": ["i9", "i9"],
        "texts of several items": ["i10"],
        "near-identical texts": ["i12"],
        "texts over the limit": ["i7"],
        "category unseen in train": ["i51"],
    }
    assert {name: [row["item_id"] for row in finding.rows] for name, finding in findings.items()} == wanted
    assert not report.may_start and {f.name for f in report.findings if f.level == "error"} == {"items across splits"}
    assert (
        findings["near-duplicate photos across splits"].rows[0]["why"].startswith("looks the same as row 22 of train")
    )
    assert "30000" in findings["huge photos"].rows[0]["why"] or "900000000" in findings["huge photos"].rows[0]["why"]
    assert report.splits["train"]["rows"] == 38  # as load_corpus gives it
    assert {name: len(rows) for name, rows in load_corpus(bad).items()} == {"train": 38, "validation": 6}
    assert report.tokens["longest"] > 10_000 and report.tokens["limit"] <= 128


def test_report_files(bad, tmp_path):
    report, found, streams = check_corpus(bad)
    written = save(report, found, streams, tmp_path / "out")
    assert [file.name for file in written] == ["check.json", "offenders.jsonl", "offenders.png"]
    saved = json.loads((tmp_path / "out" / "check.json").read_text())
    assert saved == json.loads(json.dumps(as_json(report))) and saved["may_start"] is False
    lines = [json.loads(line) for line in (tmp_path / "out" / "offenders.jsonl").read_text().splitlines()]
    assert len(lines) == sum(len(finding.rows) for finding in report.findings)
    unreadable = next(line for line in lines if line["finding"] == "unreadable photos")
    assert (unreadable["source_split"], unreadable["row"], unreadable["item_id"]) == ("train", 0, "i0")
    assert "truncated" in unreadable["why"] and set(unreadable) == {
        *("finding", "level", "source_split", "row", "split", "item_id", "why")
    }
    picture = Image.open(tmp_path / "out" / "offenders.png")
    line = [finding.name for finding in report.findings].index("near-duplicate photos across splits")
    top = line * (112 + 44 + 22) + 20
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    one, twin = pixels[top + 15 : top + 95, 6:118], pixels[top + 15 : top + 95, 124:236]
    assert np.abs(one - twin).mean() < 8 and one.std() > 10  # the photo and, beside it, its twin
    for word in ("Training may NOT start", "items across splits", "tokens of a text", "category, 2 classes: tee 43"):
        assert word in table(report)
    check_corpus_again, found, streams = check_corpus(bad, photos=False)
    assert len(save(check_corpus_again, found, streams, tmp_path / "out")) == 2
    assert not (tmp_path / "out" / "offenders.png").exists()


def test_exit_codes(bad, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(cli.app, ["check", *map(str, arguments), "--output", str(tmp_path / "out")])

    done = run(bad, "--json", "--no-photos")
    assert done.exit_code == 1 and json.loads(done.stdout)["may_start"] is False
    write(tmp_path / "good", good_rows(30))
    done = run(tmp_path / "good")
    assert done.exit_code == 0 and "Training may start." in done.stdout
    done = run(tmp_path / "good", "--text-column", "caption")
    assert done.exit_code == 2 and "no column 'caption' for text" in done.stderr
    (tmp_path / "good" / "metadata.jsonl").write_text("{oops\n")
    done = run(tmp_path / "good")
    assert done.exit_code == 2 and "metadata.jsonl, line 1 is no JSON" in done.stderr
    assert run(tmp_path / "nowhere").exit_code == 2


def test_mostly_unreadable_is_an_error(tmp_path):
    rows = good_rows(20)
    write(tmp_path / "train", rows, {row["file_name"]: b"x" for row in rows[:3]})
    assert by_name(check_corpus(tmp_path)[0])["unreadable photos"].level == "error"
    two = good_rows(1)
    write(tmp_path / "one" / "train", two)
    report = check_corpus(tmp_path / "one")[0]
    assert {"train is empty", "validation is empty"} & set(by_name(report)) and not report.may_start


def test_rows_are_placed_as_load_corpus_places_them(garments, tmp_path):
    garments.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "two").mkdir()
    garments.select([0]).to_parquet(tmp_path / "two" / "test.parquet")
    garments.to_parquet(tmp_path / "two" / "train.parquet")
    for source in (tmp_path / "rows.parquet", tmp_path / "two"):
        corpus = load_corpus(source)
        report, found, streams = check_corpus(source, photos=False)
        for split in SPLITS:
            items = [found.item_names[found.items[row]] for row in np.flatnonzero(found.split == split)]
            assert items == corpus[split]["item_id"][:], (source, split)
        assert np.array_equal(found.split, placed(found, list(streams), 0, (0.75, 0.1, 0.15)))
    where = check_corpus(tmp_path / "rows.parquet", where={"view": "front"}, photos=False)[0]
    assert sum(sizes["rows"] for sizes in where.splits.values()) == list(garments["view"]).count("front")


def test_generated_corpus_may_start(garments, tmp_path):
    report, found, _ = check_corpus("garments", num_items=60, image_size=32)
    assert report.may_start and "items across splits" not in by_name(report)
    assert not [photo for photo in found.photos if photo.problem]


# ---------------------------------------------------------------------------------------------- photos
def test_probe():
    whole = encoded(drawing(3, (400, 300)), "JPEG", quality=95)
    facts = probe({"bytes": whole, "path": None})
    assert (facts.width, facts.height, facts.problem) == (400, 300, None)
    assert probe(drawing(3)).problem is None
    for content, problem, word in (
        (whole[: len(whole) * 3 // 4], "unreadable", "truncated"),
        (b"", "unreadable", "zero bytes"),
        (b"<html>404</html>", "unreadable", "cannot identify"),
        (encoded(drawing(3, (21, 400))), "tiny", "21 x 400"),
        (encoded(Image.new("1", (8000, 7000))), "huge", "8000 x 7000"),
    ):
        facts = probe({"bytes": content, "path": None})
        assert facts.problem == problem and word in facts.reason, problem
    assert probe(None).problem == probe({"bytes": None, "path": "/nowhere.png"}).problem == "missing"
    for mode in ("L", "LA", "P", "CMYK", "RGBA", "I;16", "1"):
        kind = "TIFF" if mode == "CMYK" else "PNG"
        facts = probe({"bytes": encoded(Image.new(mode, (40, 40)), kind), "path": None})
        assert facts.problem is None and len(facts.colours) == 48, mode


def test_the_same_photo_saved_anew_is_found_and_others_are_not():
    photos = [drawing(number, (200, 160)) for number in range(40)]
    changed = [
        encoded(photos[0], "JPEG", quality=50),
        encoded(photos[1].resize((100, 80)), "JPEG", quality=85),
        encoded(photos[2].convert("RGBA")),
        encoded(Image.merge("RGB", photos[3].split()[::-1])),  # the same in other colours: another product
        encoded(drawing(99, (200, 160))),
    ]
    facts, others = [probe({"bytes": one, "path": None}) for one in changed], [probe(photo) for photo in photos]

    def arrays(some):
        return np.array([f.look for f in some], np.uint64), np.stack([np.frombuffer(f.colours, np.uint8) for f in some])

    assert near_duplicates(*arrays(facts), *arrays(others)).tolist() == [0, 1, 2, -1, -1]


def test_near_duplicates_agree_with_all_pairs():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**63, 12).astype(np.uint64)
    looks = [rng.choice(base, n) ^ (np.uint64(1) << rng.integers(0, 6, n).astype(np.uint64)) for n in (60, 90)]
    looks[0][:5] ^= np.uint64(0xFF00)
    colours = [rng.integers(100, 108, (len(some), 48)).astype(np.uint8) for some in looks]
    colours[0][::7] += 9
    wanted = []
    for look, colour in zip(looks[0], colours[0]):
        same = [
            row
            for row, (other, its) in enumerate(zip(looks[1], colours[1]))
            if bin(int(look) ^ int(other)).count("1") <= BITS
            and np.abs(its.astype(int) - colour.astype(int)).mean() <= COLOUR
        ]
        wanted.append(same[0] if same else -1)
    assert near_duplicates(looks[0], colours[0], looks[1], colours[1]).tolist() == wanted
    assert -1 in wanted and len(set(wanted)) > 10
    none = near_duplicates(looks[0], colours[0], looks[1][:0], colours[1][:0])
    assert none.tolist() == [-1] * 60


# ----------------------------------------------------------------------------------------------- texts
def jaccard(one, other):
    sets = [{text[a:b].lower() for a, b in split_words(text)} for text in (one, other)]
    return len(sets[0] & sets[1]) / max(len(sets[0] | sets[1]), 1)


def test_near_identical_agrees_with_all_pairs():
    rng = np.random.default_rng(0)
    vocabulary = [f"w{number}" for number in range(400)]
    texts = [" ".join(rng.choice(vocabulary, 30, replace=False)) for _ in range(120)]
    for number in range(0, 120, 3):
        words = texts[number].split()
        words[int(rng.integers(30))] = f"other{number}"
        texts.append(" ".join(words))
    texts += ["", "--", "one", "red shirt", "blue shirt"]
    items = np.arange(len(texts))
    items[120] = items[0]  # a pair of one item
    wanted = [
        [one, other]
        for one, other in itertools.combinations(range(len(texts)), 2)
        if jaccard(texts[one], texts[other]) >= 0.9 and items[one] != items[other]
    ]
    assert len(wanted) == 39
    assert near_identical(texts, items).tolist() == wanted
    assert near_identical(texts, items, seed=1).tolist() == wanted
    assert near_identical([], np.empty(0, int)).shape == near_identical(["a"], np.zeros(1, int)).shape == (0, 2)


def test_many_texts_alike_stay_linear():
    texts = [f"one two three four five six seven eight nine ten eleven twelve {number}" for number in range(3000)]
    assert not len(near_identical(texts, np.arange(3000)))  # 12 of 14 words
    texts = [f"{' '.join(WORDS)} word again more {number}" for number in range(3000)]  # 20 of 22
    pairs = near_identical(texts, np.arange(3000))
    assert len(np.unique(pairs)) > 2990 and len(pairs) < 16 * 4 * 3000
