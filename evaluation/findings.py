"""The figures that a reader wants first, each beside what it must be read against."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .result import Result, cell, percent

Finding = tuple[str, str, str]
WORDS = {
    "(ITC)": "ITC: by the cosine of the vectors of photo and text",
    "(ITM)": "ITM: the best of these, put in order by the matching head",
    "(attention)": "attention: words by how sharply they and a patch pick each other out",
    "(evidence)": "evidence: words by how much likelier they are with this photo than with others",
    "(alignment)": "alignment: words by how much better their best patch fits than other photos' best patches",
    "by the word alone": "by the word alone: a table of how often each word is visible, without looking at the photo",
    "by contrast alone": "by contrast alone: the patches with the most contrast, without text or training",
    "false negatives": "false negative: another item's text that is true of the photo",
}


def findings(results: Mapping[str, Result]) -> list[Finding]:
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
        strategies = ("attention", "evidence", "alignment")
        rows += [row for strategy in strategies for row in _mask_findings(masks, strategy)]
        pointing = {"pointing/hit/other_word": "for another word's map", "pointing/hit/random": "at random"}
        rows.append(_finding(masks, "a word's attention peaks on its own part", "pointing/hit/own_word", pointing))
        rows.append(_gap(masks))
        against = {
            "false_negatives/pairs/rule_1": "where alike texts may meet",
            "false_negatives/pairs/random": "in random batches",
        }
        label = "false negatives among the pairs of grouped batches"
        rows.append(_finding(masks, label, "false_negatives/pairs/rules_1_2", against))
    for name, result in results.items():
        rows += _head_findings(name, result)
    return [row for row in rows if row is not None]


def _head_findings(name: str, result: Result) -> list[Finding | None]:
    """Of a finetuned head: composed retrieval, or recognition."""
    if "all/recall@10/composed" in result.metrics:
        others = {
            "sum": "by adding both vectors",
            "text_only": "by the words alone",
            "image_only": "by the photo alone",
        }
        against = {f"all/recall@10/{score}": what for score, what in others.items()}
        label = f"photo and words find the wanted photo, among the first 10 ({name})"
        return [_finding(result, label, "all/recall@10/composed", against | {"all/recall@10/chance": "by chance"})]
    if not name.startswith("recognition-"):
        return []
    level, rows = name.removeprefix("recognition-"), []
    for side, what in {"fused": "photo and text", "image_only": "the photo alone"}.items():
        against = {
            f"{level}/accuracy/commonest": "by always saying the commonest",
            f"{level}/accuracy/chance": "by chance",
        }
        rows.append(_finding(result, f"the right {level} by {what}", f"{level}/accuracy/{side}", against))
    return rows


def _gap(result: Result) -> Finding | None:
    label = "another item's text makes hidden patches harder to paint, by"
    found = _finding(result, label, "text_gap/relative_rise/truth_masks", {})
    return found and (*found[:2], "0 where the text is not used")


def _mask_findings(result: Result, strategy: str) -> list[Finding | None]:
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


def _finding(result: Result, label: str, name: str, against: Mapping[str, str]) -> Finding | None:
    """One line, or None where the result lacks the metric."""
    if name not in result.metrics or math.isnan(result.value(name)):
        return None
    known = {other: what for other, what in against.items() if other in result.metrics}
    beside = ", ".join(f"{percent(result.value(other))} {what}" for other, what in known.items())
    return label, cell(result.metrics[name]), beside


def explained(rows: Sequence[Finding]) -> list[str]:
    """A sentence for each term that occurs in the rows."""
    told = " ".join(part for row in rows for part in row)
    return [meaning for term, meaning in WORDS.items() if term in told]
