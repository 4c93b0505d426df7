"""The report stands alone, escapes what it is given, leaves out what it has not and says so."""

import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from syncmask.evaluation import batch_sheets, confusions, glance, head_views, history, masks_over_time, word_maps
from syncmask.evaluation.archive import write_text
from syncmask.evaluation.cli import app
from syncmask.evaluation.figures import Hit, MaskedPhoto, Masks, Search
from syncmask.evaluation.findings import explained, findings
from syncmask.evaluation.metrics import exact
from syncmask.evaluation.parts import Part
from syncmask.evaluation.report import (
    figures_part,
    findings_part,
    masks_part,
    read_results,
    searches_part,
    settings_part,
    write_report,
)
from syncmask.evaluation.result import Result, comparable, percent, pivot
from syncmask.evaluation.running import choose_split

EVIL = '<script>window.hacked=1</script> & <img src=http://evil.example/x onerror="window.hacked=2">'
LONG = "unbroken" * 40


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
    """Every part, each text of which tries to run a script or is too wide."""
    red, blue = (Image.new("RGB", (32, 48), colour) for colour in ("red", "blue"))
    masks = [Masks(EVIL, np.array([1, 0, 0], bool), np.eye(4, dtype=bool))]
    lines = [
        {"step": step, "split": split, "itc": 1.0, "image_to_text/recall@10/itc": 0.5, "mlm": None, "time_s": step}
        for split in ("train", "validation")
        for step in (1, 2, 3)
    ]
    states = [
        masks_over_time.MaskState(step, step, "attention", step / 2, (4, 4), ["a"], [3], [[step]], [[step, 3]])
        for step in (0, 1, 2)
    ]
    batch = batch_sheets.Batch(["a", "b"], [[90, 10], [20, 80]], [[0, 1]], 0, 0.2, 0.85, 0.5, 1, 2)
    batches = {"random": batch, "grouped": batch}
    shown = confusions.Shown("text_to_image", f"{EVIL} {LONG}", red, blue, 0.5, False, [EVIL])
    counts = {"text_to_image": confusions.Counts(4, 2, 1)}
    counted = glance.Glance({EVIL: (3, 2)}, np.array([1, 2]), np.array([3, 4, 3]), 2, {EVIL: 3})
    mistake = head_views.Mistake(red, EVIL, EVIL, LONG, 0.9)
    labels = {side: [EVIL, LONG] for side in head_views.SIDES}
    search = Search([Hit(0.5, True, photo=red), Hit(0.4, False, text=EVIL)], text=f"{EVIL} {LONG}", rank=1)
    looked = word_maps.LookedAt(red, EVIL, [word_maps.WordMap(EVIL, np.eye(4), [0.1, 0.1, 0.5, 0.5], True)])
    settings = {"command": EVIL, "data": {EVIL: LONG}}
    return [
        findings_part(results, [EVIL]),
        history.training_part(lines, {}),
        masks_part([MaskedPhoto(red, EVIL, masks)]),
        masks_over_time.masks_over_time(states, [red], [EVIL], [[True, False, True]]),
        word_maps.word_map_part([looked], results["co-occurrence"]),
        searches_part([search], results["items"]),
        confusions.confusion_part([shown], counts),
        batch_sheets.batch_part(batches, {name: [red, blue] for name in batches}, True),
        head_views.composed_part([Search([Hit(0.5, True, photo=red)], text=EVIL, photo=blue)], 10),
        head_views.recognition_part(head_views.Recognised(f"a/{EVIL[:8]}", [EVIL, "b"], labels, [mistake], "fused")),
        glance.glance_part(counted, [(red, EVIL)]),
        history.speed_part(lines, [], {"optim": {"per_device_batch_size": 8}}, {"wall_s": 60.0, "energy": {}}),
        figures_part(results),
        settings_part(settings),
        Part("Lost", missing=EVIL),
    ]


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_whole_escaped_and_asks_no_network(tmp_path, full):
    path = write_report(tmp_path, EVIL, full)
    page = path.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    names = [tag for tag, _ in tags.seen]
    assert "script" not in names and "link" not in names and "iframe" not in names
    images = [attributes for tag, attributes in tags.seen if tag == "img"]
    assert len(images) > 20 and all(image["src"].startswith("data:image/") for image in images)
    assert all(image["alt"].strip() for image in images), "a picture without words for those who do not see it"
    assert not re.search(r"url\(|@import", page) and len(page) < 8_000_000
    anchors = {attributes["href"] for tag, attributes in tags.seen if tag == "a"}
    sections = {f"#{attributes['id']}" for tag, attributes in tags.seen if tag == "section"}
    assert anchors == sections and len(sections) == len(full)  # the lost part, but the last line
    assert path == tmp_path / "report" / "index.html"
    pictures = {re.sub(r"\W+", "_", name) for part in full for name in part.pictures}  # as any disk takes them
    assert {file.stem for file in path.parent.glob("*.png")} == pictures >= {"masks", "retrieval", "curves"}


def test_pictures_of_an_older_report_do_not_stay(tmp_path, full):
    write_report(tmp_path, "run", full)
    (tmp_path / "report" / "notes.txt").write_text("mine")
    write_report(tmp_path, "run", full[:1])
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"index.html", "notes.txt"}


def test_figures_stand_beside_chance_and_their_terms_are_explained(full, results, tmp_path):
    page = write_report(tmp_path, "run", full).read_text(encoding="utf-8")
    assert "61.0" in page and "2.0 by chance" in page and "33.0 at random, 80.0 by the word alone" in page
    assert "cosine of the vectors" in page and not any("evidence" in line for line in explained(findings(results)))


def test_what_is_missing_is_said_in_one_line(tmp_path):
    parts = [Part("Masks", missing="none were kept"), Part("Speed", body="<p>fast</p>", missing="no memory"), Part("x")]
    page = write_report(tmp_path, "run", parts).read_text(encoding="utf-8")
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Speed", "What is not here"]
    assert "Masks: none were kept; Speed: no memory." in page and not list(tmp_path.glob("report/*.png"))
    whole = write_report(tmp_path, "run", [Part("Speed", body="<p>fast</p>")]).read_text(encoding="utf-8")
    assert "What is not here" not in whole


def test_findings_skip_what_was_not_measured(results):
    labels = [label for label, _, _ in findings(results)]
    assert len(labels) == 5 and not any("evidence" in label or "ITM" in label for label in labels)
    assert findings({}) == [] and "no protocol was run" in findings_part({}).missing


def test_findings_of_heads():
    composed = {"all/recall@10/composed": metric(0.89), "all/recall@10/sum": metric(0.5)}
    names = {"category/accuracy/fused": metric(0.9), "category/accuracy/commonest": metric(0.15)}
    found = findings(
        {"colour-variants": Result("c", 1, metrics=composed), "recognition-category": Result("r", 1, metrics=names)}
    )
    assert [row[1][:4] for row in found] == ["89.0", "90.0"]
    assert "50.0 by adding" in found[0][2] and "15.0 by always" in found[1][2]


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
        "seal",
    }
    assert content["metrics"]["image_to_text/recall@10/itc"] == pytest.approx(metric(0.61))
    back = read_results(tmp_path)["items"]
    assert back.corpus == result.corpus and np.isnan(back.metrics["photo_to_photo/recall@1/itc"]["value"])
    assert not list(path.parent.glob("*.partial"))


def test_a_result_on_another_corpus_does_not_take_the_place_of_the_runs_own(tmp_path, results):
    """`syncmask evaluate RUN --corpus OTHER --out RUN/results/other.json` is of the same protocol."""
    own = results["items"].save(tmp_path / "results")
    elsewhere = Result("items", 1, corpus={"name": "other"}, metrics={"image_to_text/recall@10/itc": metric(0.11)})
    elsewhere.save(tmp_path / "results" / "other.json")
    found = read_results(tmp_path)
    assert found["items"].metrics == results["items"].metrics and own.stem == "items"
    assert any("61.0" in row[1] for row in findings(found)) and not any("11.0" in row[1] for row in findings(found))
    assert "11.0" in figures_part(found).body


def test_a_write_that_breaks_off_leaves_the_older_file(tmp_path, monkeypatch):
    file = write_text(tmp_path / "new" / "x.json", "old é")

    def full(self, text, encoding):
        with self.open("w") as half:
            half.write(text[:2])
        raise OSError("no space left")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="no space"):
        write_text(file, "newer")
    assert file.read_text(encoding="utf-8") == "old é"


def test_a_place_that_cannot_be_written_to_is_told_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    loaded = SimpleNamespace(run=None)
    monkeypatch.setattr("syncmask.evaluation.loading.load_checkpoint", lambda name: loaded)
    monkeypatch.setattr("syncmask.evaluation.running.run_protocol", lambda *_: pytest.fail("hours of measuring"))
    done = CliRunner().invoke(app, ["evaluate", "run", "--out", str(tmp_path / "file" / "items.json")])
    assert done.exit_code == 1 and done.output.startswith("Error:") and str(tmp_path / "file") in done.output


def test_an_empty_split_is_not_chosen():
    splits = {"train": [1, 2], "validation": [1], "test": []}
    assert choose_split(splits, None) == "validation" and choose_split(splits, "train") == "train"
    with pytest.raises(ValueError, match="no row in its split 'test'; it has train, validation"):
        choose_split(splits, "test")
    with pytest.raises(ValueError, match="no split 'nowhere'"):
        choose_split(splits, "nowhere")


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
