"""Plots of plain data: lines over training against a level, and bars. Drawn so that a phone can show them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from .typeset import GREY, INK

COLOURS = ("#1763a6", "#c2540a", "#1a7f37", "#7a3fa0", "#8a6d00")
WIDTH, HEIGHT, DPI = 4.6, 3.0, 170  # inches: at 360 pixels of a phone the smallest letters are 10 pixels high
Line = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        title: above it.
        lines: (x, y) by name.
        level: to read them against, drawn dashed.
        level_name: what the level is.
        x_label, y_label: of the axes.
        marks: x by name, moments such as the opening of the gate.
        span: (from, to, name), a stretch that is shaded.
        from_zero: begin the y axis at 0.
    """

    title: str
    lines: Mapping[str, Line]
    level: float | None = None
    level_name: str = "chance"
    x_label: str = "step"
    y_label: str = ""
    marks: tuple[tuple[float, str], ...] = ()
    span: tuple[float, float, str] | None = None
    from_zero: bool = True

    @property
    def words(self) -> str:
        """What eyes that do not see the plot are told: each line's first and last value, and the level."""
        ends = [f"{name} from {y[0]:.3g} to {y[-1]:.3g}" for name, (_, y) in self.lines.items()]
        level = [] if self.level is None else [f"{self.level_name} {self.level:.3g}"]
        return (
            f"{self.title} by {self.x_label}: {'; '.join([*ends, *level])}{' ' + self.y_label if self.y_label else ''}"
        )


def curves(panels: Sequence[Panel], columns: int = 2) -> Image.Image:
    """Line plots in rows of at most `columns`."""
    if not panels:
        raise ValueError("curves needs at least one panel")
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows), dpi=DPI, layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(every, panels):
        _draw_panel(axes, panel)
    for axes in every[len(panels) :]:
        axes.set_visible(False)
    return _drawn(figure)


def _draw_panel(axes, panel: Panel) -> None:
    for (name, (x, y)), colour in zip(panel.lines.items(), COLOURS * len(panel.lines)):
        axes.plot(x, y, label=name, color=colour, linewidth=1.8, marker="o" if len(x) < 25 else None, markersize=3.5)
    if panel.level is not None:
        axes.axhline(panel.level, color=GREY, linestyle="--", linewidth=1.3, label=panel.level_name)
    if panel.span is not None:
        axes.axvspan(*panel.span[:2], color=GREY, alpha=0.15, linewidth=0, label=panel.span[2])
    for (x, name), style in zip(panel.marks, (":", "-.")):
        axes.axvline(x, color=INK, linestyle=style, linewidth=1.3, label=name)
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    _dress(axes, panel.title, panel.x_label, panel.y_label)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=9, handlelength=1.6)


def bars(
    title: str, values: Mapping[str, float], x_label: str, show: Callable[[float], str] = "{:g}".format
) -> Image.Image:
    """Bars of one colour, a name and a value each, from top to bottom."""
    figure = Figure(figsize=(WIDTH, 0.9 + 0.3 * len(values)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh(range(len(values)), list(values.values()), color=COLOURS[0])
    axes.set_yticks(range(len(values)), shortened(values))
    axes.bar_label(drawn, [show(value) for value in values.values()], padding=3, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    _dress(axes, title, x_label, "")
    axes.grid(False, axis="y")
    return _drawn(figure)


def histogram(title: str, values: np.ndarray, x_label: str, y_label: str) -> Image.Image:
    """How often whole numbers occur; wide ranges in at most 30 columns."""
    values = np.asarray(values)
    low, high = int(values.min()), int(values.max())
    width = max(1, -(-(high - low + 1) // 30))
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.hist(values, bins=np.arange(low, high + width + 1, width) - 0.5, color=COLOURS[0], rwidth=0.9)
    axes.set_xlim(low - 1, max(high, low + width) + 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _dress(axes, title, x_label, y_label)
    axes.grid(False, axis="x")
    return _drawn(figure)


def heat_table(
    title: str, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], labels: tuple[str, str]
) -> Image.Image:
    """A table of counts (R, C) as shades, numbers inside; `labels` name columns and rows."""
    side = 1.8 + 0.42 * len(columns)
    figure = Figure(figsize=(max(WIDTH, side), max(HEIGHT, side * 0.85)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    shares = values / np.maximum(values.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in zip(*np.nonzero(values)):
        ink = "white" if shares[row, column] > 0.55 else INK
        axes.text(column, row, f"{values[row, column]:g}", ha="center", va="center", color=ink, fontsize=8)
    axes.set_xticks(range(len(columns)), shortened(columns), rotation=45, ha="right", fontsize=9)
    axes.set_yticks(range(len(rows)), shortened(rows), fontsize=9)
    _dress(axes, title, *labels)
    axes.grid(False)
    return _drawn(figure)


def shortened(names: Iterable[str], most: int = 22) -> list[str]:
    """Names that fit beside a plot; "$" is matplotlib's own sign and is taken as it stands.

    Example: `shortened(["a long name"], 6)` is `["a lon…"]`.
    """
    short = [name if len(name) <= most else name[: most - 1] + "…" for name in names]
    return [name.replace("$", r"\$") for name in short]


def _dress(axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(*shortened([title], 70), fontsize=11, loc="left", fontweight="bold", wrap=True)
    axes.set_xlabel(x_label, fontsize=10)
    axes.set_ylabel(y_label, fontsize=10)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _drawn(figure: Figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
