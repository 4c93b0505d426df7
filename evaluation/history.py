"""What a run recorded while it trained, as plots: losses and recall against chance, the gate, speed and memory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from . import fragments
from .archive import complete_lines
from .parts import Part
from .plots import Panel, bars, curves

TIMES = "times.jsonl"
LOSSES = {
    "itc": "ITC: which text is this photo's",
    "itm": "ITM: do these two belong together",
    "mlm": "MLM: hidden words",
    "mim": "MIM: hidden patches",
}
# One match to two negatives: the entropy of a head that knows nothing but that.
ITM_CHANCE = math.log(3) - 2 / 3 * math.log(2)
PHASES = {
    "training_s": "training",
    "waiting_s": "waiting for photos",
    "planning_s": "planning batches",
    "validating_s": "validating",
    "saving_s": "saving checkpoints",
}
Lines = Sequence[Mapping]


def read_history(run: str | Path, name: str = "metrics.jsonl") -> list[dict]:
    """The lines of a record of the run; one cut short by a kill is left out, no file gives none."""
    return [json.loads(line) for line in complete_lines(Path(run) / name)]


def _line(lines: Lines, key: str, scale: float = 1.0) -> tuple[list[float], list[float]]:
    points = [(line["step"], scale * line[key]) for line in lines if line.get(key) is not None]
    return [x for x, _ in points], [y for _, y in points]


def _of(history: Lines, split: str) -> list[Mapping]:
    return [line for line in history if line.get("split") == split]


def global_batch(settings: Mapping) -> int | None:
    """Pairs that are compared with each other in a step, by config.yaml; None where it does not tell."""
    optim, processes = settings.get("optim") or {}, (settings.get("about") or {}).get("processes", 1)
    batch, batches = optim.get("per_device_batch_size"), optim.get("gradient_accumulation_steps", 1)
    return batch * processes * (batches if optim.get("full_contrast") else 1) if batch else None


# ---------------------------------------------------------------------------------------------------------- panels


def gate(history: Lines) -> dict:
    """When synchronised masks took over: `marks` and `span` of a `Panel`; {} where they never did."""
    lines = [(line["step"], line["mask_strength"]) for line in _of(history, "train") if "mask_strength" in line]
    rising = [(step, strength) for step, strength in lines if 0 < strength < 1]
    if not any(strength for _, strength in lines):
        return {}
    if len(rising) > 1:
        # A straight ramp is known exactly by two of its points, though steps between are not logged.
        (first, low), (last, high) = rising[0], rising[-1]
        length = (last - first) / (high - low)
        opened, full = round(first - low * length), round(first + (1 - low) * length)
    else:
        opened = max((step for step, strength in lines if strength == 0), default=0)
        full = next((step for step, strength in lines if strength >= 1), lines[-1][0])
    return {"marks": ((opened, "gate opens"),), "span": (opened, full, "masks take over")}


def grouped_from(history: Lines) -> tuple[tuple[float, str], ...]:
    """When batches began to be grouped, as a mark; () where they never were."""
    first = next((line["step"] for line in _of(history, "batches") if line.get("grouped")), None)
    return () if first is None else ((first, "batches are grouped"),)


def loss_panels(history: Lines, settings: Mapping) -> list[Panel]:
    """A plot a loss, each with the value of knowing nothing where that is known."""
    train, batch = _of(history, "train"), global_batch(settings)
    chance = {"itm": ITM_CHANCE} | ({"itc": math.log(batch)} if batch and batch > 1 else {})
    columns = (settings.get("objective") or {}).get("label_columns") or ("category", "subcategory")
    labels = [name for name in columns if train and name in train[0]]
    names = LOSSES | {"composed": "query finds its target"} | {name: f"{name}: which label" for name in labels}
    panels, opening = [], gate(history)
    for key, title in names.items():
        line, level = _line(train, key), chance.get(key)
        # Masks change the losses of what is hidden, grouping those of what is compared.
        moments = opening if key in ("mlm", "mim") else {"marks": grouped_from(history)}
        if len(line[0]) > 1:
            moments = {"level": level, "level_name": "knowing nothing", "from_zero": False, **moments}
            panels.append(Panel(title, {"loss": line}, y_label="loss", **moments))
    return panels


def validation_panels(history: Lines) -> list[Panel]:
    """Recall, or accuracy, on the validation split against chance."""
    tested, panels = _of(history, "validation"), []
    groups = {
        "Photo finds its text, recall@10 on unseen items": {"image_to_text/recall@10/itc": "model"},
        "Text finds a photo, recall@10 on unseen items": {"text_to_image/recall@10/itc": "model"},
        "Recall@10 of targets on unseen items": {
            f"all/recall@10/{score}": score.replace("_", " ")
            for score in ("composed", "sum", "text_only", "image_only")
        },
        **{f"Accuracy on unseen items: {column}": _accuracies(column) for column in _label_columns(tested)},
    }
    for title, keys in groups.items():
        lines = {name: _line(tested, key, 100) for key, name in keys.items()}
        lines = {name: line for name, line in lines.items() if len(line[0])}
        if lines:
            first = next(key for key in keys if _line(tested, key)[0])
            chance = _line(tested, f"{first.rsplit('/', 1)[0]}/chance", 100)[1]
            panels.append(Panel(title, lines, level=chance[-1] if chance else None, y_label="%", **gate(history)))
    return panels


def _label_columns(tested: Lines) -> list[str]:
    names = [name.partition("/accuracy/")[0] for line in tested for name in line if "/accuracy/" in name]
    return list(dict.fromkeys(names))


def _accuracies(column: str) -> dict[str, str]:
    sides = {"fused": "photo and text", "image_only": "photo alone", "text_only": "text alone"}
    return {f"{column}/accuracy/{side}": name for side, name in sides.items()}


def progress_panels(history: Lines, settings: Mapping) -> list[Panel]:
    """What opens the gate: how much likelier hidden words are with their own photo; and the learning rate."""
    train, panels, opening = _of(history, "train"), [], gate(history)
    rate, gap = _line(train, "learning_rate", 1e3), _line(train, "mlm_gap")
    tested = sum(step <= opening["span"][0] for step in gap[0]) + 1 if opening else len(gap[0])
    if len(gap[0]) > 1 and any(gap[1]):
        # The gate is not tested again once it is open.
        line, level = (gap[0][:tested], gap[1][:tested]), (settings.get("objective") or {}).get("gate_threshold")
        title = "Gain of the own photo on hidden words"
        marks = {"marks": opening.get("marks", ()), "level": level, "level_name": "what opens the gate"}
        panels.append(Panel(title, {"own photo against another's": line}, y_label="nats a word", **marks))
    if len(rate[0]) > 1:
        panels.append(Panel("Learning rate", {"learning rate": rate}, y_label="x 0.001", **opening))
    return panels


def training_part(history: Lines, settings: Mapping) -> Part:
    """Losses, recall against chance, learning rate and gate over the steps."""
    panels = [*validation_panels(history), *loss_panels(history, settings), *progress_panels(history, settings)]
    if not panels:
        return Part("Over training", missing="the run has no metrics.jsonl with two logged steps")
    note = "Validation is on items that are never trained on. Dashed: what knowing nothing would give."
    if gate(history):
        note += (
            " Masks are drawn at random until the teacher predicts hidden words better with a photo than with another "
            "item's (dotted: this gate opens); then its scores take over (shaded). Other words are hidden from there "
            "on, so the losses of hidden words and patches before and after cannot be compared."
        )
    if grouped_from(history):
        note += (
            " Likewise the losses that compare pairs rise where batches are grouped (dotted too): such a batch is full "
            "of near twins, and so harder."
        )
    return Part("Over training", note, fragments.plots(panels), {"curves": curves(panels[:6])})


# ----------------------------------------------------------------------------------------------- speed and memory


def speeds(history: Lines, settings: Mapping, times: Lines = ()) -> tuple[list[float], list[float]]:
    """(steps, pairs a second): of times.jsonl, or of the clock in metrics.jsonl where an older run has no times.

    Seconds of validating, saving and planning do not count.
    """
    if times:
        kept = [(line["step"], line["pairs"] / training_seconds(line, waiting=True)) for line in times if line["pairs"]]
        return [step for step, _ in kept], [speed for _, speed in kept]
    optim = settings.get("optim") or {}
    batches = 1 if optim.get("full_contrast") else optim.get("gradient_accumulation_steps", 1)
    batch = (global_batch(settings) or 0) * batches
    steps, found = [], []
    for one, other in zip(history, history[1:]):
        # Two logged steps in a row: nothing but training lies between, unless the run was resumed there.
        seconds = other.get("time_s", 0) - one.get("time_s", 0)
        if one.get("split") == other.get("split") == "train" and seconds > 0 and batch:
            steps.append(other["step"])
            found.append((other["step"] - one["step"]) * batch / seconds)
    return steps, found


def training_seconds(line: Mapping, waiting: bool = False) -> float:
    """What is left of a reading's clock for training itself; `waiting` = with what it waited for photos."""
    other = sum(line[name] for name in PHASES if name in line and not (waiting and name == "waiting_s"))
    return max(1e-9, line["seconds"] - other)


def phase_seconds(times: Lines) -> dict[str, float]:
    """Seconds of the run by phase."""
    totals = {name: sum(line.get(key, 0.0) for line in times) for key, name in PHASES.items()}
    return totals | {"training": sum(training_seconds(line) for line in times)}


def waiting_share(times: Lines) -> float:
    """Share of the time of training, planning, validating and saving apart, that went by waiting for photos."""
    shares = phase_seconds(times)
    waited = shares["waiting for photos"]
    return waited / (shares["training"] + waited) if waited else 0.0


def speed_part(history: Lines, times: Lines, settings: Mapping, usage: Mapping) -> Part:
    """Pairs a second, where the time went, and memory.

    Args:
        history: of metrics.jsonl.
        times: of times.jsonl; empty for runs made before it was kept.
        settings: of config.yaml.
        usage: the totals of usage.json; {} where there is none.
    """
    line, drawn = speeds(history, settings, times), []
    panels = []
    if len(line[0]) > 1:
        panels.append(
            Panel("Training speed", {"pairs a second": line}, float(np.median(line[1])), "median", y_label="pairs / s")
        )
    memory = _line(times, "peak_rss_bytes", 1e-9)
    if len(memory[0]) > 1:
        panels.append(Panel("Memory of the main process, at its highest so far", {"memory": memory}, y_label="GB"))
    shares = phase_seconds(times) if times else {}
    if shares:
        drawn.append(
            bars("Where the time went", {name: s / 60 for name, s in shares.items()}, "minutes", "{:.1f}".format)
        )
    if not panels and not drawn:
        return Part("Speed and memory", missing="the run logged no clock")
    pictures = [fragments.image(curves([panel]), panel.words) for panel in panels]
    pictures += [fragments.image(one, f"Minutes by phase: {_minutes(shares)}") for one in drawn]
    body = fragments.pictures(pictures) + fragments.table(usage_rows(usage))
    missing = "" if times else "no time by phase, no memory: the run was made by a version that did not record it"
    return Part(
        "Speed and memory",
        _speed_note(line[1], times, settings),
        body,
        {"speed": curves(panels)} if panels else {},
        missing,
    )


def _speed_note(speed: Sequence[float], times: Lines, settings: Mapping) -> str:
    about = settings.get("about") or {}
    where = (
        f" on {about['processes']} process(es) with {about.get('threads')} CPU threads each"
        if "processes" in about
        else ""
    )
    note = f"{np.median(speed):.0f} pairs a second{where}, validation and saving not counted." if speed else ""
    if times:
        note += f" Of the time of training {100 * waiting_share(times):.1f} % went by waiting for photos to be read."
    return note


def _minutes(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in shares.items())


def usage_rows(usage: Mapping) -> list[tuple[str, str]]:
    """The totals of usage.json in words."""
    rows = [
        ("minutes by the clock, as far as usage.json counted", usage.get("wall_s"), 1 / 60),
        ("CPU minutes, all processes", usage.get("cpu_s"), 1 / 60),
        ("memory at its highest, GB, all processes", usage.get("peak_rss_bytes"), 1e-9),
        ("steps a second of training", usage.get("steps_per_s"), 1.0),
    ]
    for kind, energy in (usage.get("energy") or {}).items():
        rows.append((f"energy of the {kind.upper()}, Wh", energy.get("joules"), 1 / 3600))
    return [(name, f"{value * scale:.2f}") for name, value, scale in rows if value is not None]
