"""The model card: README.md from the files of a run, with its results and the picture of its masks beside it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import validate_repo_id

from syncmask.evaluation.photo_source import photo_source

from . import wording
from .markdown import environment, plain
from .measured import Measured, eval_entries, eval_results, not_measured, read_measured
from .record import Record, read_record

# Class -> (which templates/use_*.md, the Hub's task, what it does). Of composed retrieval the Hub knows no task.
HEADS = {
    "SyncMaskForPreTraining": (
        "embeddings",
        "zero-shot-image-classification",
        "Photos and texts of shop items as vectors of one space, and a head that tells whether a photo and a text "
        "belong together: to search a catalogue by words or by a photo, or to finetune. Pretrained by synchronised "
        "masking.",
    ),
    "SyncMaskForImageTextRetrieval": (
        "embeddings",
        "zero-shot-image-classification",
        "Finds photos of shop items by words or by a photo: vectors of one space for a first ranking, and a head that "
        "matches a photo with a text to re-rank the best.",
    ),
    "SyncMaskForComposedImageRetrieval": (
        "composed",
        "image-feature-extraction",
        'Finds photos of shop items by a photo and what should differ ("the same but in blue").',
    ),
    "SyncMaskForImageTextClassification": (
        "classification",
        "image-classification",
        "Tells the {labels} of a shop item from a photo with its text, or from either alone.",
    ),
}
TAGS = ("syncmask", "fashion", "e-commerce", "vision-language", "image-text-retrieval")
METRICS = {"recall": "recall", "mean_recall": "recall", "accuracy": "accuracy", "macro_f1": "f1"}


def write_model_card(
    run: Path, staged: Path, repo_id: str, base_model: str | None = None, license: str = "apache-2.0"
) -> Path:
    """Write the card of a finished run, and what it shows, into a folder that is to be published.

    Written are README.md; results/*.json, as they were measured but without places and names of this machine, and
    sealed again; assets/masks.png where its photos are generated ones; .eval_results/*.yaml for results on datasets
    of the Hub. The same run gives the same bytes.

    Args:
        run: its folder. staged: made if absent. repo_id: owner/name of the model on the Hub.
        base_model: what it was finetuned from, on the Hub; None = not told. license: of the weights.

    Returns:
        The path of README.md.

    Raises:
        FileNotFoundError: the run has no final model.
        ValueError: no valid repo_id; a model of another class; a result that was changed after it was measured, or
            was measured on other weights.
    """
    validate_repo_id(repo_id)
    record, measured = read_record(run), read_measured(run)
    if record.head not in HEADS:
        raise ValueError(f"{run / 'final'} holds a {record.head}; there are cards of {', '.join(HEADS)}")
    staged.mkdir(parents=True, exist_ok=True)
    for one in measured:
        one.result.save(staged / "results" / f"{one.stem}.json")
        if entries := eval_entries(one):
            file = staged / ".eval_results" / f"{one.stem}.yaml"
            file.parent.mkdir(exist_ok=True)
            file.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")
    masks = run / "report" / "masks.png"
    shown = masks.is_file() and photo_source(masks) == "generated"  # Others may be private, or somebody's.
    if shown:
        (staged / "assets").mkdir(exist_ok=True)
        shutil.copyfile(masks, staged / "assets" / masks.name)
    text = body(record, measured, repo_id, base_model, shown, left_out=masks.is_file() and not shown)
    card = ModelCard(f"---\n{metadata(record, measured, repo_id, base_model, license).to_yaml()}\n---\n\n{text}")
    card.save(staged / "README.md")
    return staged / "README.md"


def metadata(
    record: Record, measured: Sequence[Measured], repo_id: str, base_model: str | None, license: str
) -> ModelCardData:
    """Return the card's head for the Hub: only what the run's files tell."""
    results = eval_results(measured)
    base = base_model or list(record.started_from) or None
    metrics = dict.fromkeys(METRICS.get(result.metric_type.partition("@")[0]) for result in results)
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=HEADS[record.head][1],
        license=license,
        language="en" if record.corpus.source == "generated" else None,
        base_model=base,
        base_model_relation="finetune" if base else None,
        datasets=[record.corpus.name] if record.corpus.source == "hub" else None,
        tags=[*TAGS, *(["generated-data"] if record.corpus.source == "generated" else [])],
        metrics=[name for name in metrics if name] or None,
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )


def body(
    record: Record, measured: Sequence[Measured], repo_id: str, base_model: str | None, shown: bool, left_out: bool
) -> str:
    """Return the card below its head."""
    kind, _, what = HEADS[record.head]
    label_sets = record.config.get("label_sets") or {}
    content = {
        "name": repo_id.rpartition("/")[2],
        "repo_id": repo_id,
        "what": f"{what.format(labels=' and '.join(map(plain, label_sets)))} {wording.size(record)}",
        "kind": kind,
        "dim": record.config.get("projection_dim"),
        "record": record,
        "measured": measured,
        "missing": not_measured(measured),
        "teacher_note": wording.teacher_note(record, measured),
        "corpus_text": wording.corpus_text(record, base_model),
        "recipe": wording.recipe(record),
        "usage": wording.usage_rows(record),
        "shown": shown,
        "left_out": left_out,
        "origin": wording.text_origin(record),
        "tolerant": any("itc_tolerant" in one.scores() for one in measured),
        "false_negatives": wording.false_negatives(record, measured),
        "text_tells": wording.text_tells(measured),
        "small": wording.small(record),
        "labels": "; ".join(f"{plain(name)}: {plain(', '.join(labels))}" for name, labels in label_sets.items()),
        "first_set": plain(next(iter(label_sets), "")),
    }
    return environment().get_template("model.md").render(content) + "\n"
