"""The report of a run, report/index.html: one file that explains itself, opens anywhere and asks no network.

Takes plain data, so that it can be tested without a model; `showcase.py` makes the pictures from one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from PIL import Image

from . import fragments
from .figures import MaskedPhoto, Panel, Search, curves, mask_view, retrieval_sheet
from .result import Result, cell, percent

LOSSES = {"itc": "ITC", "itm": "ITM", "mlm": "MLM", "mim": "MIM"}


@dataclass
class Report:
    """What a report shows; a part that is empty is left out.

    Attributes:
        title: of the page, such as the run's name.
        summary: sentences under the title.
        results: by protocol.
        history: the lines of metrics.jsonl.
        masks: photos with their masks, synchronised and random.
        searches: queries with their best results.
        samples: photos and texts of the corpus.
        settings: sections of settings, as in config.yaml.
    """

    title: str
    summary: Sequence[str] = ()
    results: Mapping[str, Result] = field(default_factory=dict)
    history: Sequence[Mapping] = ()
    masks: Sequence[MaskedPhoto] = ()
    searches: Sequence[Search] = ()
    samples: Sequence[tuple[Image.Image, str]] = ()
    settings: Mapping = field(default_factory=dict)


def write_report(run: str | Path, report: Report) -> Path:
    """Writes report/index.html, and beside it masks.png, retrieval.png and curves.png where there is something to show.

    Returns:
        The path of index.html.
    """
    folder = Path(run) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    panels = history_panels(report.history, report.results.get("items"))
    pictures = {}
    if panels:
        pictures["curves"] = curves(panels)
    if report.masks:
        pictures["masks"] = mask_view(report.masks)
    if report.searches:
        pictures["retrieval"] = retrieval_sheet(report.searches, _caption(report.results.get("items")))
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.png")
    path = folder / "index.html"
    path.write_text(fragments.page(report.title, _sections(report, panels)), encoding="utf-8")
    return path


def _sections(report: Report, panels: Sequence[Panel]) -> list[tuple[str, str]]:
    items, co_occurrence = report.results.get("items"), report.results.get("co-occurrence")
    summary = "".join(f"<p>{escape(sentence)}</p>" for sentence in report.summary)
    learned = fragments.finding_table(findings(report.results))
    plots = fragments.pictures(fragments.image(curves([panel]), panel.title) for panel in panels)
    masks = fragments.mask_rows(report.masks)
    searches = fragments.search_rows(report.searches)
    if masks:
        masks = f'<p class="note">Items that were not trained on. Dimmed patches are hidden.</p>{masks}'
    if searches:
        searches = f'<p class="note">{escape(_caption(items))} Numbers are cosines.</p>{searches}'
    return [
        ("What was learned", summary + learned),
        ("Over training", plots),
        ("What the masks hide", masks),
        ("Finding photos by text", searches),
        ("The corpus", fragments.sample_rows(report.samples)),
        ("Retrieval", fragments.result_tables(items)),
        (
            "Masks against the truth",
            fragments.result_tables(co_occurrence, ("words", "patches", "pointing", "text_gap")),
        ),
        ("False negatives in batches", fragments.result_tables(co_occurrence, ("false_negatives",))),
        ("Settings", "".join(fragments.table(rows, (name, "")) for name, rows in setting_rows(report.settings))),
    ]


# -------------------------------------------------------------------------------------------------------- findings


def findings(results: Mapping[str, Result]) -> list[tuple[str, str, str]]:
    """The figures that a reader wants first: (what, this model, what to read it against)."""
    rows = []
    items, masks = results.get("items"), results.get("co-occurrence")
    if items:
        for way, name in (("image_to_text", "photo finds its text"), ("text_to_image", "text finds a photo")):
            chance = {f"{way}/recall@10/chance": "by chance"}
            for score in ("itc", "itm"):
                label = f"{name}, among the first 10 ({score.upper()})"
                rows.append(_finding(items, label, f"{way}/recall@10/{score}", chance))
    if masks:
        rows += [row for strategy in ("attention", "evidence") for row in _mask_findings(masks, strategy)]
        pointing = {"pointing/hit/other_word": "for another word's map", "pointing/hit/random": "at random"}
        rows.append(_finding(masks, "a word's attention peaks on its own part", "pointing/hit/own_word", pointing))
        rows.append(
            _finding(masks, "another item's text raises the MIM error by", "text_gap/relative_rise/truth_masks", {})
        )
        rule_1 = {"false_negatives/pairs/rule_1": "without rule 2", "false_negatives/pairs/random": "in random batches"}
        rows.append(_finding(masks, "false negatives in batches", "false_negatives/pairs/rules_1_2", rule_1))
    return [row for row in rows if row is not None]


def _mask_findings(result: Result, strategy: str) -> list[tuple[str, str, str] | None]:
    words = {"words/precision/random": "at random", "words/precision/blind": "by the word alone"}
    views = {"words/item_auc/random": "blind to the photo"}
    patches = {
        "patches/precision/random": "at random",
        "patches/precision/centre": "in the centre",
        "patches/precision/contrast": "by contrast alone",
    }
    return [
        _finding(result, f"hidden words that this photo shows ({strategy})", f"words/precision/{strategy}", words),
        _finding(
            result, f"a view that shows a word scores it higher ({strategy})", f"words/item_auc/{strategy}", views
        ),
        _finding(result, f"hidden patches on named parts ({strategy})", f"patches/precision/{strategy}", patches),
    ]


def _finding(result: Result, label: str, name: str, against: Mapping[str, str]) -> tuple[str, str, str] | None:
    """One line, or None where the result lacks the metric."""
    if name not in result.metrics or math.isnan(result.value(name)):
        return None
    known = {other: what for other, what in against.items() if other in result.metrics}
    beside = ", ".join(f"{percent(result.value(other))} {what}" for other, what in known.items())
    return label, cell(result.metrics[name]), beside


def _caption(items: Result | None) -> str:
    """The recall beside which the searches are to be read."""
    name = "text_to_image/recall@{}/{}"
    if items is None or name.format(10, "itc") not in items.metrics:
        return "Items that were not trained on; right ones are framed green."
    found, chance = (100 * items.value(name.format(10, score)) for score in ("itc", "chance"))
    return (
        f"Items that were not trained on; right ones are framed green. Of all texts {found:.0f} % find a photo of "
        f"their item among the first 10 of {items.corpus.get('rows', 'all')}; chance: {chance:.1f} %."
    )


# ---------------------------------------------------------------------------------------------------------- curves


def history_panels(history: Sequence[Mapping], items: Result | None = None) -> list[Panel]:
    """Lines of metrics.jsonl -> the losses by step, and the recall of the validation split against chance."""
    train = [line for line in history if line.get("split") == "train"]
    losses = {name: _line(train, key) for key, name in LOSSES.items()}
    losses = {name: line for name, line in losses.items() if len(line[0]) > 1}
    panels = [Panel("Training losses", losses, y_label="loss")] if losses else []
    tested = [line for line in history if line.get("split") == "validation"]
    names = {
        f"{way}/recall@10/itc": name
        for way, name in (("image_to_text", "photo to text"), ("text_to_image", "text to photo"))
    }
    recalls = {name: _line(tested, key, 100) for key, name in names.items()}
    recalls = {name: line for name, line in recalls.items() if len(line[0])}
    if recalls:
        chance = _line(tested, "image_to_text/recall@10/chance", 100)[1]
        level = chance[-1] if chance else None
        panels.append(Panel("Recall@10 on unseen items", recalls, level=level, y_label="%"))
    return panels


def _line(lines: Sequence[Mapping], key: str, scale: float = 1.0) -> tuple[list[float], list[float]]:
    points = [(line["step"], scale * line[key]) for line in lines if line.get(key) is not None]
    return [x for x, _ in points], [y for _, y in points]


# ---------------------------------------------------------------------------------------------------- run folder


def read_history(run: str | Path) -> list[dict]:
    """The lines of metrics.jsonl; one cut short by a kill is left out, no file gives none."""
    path = Path(run) / "metrics.jsonl"
    complete = path.read_text(encoding="utf-8").rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in complete.splitlines() if line.strip()]


def read_results(run: str | Path) -> dict[str, Result]:
    """results/*.json by protocol."""
    found = [Result.load(path) for path in sorted((Path(run) / "results").glob("*.json"))]
    return {result.protocol: result for result in found}


def setting_rows(settings: Mapping) -> list[tuple[str, list[tuple[str, str]]]]:
    """Sections of settings as tables of names and values; settings outside a section come first."""
    loose = [(name, str(value)) for name, value in settings.items() if not isinstance(value, Mapping)]
    sections = [(name, value) for name, value in settings.items() if isinstance(value, Mapping)]
    tables = [(name, [(key, str(one)) for key, one in section.items()]) for name, section in sections]
    return ([("run", loose)] if loose else []) + tables
