"""What the teacher would hide in the same few photos, epoch after epoch: the record of it, and its pictures.

Training appends a `MaskState` a line to masks_over_time.jsonl (a few kB each); photos and texts are read from the
corpus again when the report is made.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from syncmask.processing.processing_syncmask import split_words

from . import fragments
from .archive import complete_lines
from .figures import MaskedPhoto, Masks, beside, enlarge, framed, masked_photo, over
from .parts import Part
from .plots import Panel
from .typeset import font, paragraph

RECORD = "masks_over_time.jsonl"
PHOTOS = 24  # that are followed: their mean is a curve; the report shows a few of them
SHOWN, MOMENTS = 4, 7
TITLE = "The masks over training time"


@dataclass(frozen=True)
class MaskState:
    """What the teacher would hide at one moment: its hard masks, without a random share.

    Attributes:
        step: optimiser steps done.
        epoch: epochs done.
        strategy: that scored the words.
        strength: how much scores counted in training by then; 0 = masks were still drawn at random.
        grid: patches (h, w).
        photos: names, as in `protocols.photo_names` of the validation split.
        lengths: how many words of each text the model reads.
        words: of each photo, the places of the hidden words.
        patches: of each photo, the numbers of the hidden patches.
    """

    step: int
    epoch: int
    strategy: str
    strength: float
    grid: tuple[int, int]
    photos: list[str]
    lengths: list[int]
    words: list[list[int]]
    patches: list[list[int]]

    def line(self) -> dict:
        """As JSON takes it."""
        return asdict(self)

    def masks(self, place: int) -> Masks:
        """The masks of one photo as arrays."""
        words, patches = np.zeros(self.lengths[place], dtype=bool), np.zeros(self.grid, dtype=bool)
        words[self.words[place]] = True
        patches.reshape(-1)[self.patches[place]] = True
        return Masks(self.name, words, patches)

    @property
    def name(self) -> str:
        """When this was."""
        return f"epoch {self.epoch}" if self.step else "untrained"


def read_mask_states(run: str | Path) -> list[MaskState]:
    """The lines of a run's record, oldest first; one cut short by a kill is left out, no file gives none."""
    return [MaskState(**json.loads(line)) for line in complete_lines(Path(run) / RECORD)]


# ---------------------------------------------------------------------------------------------------------- curves


def agreement(first: MaskState, second: MaskState) -> float:
    """Share of the words hidden in one state that the other hides too, over all photos; random masks: their rate.

    Example: words [[0, 1]] and [[1, 2]] agree by one half.
    """
    both = sum(len(set(one) & set(other)) for one, other in zip(first.words, second.words))
    return both / max(1, sum(map(len, first.words)))


def visible_share(state: MaskState, visible: Sequence[Sequence[bool]]) -> float:
    """Share of the hidden words that their photos show."""
    shown = [truth[word] for words, truth in zip(state.words, visible) for word in words]
    return float(np.mean(shown)) if shown else float("nan")


def panels(states: Sequence[MaskState], visible: Sequence[Sequence[bool]] | None = None) -> list[Panel]:
    """Agreement of each state's hidden words with the state before, and, with truth, how many of them are visible."""
    if len(states) < 2:
        return []
    steps = [state.step for state in states]
    same = [100 * agreement(*pair) for pair in zip(states, states[1:])]
    rate = 100 * sum(map(len, states[-1].words)) / max(1, sum(states[-1].lengths))
    found = [
        Panel(
            "Hidden words that were hidden one epoch before too",
            {"agreement": (steps[1:], same)},
            level=rate,
            level_name="random masks",
            y_label="%",
        )
    ]
    if visible is not None:
        read = [truth[:length] for truth, length in zip(visible, states[0].lengths)]
        level = 100 * sum(map(sum, read)) / max(1, sum(map(len, read)))
        shares = [100 * visible_share(state, visible) for state in states]
        name = "Hidden words that the photo shows"
        found.append(Panel(name, {"masks": (steps, shares)}, level=level, level_name="random masks", y_label="%"))
    return found


# --------------------------------------------------------------------------------------------------------- pictures


def spread_states(states: Sequence[MaskState], most: int = MOMENTS) -> list[MaskState]:
    """At most `most` states, the first and the last among them, the others as evenly between as can be."""
    if len(states) <= most:
        return list(states)
    return [states[place] for place in np.linspace(0, len(states) - 1, most).round().astype(int)]


def trails(
    states: Sequence[MaskState], photos: Sequence[Image.Image], texts: Sequence[str], visible: Sequence | None
) -> list[MaskedPhoto]:
    """A `MaskedPhoto` for each of the photos, whose ways of masking are the moments."""
    truths = visible if visible is not None else [None] * len(photos)
    return [
        MaskedPhoto(photo, text, [state.masks(place) for state in states], None if truth is None else np.array(truth))
        for place, (photo, text, truth) in enumerate(zip(photos, texts, truths))
    ]


def hidden_words(text: str, hidden: np.ndarray, visible: np.ndarray | None) -> list[tuple[str, str]]:
    """The hidden words alone, in the order of the text: (word, style) with styles as in `figures.word_styles`."""
    found = []
    for place, (start, end) in enumerate(split_words(text)[: len(hidden)]):
        if hidden[place]:
            known = visible is not None and place < len(visible)
            style = ("right" if visible[place] else "wrong") if known else "hidden"
            found.append((text[start:end], style))
    return found


def trail_sheet(pairs: Sequence[MaskedPhoto], size: int = 150) -> Image.Image:
    """A row a photo, a column a moment; under each photo the words that were hidden then."""
    names = ["", *(masks.name for masks in pairs[0].masks)]
    rows = [[paragraph([(name, "plain")], size, font(14, bold=True)) for name in names]]
    for pair in pairs:
        cells = [enlarge(pair.photo, size)]
        for masks in pair.masks:
            hidden = hidden_words(pair.text, masks.words, pair.visible)
            words = [piece for word in hidden for piece in (word, (" · ", "unseen"))][:-1]
            cells.append(over([masked_photo(pair.photo, masks.patches, size), paragraph(words, size, font(11))], 4))
        rows.append(cells)
    return framed(over([beside(row, 12) for row in rows], 16))


def _trail(pair: MaskedPhoto, size: int = 132) -> str:
    cells = []
    for masks in pair.masks:
        picture = fragments.image(
            masked_photo(pair.photo, masks.patches, size), f"{masks.name}: masked photo", photo=True
        )
        words = " ".join(
            f'<mark class="{style}">{escape(word)}</mark>'
            for word, style in hidden_words(pair.text, masks.words, pair.visible)
        )
        cells.append(f"<figure><b>{escape(masks.name)}</b>{picture}<figcaption>{words}</figcaption></figure>")
    photo = fragments.image(enlarge(pair.photo, size), "the photo itself", photo=True)
    first = f"<figure><b>photo</b>{photo}</figure>"
    return f'<p class="text">{escape(pair.text)}</p><div class="strip">{first}{"".join(cells)}</div>'


def masks_over_time(
    states: Sequence[MaskState], photos: Sequence[Image.Image], texts: Sequence[str], visible: Sequence | None
) -> Part:
    """The part of the report.

    Args:
        states: the record, oldest first.
        photos: the first few that are followed, which are shown.
        texts: of all that are followed.
        visible: (W,) bool of each; None without ground truth.
    """
    pairs = trails(spread_states(states), photos, texts, visible)
    plots = fragments.plots(panels(states, visible))
    note = (
        "The same unseen photos from the untrained model to the last epoch: dimmed patches and the words below are "
        f"what the teacher would hide at that time. The curves follow {len(texts)} photos."
    )
    opened = next((state for state in states if state.strength > 0), None)
    if opened is not None:
        note += f" Until the gate opened (before {opened.name} ended) training itself still hid at random."
    else:
        note += " The gate never opened, so training itself hid at random all the time."
    body = plots + fragments.word_key(visible is not None, hidden=True) + "\n".join(map(_trail, pairs))
    return Part(TITLE, note, body, {"masks_over_time": trail_sheet(pairs)})
