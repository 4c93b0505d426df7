"""The scan against a sorted list in float64; filters; ranked items against loops; contact sheets."""

import datetime
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from syncmask.retrieval import vectors
from syncmask.retrieval.catalogue import Catalogue
from syncmask.retrieval.filters import filter_expression, filterable, parse_filter
from syncmask.retrieval.sheet import html_sheet, picture_sheet, save_sheet
from syncmask.retrieval.vectors import ExactScan

DTYPES = (torch.bfloat16, torch.float32)


def unit(count, dim=24, seed=0, common=0.0):
    """Vectors that share a direction, as those of a trained model do."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(count, dim, generator=generator) + common * torch.ones(dim)
    return torch.nn.functional.normalize(found, dim=1)


def oracle(queries, rows, k, allowed=None):
    """Rows by falling dot product, one query at a time, in double precision."""
    found = []
    for query in queries.double():
        scores = [float(query @ row) for row in rows.double()]
        places = [place for place in range(len(rows)) if allowed is None or allowed[place]]
        found.append(sorted(places, key=lambda place: -scores[place])[:k])
    return found


# -------------------------------------------------------------------------------------------------------------- scan


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("common", [0.0, 3.0])
def test_the_scan_finds_what_a_sorted_list_finds(dtype, common, monkeypatch):
    rows, queries = unit(1500, common=common), unit(20, seed=1, common=common)
    monkeypatch.setattr(vectors, "BLOCK_SCORES", 7 * len(rows))
    scores, found = ExactScan(rows, dtype).search(queries, 10)
    assert found.tolist() == oracle(queries, rows, 10)
    torch.testing.assert_close(scores, torch.stack([rows[f] @ q for f, q in zip(found, queries)]))


def test_rows_closer_than_rounding_are_still_told_apart():
    """All cosines lie within .001: bfloat16 itself cannot order them, nor name the best twenty."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.02 * torch.randn(4005, 32, generator=generator)
    rows, queries = torch.nn.functional.normalize(1 + noise, dim=1).split([4000, 5])
    assert (queries @ rows.T).std() < 1e-3
    scores, found = ExactScan(rows, torch.bfloat16).search(queries, 5)
    best = torch.tensor(
        [[float(q @ rows[row].double()) for row in o] for q, o in zip(queries.double(), oracle(queries, rows, 5))]
    )
    torch.testing.assert_close(scores, best, atol=2e-7, rtol=0)
    naive = (queries.bfloat16() @ rows.bfloat16().T).topk(20, dim=1).indices
    assert any(set(f) - set(n) for f, n in zip(found.tolist(), naive.tolist()))


def test_a_short_list_that_is_too_short_is_made_longer(monkeypatch):
    """A thousand rows equal to three digits, and as many opposite ones, so that the mean does not help."""
    rows = torch.zeros(2000, 16)
    rows[:1000, 0] = torch.linspace(0.9991, 1, 1000)[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    rows[1000:, 0] = -1
    queries = torch.zeros(3, 16)
    queries[:, 0] = 1
    lengths = []
    real = ExactScan._rescored
    monkeypatch.setattr(ExactScan, "_rescored", lambda *a: (lengths.append(a[-1]), real(*a))[1])
    found = ExactScan(rows, torch.bfloat16).search(queries, 4)[1]
    assert found[0].tolist() == oracle(queries[:1], rows, 4)[0]
    assert max(lengths) >= 1000 and lengths[0] == 20


def test_vectors_that_all_point_one_way_need_no_longer_lists(monkeypatch):
    lengths = []
    real = ExactScan._rescored
    monkeypatch.setattr(ExactScan, "_rescored", lambda *a: (lengths.append(a[-1]), real(*a))[1])
    ExactScan(unit(5000, common=3.0), torch.bfloat16).search(unit(30, seed=1, common=3.0), 5)
    assert lengths == [22]


@pytest.mark.parametrize("columns", [3, 700, 1003])
def test_the_largest_of_many(columns):
    scores = torch.randn(9, columns, generator=torch.Generator().manual_seed(0))
    for count in (1, 3, min(30, columns)):
        values, indices = vectors.largest(scores, count)
        wanted = scores.topk(count, dim=1)
        assert torch.equal(values, wanted.values) and torch.equal(indices, wanted.indices)
    scores[:, -1] = 9  # in no whole group
    assert (vectors.largest(scores, 1)[1] == columns - 1).all()


def test_scan_by_float32_needs_one_pass(monkeypatch):
    lengths = []
    real = ExactScan._rescored
    monkeypatch.setattr(ExactScan, "_rescored", lambda *a: (lengths.append(a[-1]), real(*a))[1])
    ExactScan(torch.ones(500, 4), torch.float32).search(torch.ones(2, 4), 3)
    assert lengths == [18]


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_allowed_rows_are_found(dtype):
    rows, queries = unit(300), unit(6, seed=1)
    allowed = torch.arange(300) % 7 == 3
    assert ExactScan(rows, dtype).search(queries, 8, allowed)[1].tolist() == oracle(queries, rows, 8, allowed)
    few = torch.arange(300) < 2
    assert sorted(ExactScan(rows, dtype).search(queries, 8, few)[1][0].tolist()) == [0, 1]
    assert ExactScan(rows, dtype).search(queries, 8, torch.zeros(300, dtype=torch.bool))[1].shape == (6, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_and_empty_scans(dtype):
    rows = unit(3)
    assert ExactScan(rows, dtype).search(rows, 10)[1].shape == (3, 3)
    assert ExactScan(rows[:0], dtype).search(rows, 10)[1].shape == (3, 0)
    assert ExactScan(rows, dtype).search(rows[:0], 10)[1].shape == (0, 3)
    assert len(set(ExactScan(rows[:1].repeat(50, 1), dtype).search(rows[:1], 4)[1][0].tolist())) == 4


# ----------------------------------------------------------------------------------------------------------- filters
SCHEMA = pa.schema(
    [
        ("photo_id", pa.string()),
        ("color", pa.string()),
        ("price", pa.float64()),
        ("stock", pa.int64()),
        ("sale", pa.bool_()),
        ("since", pa.date32()),
        ("seen", pa.timestamp("us")),
        ("tags", pa.list_(pa.string())),
        ("photo_sha256", pa.string()),
    ]
)
ROWS = [
    {"photo_id": "a", "color": "Red", "price": 5.0, "stock": 1, "sale": True},
    {"photo_id": "b", "color": 'it\'s "x" -- \\ `y`', "price": 50.0, "stock": 2, "sale": False},
    {"photo_id": "c", "color": None, "price": None, "stock": None, "sale": None},
    {"photo_id": "d", "color": "Blue", "price": 20.0, "stock": 2**40, "sale": True},
]
DAYS = [datetime.date(2026, 1, day) for day in (1, 2, 3, 4)]
EVERYTHING = "x' OR '1'='1"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    import lancedb

    rows = [row | {"since": day, "seen": datetime.datetime(*day.timetuple()[:3], 12)} for row, day in zip(ROWS, DAYS)]
    return lancedb.connect(str(tmp_path_factory.mktemp("db"))).create_table("t", pa.Table.from_pylist(rows, SCHEMA))


def matching(table, conditions):
    where = filter_expression(conditions, SCHEMA)
    return "".join(sorted(table.search().where(where).select(["photo_id"]).to_arrow()["photo_id"].to_pylist()))


@pytest.mark.parametrize(
    "conditions, wanted",
    [
        ({"color": "Red"}, "a"),
        ({"color": ["Red", "Blue"]}, "ad"),
        ({"color": {"!=": "Red"}}, "bd"),
        ({"color": {"!=": ["Red", "Blue"]}}, "b"),
        ({"color": ROWS[1]["color"]}, "b"),
        ({"price": {"<": 50, ">=": 5}}, "ad"),
        ({"price": {"<=": 20.0}, "stock": {">": 1}}, "d"),
        ({"price": {">": {19, 4}}}, "bd"),
        ({"stock": 2**40}, "d"),
        ({"stock": [1, 2]}, "ab"),
        ({"sale": True}, "ad"),
        ({"sale": "false"}, "b"),
        ({"since": datetime.date(2026, 1, 2)}, "b"),
        ({"since": {">": "2026-01-02"}}, "cd"),
        ({"seen": {"<": "2026-01-02T13:00"}}, "ab"),
        (["color=Red", "color=Blue", "price<10"], "a"),
        ("price>=20", "bd"),
        (f"color={ROWS[1]['color']}", "b"),
        ("stock = 2", "b"),
        (f"color={EVERYTHING}", ""),
        ({"color": EVERYTHING}, ""),
        ({"color": [EVERYTHING, "Red"]}, "a"),
        ("color=Red' OR price > 0 --", ""),
    ],
)
def test_filters_mean_what_they_say(table, conditions, wanted):
    assert matching(table, conditions) == wanted


@pytest.mark.parametrize(
    "conditions, message",
    [
        (
            {"colour": "Red"},
            r"no column 'colour'; a filter may use photo_id, color, price, stock, sale, since, seen\.$",
        ),
        ({"tags": "x"}, "cannot compare column 'tags'"),
        ({"photo_sha256": "x"}, "cannot compare column 'photo_sha256'"),
        ({"1=1 OR color": "x"}, "no column"),
        ("color = 'Red' OR 1", "SKIP"),
        ("Red", "is no condition; wanted column=value"),
        ("=Red", "is no condition"),
        ("price<cheap", "'cheap' is no double"),
        ("price=1 OR 1=1", "'1 OR 1=1' is no double"),
        ("price<nan", "'nan' is no double"),
        ("stock=99999999999999999999", "is no int64"),
        ("sale=maybe", "'maybe' is no bool"),
        ("since>yesterday", "'yesterday' is no date32"),
        ({"price": {"LIKE": 1}}, "operator 'LIKE'; wanted one of = != < <= > >="),
        ({"price": None}, "None is no double"),
        ({"color": None}, "None is no string"),
        ({"color": []}, "lists no value"),
    ],
)
def test_what_a_filter_cannot_mean_is_refused(table, conditions, message):
    if message == "SKIP":  # it reads as a value, which no row has
        assert matching(table, conditions) == ""
        return
    with pytest.raises(ValueError, match=message):
        filter_expression(conditions, SCHEMA)


def test_strings_are_parsed_at_the_first_operator():
    assert parse_filter("a b!=x=y<z") == {"a b": {"!=": ["x=y<z"]}}
    assert parse_filter(["p<=5", "p>=1", "p<=3"]) == {"p": {"<=": ["5", "3"], ">=": ["1"]}}
    assert filter_expression(None, SCHEMA) is filter_expression({}, SCHEMA) is filter_expression([], SCHEMA) is None
    assert "tags" not in filterable(SCHEMA)


# ------------------------------------------------------------------------------------------------------------ search


@pytest.fixture(scope="module")
def rows(garments):
    return [
        {"image": row["image"], "item_id": row["item_id"], "text": row["text"], "photo_id": f"p{place}"}
        | {"category": row["category"], "price": place % 50}
        for place, row in enumerate(garments)
    ]


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory, encoder, rows):
    opened = Catalogue.open(tmp_path_factory.mktemp("shop") / "c", encoder, create=True)
    opened.add(rows)
    return opened


def by_loops(encoder, rows, query, keep=lambda row: True):
    """[(item, score)] best first: for each item the best photo that is kept."""
    best = {}
    for row in rows:
        if keep(row):
            score = float(encoder.encode_image([row["image"]])[0] @ query)
            best[row["item_id"]] = max(score, best.get(row["item_id"], -2))
    return sorted(best.items(), key=lambda pair: -pair[1])


@pytest.mark.parametrize("kind", ["text", "photo", "both"])
def test_items_are_ranked_by_their_best_photo(catalogue, encoder, rows, kind):
    text = None if kind == "photo" else "a red shirt"
    image = None if kind == "text" else rows[3]["image"]
    if kind == "both":
        query = encoder.encode_composed([image], [text])[0]
    else:
        query = encoder.encode_text([text])[0] if text else encoder.encode_image([image])[0]
    found = catalogue.search(text=text, image=image, k=12)
    wanted = by_loops(encoder, rows, query)[:12]
    assert [hit.item_id for hit in found] == [item for item, _ in wanted]
    np.testing.assert_allclose([hit.vector for hit in found], [score for _, score in wanted], atol=1e-5)
    assert found.notes == []


def test_all_photos_of_a_hit_come_back_best_first(catalogue, rows):
    hit = catalogue.search(image=rows[0]["image"], k=1)[0]
    assert {photo.photo_id for photo in hit.photos} == {r["photo_id"] for r in rows if r["item_id"] == hit.item_id}
    scores = [photo.score for photo in hit.photos]
    assert len(scores) > 1 and scores == sorted(scores, reverse=True) and hit.vector == scores[0] <= 1
    best = next(row for row in rows if row["photo_id"] == hit.photos[0].photo_id)
    assert hit.photos[0].open().tobytes() == best["image"].convert("RGB").tobytes() and hit.photos[0].path is None
    assert max(catalogue.search(image=row["image"], k=1)[0].vector for row in rows[:30]) == 1
    assert hit.columns == {"category": best["category"], "price": best["price"]} and hit.text == best["text"]


def test_a_filter_leaves_out_photos(catalogue, encoder, rows):
    query = encoder.encode_text(["hat"])[0]
    category = rows[0]["category"]
    found = catalogue.search(text="hat", filter={"category": category, "price": {"<": 25}}, k=40)

    def keep(row):
        return row["category"] == category and row["price"] < 25

    assert [hit.item_id for hit in found] == [item for item, _ in by_loops(encoder, rows, query, keep)]
    kept = {row["photo_id"] for row in rows if keep(row)}
    assert {photo.photo_id for hit in found for photo in hit.photos} == kept
    assert re.match(r"40 items were asked for; \d+ are there that meet the filter", found.notes[0])


def test_more_than_there_is(catalogue, rows):
    found = catalogue.search(text="hat", k=500)
    assert len(found) == len({row["item_id"] for row in rows}) == 40
    assert found.notes == ["500 items were asked for; 40 are there"]
    assert catalogue.search(text="hat", k=40).notes == []


def test_items_with_many_photos_do_not_crowd_out_the_others(tmp_path, encoder, rows):
    opened = Catalogue.open(tmp_path / "c", encoder, create=True)
    many = [{"image": rows[0]["image"], "item_id": "many", "photo_id": f"m{n}"} for n in range(300)]
    opened.add([*many, *rows[1:8]])
    found = opened.search(image=rows[0]["image"], k=3)
    assert found[0].item_id == "many" and len(found[0].photos) == 300 and len(found) == 3


# --------------------------------------------------------------------------------------------------------- re-ranking


def test_the_matching_head_orders_the_first_ones(catalogue, encoder, rows):
    plain = catalogue.search(text="a red shirt", k=20)
    found = catalogue.search(text="a red shirt", k=12, rerank=6)
    first = [hit.item_id for hit in plain[:6]]
    photos = [hit.photos[0].open() for hit in plain[:6]]
    scores = dict(zip(first, encoder.match(photos, ["a red shirt"] * 6)))
    assert [hit.item_id for hit in found[:6]] == sorted(first, key=lambda item: -scores[item]) != first
    assert [hit.matching for hit in found[:6]] == pytest.approx(sorted(scores.values(), reverse=True), abs=1e-4)
    assert [hit.item_id for hit in found[6:]] == [hit.item_id for hit in plain[6:12]]
    assert all(hit.matching is None for hit in found[6:])


def test_more_candidates_than_hits(catalogue):
    wide = catalogue.search(text="a red shirt", k=30, rerank=30)
    assert [hit.item_id for hit in catalogue.search(text="a red shirt", k=2, rerank=30)] == [
        h.item_id for h in wide[:2]
    ]


def test_a_photo_is_matched_with_the_items_texts(catalogue, encoder, rows):
    found = catalogue.search(image=rows[0]["image"], k=5, rerank=5)
    wanted = encoder.match([rows[0]["image"]] * 5, [hit.text for hit in found])
    assert [hit.matching for hit in found] == pytest.approx(wanted, abs=1e-4) == sorted(wanted, reverse=True)


def test_photos_that_are_gone_keep_their_place_behind(tmp_path, encoder, rows):
    for row in rows[:9]:
        row["image"].save(tmp_path / f"{row['photo_id']}.png")
    opened = Catalogue.open(tmp_path / "c", encoder, create=True)
    opened.add({**row, "image": tmp_path / f"{row['photo_id']}.png"} for row in rows[:9])
    best = opened.search(text="hat", k=9)[0]
    for photo in best.photos:
        (tmp_path / f"{photo.photo_id}.png").unlink()
    found = opened.search(text="hat", k=9, rerank=9)
    assert found[-1].item_id == best.item_id and found[-1].matching is None
    assert "1 of" in found.notes[0] and "were not re-ranked" in found.notes[0]
    with pytest.raises(ValueError, match="cannot be read any more"):
        found[-1].photos[0].open()


# ---------------------------------------------------------------------------------------------------------- bad input


def test_bad_questions_are_answered(catalogue, rows, tmp_path):
    for text in (None, "", "  "):
        with pytest.raises(ValueError, match="nothing to search for"):
            catalogue.search(text=text)
    with pytest.raises(ValueError, match="k is 0"):
        catalogue.search(text="hat", k=0)
    with pytest.raises(ValueError, match="no column 'colour'; a filter may use .*category, price"):
        catalogue.search(text="hat", filter={"colour": "Red"})
    with pytest.raises(ValueError, match="cannot be re-ranked"):
        catalogue.search(text="hat", image=rows[0]["image"], rerank=3)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff not a photo")
    with pytest.raises(ValueError, match="broken.jpg"):
        catalogue.search(image=tmp_path / "broken.jpg")


def test_a_text_of_five_thousand_words_is_cut_and_it_is_said(catalogue):
    found = catalogue.search(text="red " * 5000, k=3)
    assert len(found) == 3 and "longer than the model reads" in found.notes[0]


# ------------------------------------------------------------------------------------------------------------- sheets
SCRIPT = "<script>alert(1)</script>"


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.names = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.names.append((tag, dict(attributes)))


def test_sheets_show_every_hit_and_run_nothing(tmp_path, encoder, rows):
    opened = Catalogue.open(tmp_path / "c", encoder, create=True)
    opened.add([row | {"text": SCRIPT, "category": SCRIPT, "item_id": SCRIPT + row["item_id"]} for row in rows[:8]])
    found = opened.search(text="hat", k=20)
    page = html_sheet(found, f"hat {SCRIPT}", rows[0]["image"])
    names = [name for name, _ in Tags(page).names]
    assert "script" not in names and page.count("&lt;script&gt;alert(1)") >= 3 * len(found)
    assert names.count("li") == len(found) and names.count("img") == 8 + 1
    assert all(tag != "img" or values["src"].startswith("data:image/jpeg") for tag, values in Tags(page).names)
    assert "20 items were asked for" in page
    few, many = picture_sheet(found, "hat"), picture_sheet(opened.search(text="hat", k=1), "hat")
    assert few.width == many.width and few.height >= many.height
    for name in ("a.png", "b.jpg"):
        save_sheet(tmp_path / name, found, None, rows[0]["image"])
        assert Image.open(tmp_path / name).size[0] == few.width
    save_sheet(tmp_path / "c.html", found, "hat")
    with pytest.raises(ValueError, match=".png, .jpg or .html"):
        save_sheet(tmp_path / "d.pdf", found, "hat")


def test_the_picture_holds_the_photos(catalogue, rows):
    found = catalogue.search(image=rows[0]["image"], k=3)
    sheet = np.asarray(picture_sheet(found, "hat"))
    wanted = np.asarray(found[0].photos[0].open().resize((190, 190), Image.Resampling.LANCZOS))
    places = np.lib.stride_tricks.sliding_window_view(sheet[:, :, 0], (60, 60))[:, 24 + 60]
    distances = np.abs(places.astype(int) - wanted[60:120, 60:120, 0]).mean(axis=(1, 2))
    assert distances.min() < 3
