"""The report of a run, report/index.html: one file that explains itself, opens anywhere and asks no network.

`reporting.report_run` is the entry: it makes the parts of a run and hands them over. Here all is plain data, so that it
can be tested without a model; `showcase.py` shows the model at work.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from . import fragments
from .archive import write_text
from .figures import MaskedPhoto, Search, mask_view, retrieval_sheet
from .findings import explained, findings
from .parts import Part
from .result import Result

ABSENT = "What is not here"


def write_report(run: str | Path, title: str, parts: Sequence[Part]) -> Path:
    """Writes report/index.html and beside it a PNG of each picture, for slides; PNGs of an older report are removed.

    Args:
        run: the run's folder.
        title: of the page.
        parts: in order; those without a body are left out, and a last line says which and why.

    Returns:
        The path of index.html.
    """
    folder = Path(run) / "report"
    for old in folder.glob("*.png"):
        old.unlink()
    sections = [(part.title, _section(part)) for part in parts]
    page = fragments.page(title, [*sections, (ABSENT, absent(parts))], contents=True)
    path = write_text(folder / "index.html", page)
    for part in parts:
        for name, picture in part.pictures.items():
            # A label's column, after which a picture is named, may be called anything.
            file = re.sub(r"[^\w-]+", "_", name) + ".png"
            picture.save(folder / file, optimize=True)
    return path


def _section(part: Part) -> str:
    note = f'<p class="lead">{escape(part.note)}</p>' if part.note and part.body else ""
    return note + part.body if part.body else ""


def absent(parts: Sequence[Part]) -> str:
    """One line that says what is missing and why; empty where nothing is."""
    lines = [f"{part.title}: {part.missing}" for part in parts if part.missing]
    return f'<p class="note">{escape("; ".join(lines))}.</p>' if lines else ""


# ------------------------------------------------------------------------------------------------------------ parts


def findings_part(results: Mapping[str, Result], summary: Sequence[str] = ()) -> Part:
    """What was learned, each figure beside what it must be read against."""
    said = "".join(f"<p>{escape(sentence)}</p>" for sentence in summary)
    rows = findings(results)
    table = fragments.finding_table(rows)
    if not table:
        return Part("What was learned", body=said, missing="no protocol was run (--no-evaluate); see syncmask evaluate")
    terms = "; ".join(["In %, with 95 % intervals in brackets, on items that were not trained on", *explained(rows)])
    return Part("What was learned", body=f'{said}{table}<p class="note">{escape(terms)}.</p>')


def masks_part(masks: Sequence[MaskedPhoto]) -> Part:
    """What the trained teacher hides, beside random masks."""
    if not masks:
        return Part("What the masks hide", missing="this model masks nothing, as only pretraining does")
    note = (
        "What the trained teacher would hide on items that were not trained on, beside as many words and patches drawn "
        "at random; dimmed patches are hidden."
    )
    return Part("What the masks hide", note, fragments.mask_rows(masks), {"masks": mask_view(masks)})


def searches_part(searches: Sequence[Search], items: Result | None) -> Part:
    """Texts with the photos that they find."""
    note = _caption(items)
    body = fragments.search_rows(searches)
    return Part(
        "Finding photos by text", f"{note} Numbers are cosines.", body, {"retrieval": retrieval_sheet(searches, note)}
    )


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


def figures_part(results: Mapping[str, Result]) -> Part:
    """Every figure of every protocol, folded away."""
    body = "".join(
        fragments.folded(f"{name} ({_subject(result)})", fragments.result_tables(result))
        for name, result in results.items()
    )
    return Part("All figures", "Every figure of every protocol that was run; open what you need." if body else "", body)


def _subject(result: Result) -> str:
    return ", ".join(str(result.corpus[key]) for key in ("name", "split") if key in result.corpus)


def settings_part(settings: Mapping) -> Part:
    """config.yaml, folded away."""
    body = "".join(fragments.folded(name, fragments.table(rows)) for name, rows in setting_rows(settings))
    return Part("Settings", body=body)


def read_results(run: str | Path) -> dict[str, Result]:
    """results/*.json by their names, which are their protocols' unless --out gave another: then of another corpus."""
    return {path.stem: Result.load(path) for path in sorted((Path(run) / "results").glob("*.json"))}


def setting_rows(settings: Mapping) -> list[tuple[str, list[tuple[str, str]]]]:
    """Sections of settings as tables of names and values; settings outside a section come first."""
    loose = [(name, str(value)) for name, value in settings.items() if not isinstance(value, Mapping)]
    sections = [(name, value) for name, value in settings.items() if isinstance(value, Mapping)]
    tables = [(name, [(key, str(one)) for key, one in section.items()]) for name, section in sections]
    return ([("run", loose)] if loose else []) + tables
