"""From a run folder to its report: reads what the run recorded and shows its model at work on items it never saw."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict
from PIL import Image

from syncmask import SyncMaskForComposedImageRetrieval, SyncMaskForImageTextClassification, SyncMaskForPreTraining
from syncmask.processing.collator import UnreadablePhoto
from syncmask.processing.corpus import source_kind

from . import batch_sheets, confusions, glance, head_views, history, masks_over_time, word_maps
from .embedding import photos
from .loading import Loaded
from .parts import Part
from .photo_source import note_photos
from .protocols import photo_names
from .report import (
    figures_part,
    findings_part,
    masks_part,
    read_results,
    searches_part,
    settings_part,
    write_report,
)
from .result import Result
from .running import choose_split, own_corpus
from .showcase import Gallery, mask_photos, sample_photos, spread_rows, text_searches

OLDER = "the run was made by a version that did not record it"
MASKED, SAMPLES = 6, 6


@dataclass(frozen=True)
class Subject:
    """What a report is about: a run, its model, its corpus, the rows of the pictures, and the seed of samples."""

    run: Path
    loaded: Loaded
    splits: DatasetDict
    unseen: Dataset
    results: dict[str, Result]
    seed: int


def report_run(
    run: str | Path,
    loaded: Loaded,
    splits: DatasetDict,
    split: str | None = None,
    *,
    corpus: str | None = None,
    summary: Sequence[str] = (),
    seed: int = 0,
) -> Path:
    """Writes the report of a run folder: what it recorded, and pictures of its model on items it never saw.

    Args:
        run: the run's folder, with metrics.jsonl, results/ and config.yaml.
        loaded: `load_checkpoint(run)`.
        splits: of its corpus.
        split: that the pictures are of; test, or validation where there is none, when None.
        corpus: their source; the run's own when None.
        summary: sentences for the top.
        seed: of the samples.

    Raises:
        ValueError: no such split.
    """
    run = Path(run)
    results = read_results(run)
    subject = Subject(run, loaded, splits, splits[choose_split(splits, split)], results, seed)
    record, times = history.read_history(run), history.read_history(run, history.TIMES)
    parts = [
        findings_part(results, summary),
        history.training_part(record, loaded.settings),
        *model_parts(subject),
        _guarded(glance.TITLE, lambda: _corpus(subject)),
        history.speed_part(record, times, loaded.settings, _usage(run)),
        figures_part(results),
        settings_part(loaded.settings),
    ]
    path = write_report(run, f"SyncMask run: {run.resolve().name}", parts)
    note_photos(path.parent, source_kind(corpus or own_corpus(loaded)))
    return path


def model_parts(subject: Subject) -> list[Part]:
    """The parts that show the model at work, by its head."""
    model = subject.loaded.model
    if isinstance(model, SyncMaskForComposedImageRetrieval):
        return [_guarded("Finding a photo by a photo and words", lambda: _composed(subject)), masks_part([])]
    if isinstance(model, SyncMaskForImageTextClassification):
        return [*_recognition(subject), masks_part([])]
    masks = [masks_part([])]
    if isinstance(model, SyncMaskForPreTraining):
        masks = [
            _guarded("What the masks hide", lambda: _masks(subject)),
            _guarded(masks_over_time.TITLE, lambda: _over_time(subject)),
        ]
    return [
        *masks,
        _guarded(word_maps.TITLE, lambda: _word_maps(subject)),
        *_retrieval(subject),
        _guarded(batch_sheets.TITLE, lambda: _batches(subject)),
    ]


def _guarded(title: str, make: Callable[[], Part]) -> Part:
    """The part, or why it cannot be: a broken photo must not cost the rest of the report."""
    try:
        return make()
    except UnreadablePhoto as problem:
        return Part(title, missing=f"a photo cannot be read ({problem})")


# ------------------------------------------------------------------------------------------------------ the masks


def _masks(subject: Subject) -> Part:
    loaded, objective = subject.loaded, subject.loaded.settings.get("objective", {})
    strategy = objective.get("mask_strategy", "attention")
    rows = spread_rows(subject.unseen, MASKED, subject.seed)
    masks = mask_photos(
        loaded.teacher,
        loaded.processor,
        subject.unseen,
        rows,
        strategy=strategy,
        word_means=loaded.word_means.get(strategy),
        instance_weight=objective.get("mask_instance_weight"),
        word_rate=objective.get("word_mask_rate", 0.3),
        patch_rate=objective.get("patch_mask_rate", 0.4),
        layer=objective.get("mask_layer"),
        seed=subject.seed,
    )
    return masks_part(masks)


def _over_time(subject: Subject) -> Part:
    title, states = masks_over_time.TITLE, masks_over_time.read_mask_states(subject.run)
    validation = subject.splits.get("validation")
    if not states or validation is None:
        why = OLDER if validation is not None and len(validation) else "the corpus has no validation split"
        return Part(title, missing=why)
    rows = find_photos(validation, states[0].photos)
    if rows is None:
        return Part(title, missing="the photos that were followed are not in this corpus")
    shown = validation.select(rows)
    visible = shown["visible"] if "visible" in shown.column_names else None
    pictures = photos(shown, np.arange(min(len(rows), masks_over_time.SHOWN)))
    return masks_over_time.masks_over_time(states, pictures, shown["text"], visible)


def find_photos(dataset: Dataset, names: Sequence[str]) -> list[int] | None:
    """Rows of photos by their names; None where one is not there."""
    place = {name: row for row, name in enumerate(photo_names(dataset).tolist())}
    rows = [place.get(name) for name in names]
    return None if None in rows else rows


def _word_maps(subject: Subject) -> Part:
    loaded = subject.loaded
    rows = spread_rows(subject.unseen, 2 * word_maps.ITEMS, subject.seed + 1)
    layer = loaded.settings.get("objective", {}).get("mask_layer")
    items = word_maps.look(loaded.teacher, loaded.processor, subject.unseen, rows, layer=layer, seed=subject.seed)
    return word_maps.word_map_part(items[: word_maps.ITEMS], subject.results.get("co-occurrence"))


# ------------------------------------------------------------------------------------------ retrieval and batches


def _retrieval(subject: Subject) -> list[Part]:
    """Searches and confusions share the features of one gallery."""
    loaded = subject.loaded
    try:
        gallery = Gallery.of(loaded.model, loaded.processor, subject.unseen)
        searches = text_searches(gallery, seed=subject.seed)
        features = (gallery.image_feats, gallery.text_feats, gallery.rows, gallery.index)
        shown, counts = confusions.find_confusions(*features)
    except UnreadablePhoto as problem:
        return [Part("Finding photos by text", missing=f"a photo cannot be read ({problem})")]
    return [searches_part(searches, subject.results.get("items")), confusions.confusion_part(shown, counts)]


def _batches(subject: Subject) -> Part:
    title, (batches, used) = batch_sheets.TITLE, batch_sheets.read_batches(subject.run)
    if not batches:
        return Part(title, missing=f"{OLDER}, or it was not evaluated (--no-evaluate)")
    train, shown = subject.splits["train"], {}
    for name, batch in batches.items():
        rows = find_photos(train, batch.photos)
        if rows is None:
            return Part(title, missing="the photos of its batches are not in this corpus")
        shown[name] = photos(train, np.array(rows))
    return batch_sheets.batch_part(batches, shown, used)


# -------------------------------------------------------------------------------------------------- finetuned heads


def _composed(subject: Subject) -> Part:
    loaded = subject.loaded
    found = head_views.composed_searches(loaded.model, loaded.processor, subject.unseen, seed=subject.seed)
    return head_views.composed_part(*found)


def _recognition(subject: Subject) -> list[Part]:
    loaded, parts = subject.loaded, []
    for column in loaded.model.config.label_sets:
        title = f"Recognising the {column}"
        try:
            found = head_views.recognise(loaded.model, loaded.processor, subject.unseen, column)
        except UnreadablePhoto as problem:
            parts.append(Part(title, missing=f"a photo cannot be read ({problem})"))
            continue
        missing = Part(title, missing=f"no unseen photo has a {column}")
        parts.append(missing if found is None else head_views.recognition_part(found))
    return parts


# ------------------------------------------------------------------------------------------------------ the corpus


def _corpus(subject: Subject) -> Part:
    triplets = "candidate" in subject.unseen.column_names
    samples: list[tuple[Image.Image, str]] = sample_photos(subject.unseen, SAMPLES, subject.seed)
    return glance.glance_part(glance.glance(subject.splits), samples, triplets)


def _usage(run: Path) -> dict:
    path = run / "usage.json"
    return json.loads(path.read_text(encoding="utf-8")).get("total", {}) if path.exists() else {}
