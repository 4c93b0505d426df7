"""From finished runs to tables, sentences, JSON and a picture, worded by the numbers whichever way they fall."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from syncmask.evaluation.result import percent
from syncmask.evaluation.typeset import GREY

from .ablation_analysis import Estimate, contrast, holm, verdict
from .ablation_plan import Comparison, Plan
from .ablation_readings import METRICS, Finished, Metric, table_of

SECTIONS = {
    "Retrieval of unseen items": (
        "recall_at_10",
        "recall_at_10_photo",
        "recall_at_10_text",
        "recall_at_10_tolerant",
        "recall_at_10_matching",
    ),
    "Masks, by the teacher's scores on unseen items": (
        "text_gap",
        "mim_error",
        "word_gain_attention",
        "word_gain_evidence",
        "word_gain_masks",
        "item_auc_attention",
        "item_auc_evidence",
        "item_auc_masks",
        "patch_gain_attention",
    ),
    "False negatives (FN)": ("fn_trained", "fn_rule_1", "fn_rules_1_2", "itm_fn_rule_1", "itm_fn_rules_1_2"),
    "What the runs did": ("grouped_steps", "scored_masks"),
}
PLOTTED = (
    "recall_at_10",
    "recall_at_10_tolerant",
    "text_gap",
    "word_gain_attention",
    "item_auc_attention",
    "fn_trained",
)
NOTE = (
    "In %, if not said otherwise: the mean over seeds with its 95 % interval over queries and seeds, and below it each "
    "seed. An arm's interval holds all luck of its own; whether arms differ is told by paired comparisons alone."
)
RUNS = Mapping[str, Mapping[int, Finished]]


@dataclass(frozen=True)
class Line:
    """A comparison as it fell: its estimate, p adjusted within its family, and what may be said."""

    comparison: Comparison
    estimate: Estimate
    adjusted_p: float
    verdict: str


@dataclass(frozen=True)
class Summary:
    """All that is said of a plan under one budget.

    Attributes:
        title: of the section. made_by: the command. remarks: what a reader must know, a sentence each.
        arms: metric -> arm -> estimate; metrics that nobody measured are absent.
        ratios: arm -> text gap over the reference's. cost: arm -> (steps, CPU seconds a step or None).
        families: lines by family; a comparison whose metric or arms are missing is absent.
    """

    title: str
    made_by: str
    reference: str
    remarks: tuple[str, ...]
    why: Mapping[str, str]
    arms: Mapping[str, Mapping[str, Estimate]]
    ratios: Mapping[str, Estimate]
    cost: Mapping[str, tuple[int, float | None]]
    families: Mapping[str, Sequence[Line]]


def summarise(
    plan: Plan, runs: RUNS, *, title: str, made_by: str, remarks: Sequence[str], cost: Mapping[str, tuple]
) -> Summary:
    """Estimate every metric of every arm, and every comparison of the plan, from arm -> seed -> finished run."""
    runs = {arm: by_seed for arm, by_seed in runs.items() if by_seed}
    tables = {metric: table_of(metric, runs) for metric in METRICS}
    arms = {metric: {arm: contrast(table, {arm: 1}) for arm in table.arms} for metric, table in tables.items() if table}
    ratios, gaps = {}, tables["text_gap"]
    if gaps and plan.reference in gaps.arms:
        ratios = {
            arm: contrast(gaps, {arm: 1, plan.reference: -1}, ratio=True) for arm in gaps.arms if arm != plan.reference
        }
    return Summary(
        title=title,
        made_by=made_by,
        reference=plan.reference,
        remarks=tuple(remarks),
        why={arm: plan.arms[arm].why for arm in runs},
        arms=arms,
        ratios=ratios,
        cost=cost,
        families={name: judge(family, runs) for name, family in plan.families.items()},
    )


def judge(family: Sequence[Comparison], runs: RUNS) -> list[Line]:
    """Estimate the comparisons of a family that can be, over the seeds that all their arms have; adjust p; say what."""
    found = []
    for one in family:
        table = table_of(one.metric, {arm: runs[arm] for arm in one.of}) if set(one.of) <= set(runs) else None
        if table is not None:
            found.append((one, contrast(table, one.of, ratio=one.ratio, level=one.level)))
    adjusted = holm([estimate.p for _, estimate in found])
    return [
        Line(one, estimate, p, verdict(estimate, p, METRICS[one.metric].better))
        for (one, estimate), p in zip(found, adjusted)
    ]


def content(summary: Summary) -> dict:
    """As plain data, for JSON; NaN becomes null."""
    return _jsonable(asdict(summary))


# ---------------------------------------------------------------------------------------------------------- Markdown


def markdown(summary: Summary, picture: str | None = None) -> str:
    """The section of a plan under one budget; `picture` is the file beside the page, if any."""
    parts = [f"### {summary.title}", f"Made by `{summary.made_by}`.", *summary.remarks]
    parts += ["\n".join(sentence(line) for line in summary.families["primary"])]
    parts += [f"![{summary.title}]({picture})"] if picture else []
    for name, lines in summary.families.items():
        if lines:
            parts += [f"**{name[0].upper()}{name[1:]} comparisons** (Holm over {len(lines)})", _comparisons(lines)]
    for title, metrics in SECTIONS.items():
        known = [metric for metric in metrics if metric in summary.arms]
        if known:
            parts += [f"**{title}**", _arms(summary, known)]
    parts += ["**Cost**", _cost(summary), NOTE]
    return "\n\n".join(part for part in parts if part)


def sentence(line: Line) -> str:
    """One comparison in words, made of its numbers."""
    one, estimate = line.comparison, line.estimate
    return (
        f"- {one.claim}: {METRICS[one.metric].label}, {one.what}: {_signed(one, estimate)}, "
        f"adjusted p {_p(line.adjusted_p)}: **{line.verdict}**."
    )


def _comparisons(lines: Sequence[Line]) -> str:
    rows = [["claim", "metric", "what", "change [95 %]", "each seed", "p", "adjusted", ""]]
    for line in lines:
        one, estimate = line.comparison, line.estimate
        seeds = " · ".join(_number(one, value, estimate.level) for value in estimate.by_seed)
        numbers = [_p(estimate.p), _p(line.adjusted_p)]
        rows.append([one.claim, METRICS[one.metric].label, one.what, _signed(one, estimate), seeds, *numbers])
        rows[-1].append(f"**{line.verdict}**")
    return table(rows)


def _arms(summary: Summary, metrics: Sequence[str]) -> str:
    ratios = summary.ratios if "text_gap" in metrics else {}
    heads = [METRICS[metric].label for metric in metrics] + ([f"gap / {summary.reference}'s"] if ratios else [])
    rows = [["arm", *heads]]
    for arm, why in summary.why.items():
        row = [_cell(METRICS[metric], summary.arms[metric][arm]) for metric in metrics]
        if ratios:
            number = Metric("", read=lambda _: [], kind="number")
            row.append(_cell(number, ratios[arm]) if arm in ratios else "1")
        rows.append([f"`{arm}`: {why}", *row])
    return table(rows)


def _cost(summary: Summary) -> str:
    rows = [["arm", "steps", "CPU s a step"]]
    for arm, (steps, seconds) in summary.cost.items():
        rows.append([f"`{arm}`", f"{steps:,}", "not measured" if seconds is None else f"{seconds:.3f}"])
    return table(rows)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first one the head, as a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _cell(metric: Metric, estimate: Estimate) -> str:
    show = percent if metric.kind == "share" else "{:.3f}".format
    if math.isnan(estimate.value):
        return "none"
    seeds = " · ".join("none" if math.isnan(value) else show(value) for value in estimate.by_seed)
    ends = "" if math.isnan(estimate.low) else f" [{show(estimate.low)}, {show(estimate.high)}]"
    return f"{show(estimate.value)}{ends}<br>{seeds}"


def _number(one: Comparison, value: float, level: float) -> str:
    if math.isnan(value):
        return "none"
    if one.ratio:
        return f"x {value:.2f}"
    share = METRICS[one.metric].kind == "share"
    text = percent(value - level) if share else f"{value - level:.4f}"
    return f"+{text}" if float(text) > 0 else text


def _signed(one: Comparison, estimate: Estimate) -> str:
    value, low, high = (_number(one, end, estimate.level) for end in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def _p(p: float) -> str:
    return "unknown" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def write_section(page: Path, name: str, text: str):
    """Put a section between its markers in a page, `<!-- ablations NAME -->` and `<!-- end -->`.

    Raises:
        ValueError: the page has no such markers.
    """
    first, last = f"<!-- ablations {name} -->", "<!-- end -->"
    pattern = re.compile(f"({re.escape(first)}\n).*?({re.escape(last)})", re.DOTALL)
    before = page.read_text(encoding="utf-8")
    if not pattern.search(before):
        raise ValueError(f"{page} has no section {first} ... {last}; add both lines where the table is to stand")
    page.write_text(pattern.sub(lambda found: f"{found[1]}\n{text}\n\n{found[2]}", before), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------- picture


def picture(summary: Summary, metrics: Sequence[str] = PLOTTED) -> Image.Image:
    """A panel a metric: dots are seeds, bars 95 % intervals, the dashed line the mean of the reference arm."""
    shown = [metric for metric in metrics if metric in summary.arms]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    size = (1.4 + 3.6 * columns, rows * (1.1 + 0.36 * len(summary.why)) + 0.4)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes, metric in zip(grid, shown):
        _draw(axes, METRICS[metric], summary.arms[metric], summary.reference)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    figure.supxlabel(
        f"{summary.title}. Dots: seeds; bars: 95 %; dashed: {summary.reference}. {summary.made_by}", size=8
    )
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _draw(axes, metric: Metric, arms: Mapping[str, Estimate], reference: str):
    scale = 100 if metric.kind == "share" else 1
    for place, estimate in enumerate(arms.values()):
        ends = [scale * estimate.low, scale * estimate.high]
        axes.plot(ends, [place, place], color="#3b6fb6", linewidth=2.2, solid_capstyle="butt")
        axes.plot([scale * estimate.value], [place], "|", color="#3b6fb6", markersize=11, markeredgewidth=2.2)
        seeds = scale * np.array(estimate.by_seed)
        axes.plot(seeds, np.full(len(seeds), place), "o", color="#e08a1e", markersize=4.5, markeredgecolor="white")
    if reference in arms:
        axes.axvline(scale * arms[reference].value, color=GREY, linestyle="--", linewidth=1.1)
    axes.set_yticks(range(len(arms)), list(arms))
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_title(f"{metric.label}{', %' if metric.kind == 'share' else ''}", fontsize=10, loc="left", weight="bold")
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _jsonable(value):
    if isinstance(value, Mapping):
        return {str(key): _jsonable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value
