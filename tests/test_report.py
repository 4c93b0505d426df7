"""The report stands alone, escapes what it is given, and leaves out what it has not."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from syncmask.evaluation.figures import Hit, MaskedPhoto, Masks, Search
from syncmask.evaluation.metrics import exact
from syncmask.evaluation.report import Report, findings, history_panels, read_history, read_results, write_report
from syncmask.evaluation.result import Result, comparable, percent, pivot

EVIL = '<script>alert("x")</script> & <img src=http://evil.example/x>'


def metric(value, n=100):
    return {"value": value, "low": value - 0.02, "high": value + 0.02, "n": n}


@pytest.fixture
def results():
    items = {
        "image_to_text/recall@10/itc": metric(0.61),
        "image_to_text/recall@10/chance": exact(0.02, 100),
        "text_to_image/recall@10/itc": metric(0.55),
        "text_to_image/recall@10/chance": exact(0.03, 100),
    }
    masks = {
        "words/precision/attention": metric(0.51),
        "words/precision/random": metric(0.33),
        "words/precision/blind": metric(0.8),
        "text_gap/relative_rise/truth_masks": metric(0.15),
        "false_negatives/pairs/rules_1_2": metric(0.005),
        "false_negatives/pairs/rule_1": metric(0.0125),
    }
    corpus = {"name": "garments", "split": "test", "rows": 1500, "items": 500}
    return {
        "items": Result("items", 1, corpus=corpus, metrics=items),
        "co-occurrence": Result("co-occurrence", 1, corpus=corpus, metrics=masks),
    }


@pytest.fixture
def full(results):
    photo = Image.new("RGB", (32, 32), "red")
    masks = [Masks(EVIL, np.array([1, 0, 0], bool), np.eye(4, dtype=bool))]
    return Report(
        title=EVIL,
        summary=[EVIL],
        results=results,
        history=[
            {"step": step, "split": split, "itc": 1.0, "image_to_text/recall@10/itc": 0.5, "mlm": None}
            for step in (1, 2)
            for split in ("train", "validation")
        ],
        masks=[MaskedPhoto(photo, EVIL, masks)],
        searches=[Search([Hit(0.5, True, photo=photo), Hit(0.4, False, text=EVIL)], text=EVIL, rank=1)],
        samples=[(photo, EVIL)],
        settings={"command": EVIL, "data": {EVIL: EVIL}},
    )


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_whole_escaped_and_asks_no_network(tmp_path, full):
    path = write_report(tmp_path, full)
    page = path.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    names = [tag for tag, _ in tags.seen]
    assert "script" not in names and "link" not in names and "iframe" not in names
    sources = [attributes["src"] for tag, attributes in tags.seen if tag == "img"]
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"url\(|@import", page)
    assert any(attributes.get("name") == "viewport" for tag, attributes in tags.seen if tag == "meta")
    assert path == tmp_path / "report" / "index.html"
    assert {file.name for file in path.parent.glob("*.png")} == {"masks.png", "retrieval.png", "curves.png"}


def test_figures_stand_beside_chance(full, tmp_path):
    page = write_report(tmp_path, full).read_text(encoding="utf-8")
    assert "61.0" in page and "2.0 by chance" in page and "33.0 at random, 80.0 by the word alone" in page


def test_empty_parts_are_left_out(tmp_path):
    path = write_report(tmp_path, Report(title="run"))
    page = path.read_text(encoding="utf-8")
    assert "<h2>" not in page and not list(path.parent.glob("*.png"))


def test_findings_skip_what_was_not_measured(results):
    labels = [label for label, _, _ in findings(results)]
    assert len(labels) == 5 and not any("evidence" in label or "ITM" in label for label in labels)
    assert findings({}) == []


def test_history_ignores_missing_values_and_other_lines(full):
    losses, recall = history_panels([*full.history, {"step": 3, "split": "batches", "grouped": True}])
    assert list(losses.lines) == ["ITC"] and recall.lines["photo to text"] == ([1, 2], [50.0, 50.0])
    assert history_panels([]) == []


def test_history_survives_a_line_that_was_cut_short(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "it', encoding="utf-8")
    assert read_history(tmp_path) == [{"step": 1}]
    assert read_history(tmp_path / "nowhere") == []


def test_a_result_survives_saving(tmp_path, results):
    result = results["items"]
    result.metrics["photo_to_photo/recall@1/itc"] = {
        "value": float("nan"),
        "low": float("nan"),
        "high": float("nan"),
        "n": 0,
    }
    path = result.save(tmp_path / "results")
    assert path.name == "items.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    assert set(content) == {
        "protocol",
        "version",
        "corpus",
        "model",
        "metrics",
        "candidates_sha256",
        "command",
        "versions",
    }
    assert content["metrics"]["image_to_text/recall@10/itc"] == pytest.approx(metric(0.61))
    back = read_results(tmp_path)["items"]
    assert back.corpus == result.corpus and np.isnan(back.metrics["photo_to_photo/recall@1/itc"]["value"])
    assert not list(path.parent.glob("*.partial"))


def test_the_table_puts_chance_below_each_score(results):
    table = results["items"].table()
    assert "image to text" in table and "61.0 [59.0, 63.0]" in table
    rows = pivot(results["items"].metrics)
    assert rows[0][0] == "image_to_text" and list(rows[0][1]) == ["itc", "chance"] and rows[0][2] == ["recall@10"]


def test_percent_shows_rare_things_and_no_negative_zero():
    assert [percent(value) for value in (0.0031, 0.0142, -0.00001, 1.0)] == ["0.31", "1.4", "0.0", "100.0"]


def test_unlike_results_are_not_compared(results):
    with pytest.raises(ValueError, match="not comparable: protocol"):
        comparable(results["items"], results["co-occurrence"])
    comparable(results["items"], results["items"])
    with pytest.raises(KeyError, match="image_to_text/recall@10/itc"):
        results["items"].value("image_to_text/recall@1/itc")


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="lacks"):
        Result.load(tmp_path / "x.json")
