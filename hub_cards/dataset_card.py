"""The dataset card: README.md for a corpus folder that syncmask made or converted, so that `load_dataset` takes it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import datasets
from huggingface_hub import DatasetCard, DatasetCardData
from huggingface_hub.utils import validate_repo_id

from syncmask.evaluation.archive import complete_lines
from syncmask.processing.check import Report, check_corpus
from syncmask.processing.contact_sheet import contact_sheet
from syncmask.processing.convert import SKIPPED
from syncmask.processing.corpus import load_corpus
from syncmask.processing.readers_folder import MADE, METADATA, SPLITS, canonical_split, holds_metadata
from syncmask.processing.readers_tabular import ASIDE, PLAN

from .markdown import environment, plain
from .public import name_of, without_places

MEANINGS = {
    "image": "the photo",
    "text": "what the shop says of the item",
    "item_id": "the item: equal for all its photos",
    "view": "from where the photo was taken",
    "category": "",
    "subcategory": "",
    "words": "words of the text",
    "visible": "for each word whether it is true of what this photo shows",
    "regions": "for each word where: left, top, right, bottom in pixels; empty where nowhere",
    "attributes": "what the item is made of",
    "revealed": "attributes that this photo shows",
    "claimed": "attributes that the text names",
    "file_name": "the photo's file",
    "candidate": "the photo of the request",
    "captions": "what should differ",
}
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
CLASSES_SHOWN = 40
SHOWN = 6  # items on the contact sheet


def write_dataset_card(corpus_folder: Path, out: Path, repo_id: str, license: str | None = None) -> Path:
    """Write the card of a corpus folder: README.md and, of a generated corpus, assets/contact_sheet.png.

    The corpus is checked for it, photos included, which takes as long as `syncmask corpus check`.

    Args:
        corpus_folder: of `syncmask corpus make` or `convert`, or any folder of photos with metadata.
        out: folder for the card; the corpus's own for one that is to be uploaded as it is.
        repo_id: owner/name of the dataset on the Hub.
        license: the Hub's word for it, such as cc-by-4.0; only a generated corpus has one of its own (apache-2.0).

    Raises:
        ValueError: no valid repo_id; no licence for a corpus that was not generated; nothing that `load_corpus` reads.
        FileNotFoundError: there is no such folder.
    """
    validate_repo_id(repo_id)
    if not corpus_folder.is_dir():
        raise FileNotFoundError(f"there is no folder {corpus_folder}")
    made = read_made(corpus_folder)
    if license is None and made is None:
        raise ValueError(
            f"{corpus_folder} was not drawn by syncmask, so the photos are somebody's: say under which licence they "
            "may be published (--license cc-by-4.0, or other), or do not publish them"
        )
    report, _, _ = check_corpus(corpus_folder)
    corpus = load_corpus(corpus_folder)
    out.mkdir(parents=True, exist_ok=True)
    if made is not None:
        (out / "assets").mkdir(exist_ok=True)
        contact_sheet(next(iter(corpus.values())), SHOWN).save(out / "assets" / "contact_sheet.png")
    text = body(corpus_folder, repo_id, made, report, corpus)
    data = metadata(corpus_folder, repo_id, license or "apache-2.0", made is not None, corpus)
    DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(out / "README.md")
    return out / "README.md"


def read_made(folder: Path) -> dict | None:
    """Return what `syncmask corpus make` noted: {corpus, num_items, image_size, seed, syncmask}; None of others."""
    file = folder / MADE
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return content if {"corpus", "num_items", "image_size", "seed"} <= set(content) else None


def metadata(
    folder: Path, repo_id: str, license: str, generated: bool, corpus: datasets.DatasetDict
) -> DatasetCardData:
    """Return the card's head for the Hub; `configs` says which files are which split."""
    rows = sum(map(len, corpus.values()))
    classes = "category" in next(iter(corpus.values())).column_names
    return DatasetCardData(
        pretty_name=repo_id.rpartition("/")[2],
        license=license,
        language=["en"] if generated else None,
        size_categories=[next((name for limit, name in SIZES if rows < limit), "n>1M")],
        task_categories=["zero-shot-image-classification", *(["image-classification"] if classes else [])],
        annotations_creators=["machine-generated"] if generated else None,
        source_datasets=["original"] if generated else None,
        tags=["fashion", "e-commerce", "syncmask"],
        configs=configs(folder),
    )


def configs(folder: Path) -> list[dict] | None:
    """Say which files are which split; None where `load_dataset` finds that by itself (photos in one flat folder)."""
    if (folder / PLAN).is_file():
        files = json.loads((folder / PLAN).read_text(encoding="utf-8"))["files"]
        names = {split: f"{split}-*.parquet" for split in splits_of(name for name in files if "/" not in name)}
        beside = [name.partition("/")[2] for name in files if name.startswith(f"{ASIDE}/")]
        aside = {split: f"{ASIDE}/{split}-*.parquet" for split in splits_of(beside)}
        return [config("default", names), *([config(ASIDE, aside)] if aside else [])]
    found = [path.name for path in folder.iterdir() if any((path / name).is_file() for name in METADATA)]
    if not holds_metadata(folder) or not found:
        return None
    folders = {canonical_split(name): f"{name}/**" for name in found}
    return [config("default", {split: folders[split] for split in SPLITS if split in folders})]


def splits_of(files: Iterable[str]) -> list[str]:
    """Return the splits that files such as train-00000-of-00002.parquet name, in the usual order."""
    names = dict.fromkeys(file.split("-")[0] for file in files)
    return sorted(names, key=lambda name: SPLITS.index(name) if name in SPLITS else len(SPLITS))


def config(name: str, files: dict[str, str]) -> dict:
    """Return an entry of `configs`."""
    return {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in files.items()]}


def body(folder: Path, repo_id: str, made: dict | None, report: Report, corpus: datasets.DatasetDict) -> str:
    """Return the card below its head."""
    rows = sum(size["rows"] for size in report.splits.values())
    items = sum(report.photos_an_item.values())
    kind = "Drawn garments with the truth about what each photo shows of its text" if made else "Photos of items"
    photos = ", ".join(f"{items:,} with {number}" for number, items in sorted(report.photos_an_item.items()))
    limit = "The texts have {median} tokens in the median, {longest} at most." if report.tokens else ""
    content = {
        "name": repo_id.rpartition("/")[2],
        "repo_id": repo_id,
        "generated": made is not None,
        "what": f"{kind}: {rows:,} photos of {items:,} items, with a text an item, to train vision-language models.",
        "sheet": made is not None,
        "first_split": next(iter(corpus)),
        "splits": [
            (name, f"{size['rows']:,}", f"{size['items']:,}", f"{size['texts']:,}")
            for name, size in report.splits.items()
        ],
        "photos_an_item": f"Items by their number of photos: {photos}.",
        "tokens": limit.format(**report.tokens),
        "columns": columns(corpus),
        "classes": class_counts(report),
        "made": how_made(folder, made),
        "findings": [
            f"{finding.level}: {finding.name} ({finding.count:,}): {plain(without_places(finding.message))}"
            for finding in report.findings
        ],
    }
    return environment().get_template("dataset.md").render(content) + "\n"


def columns(corpus: datasets.DatasetDict) -> list[tuple[str, str, str]]:
    """List (column, type, meaning); what syncmask does not know has no meaning."""
    features = next(iter(corpus.values())).features
    return [
        (f"`{name.replace('|', '/').replace('`', '')}`", type_of(kind), MEANINGS.get(name, ""))
        for name, kind in features.items()
    ]


def type_of(kind: object) -> str:
    """Return a feature's type in a word or two.

    Example:
        >>> type_of(datasets.List(datasets.Value("bool"))), type_of(datasets.Image())
        ('list of bool', 'image')
    """
    if isinstance(kind, datasets.Value):
        return kind.dtype
    if isinstance(kind, datasets.List):
        return f"list of {type_of(kind.feature)}"
    return "struct" if isinstance(kind, dict) else type(kind).__name__.lower()


def class_counts(report: Report) -> dict[str, list[tuple[str, str]]]:
    """List the commonest values of each class column with their counts."""
    found = {}
    for name, counts in report.classes.items():
        sums = sorted(((value, sum(splits.values())) for value, splits in counts.items()), key=lambda pair: -pair[1])
        found[name] = [(value, f"{number:,}") for value, number in sums[:CLASSES_SHOWN]]
    return found


def how_made(folder: Path, made: dict | None) -> str:
    """Say which command made the files, and with what."""
    if made is not None:
        asked = " ".join(
            f"--{name.replace('_', '-')} {int(made[name])}" for name in ("num_items", "image_size", "seed")
        )
        version = plain(made.get("syncmask", "unknown"))
        return f"`syncmask corpus make FOLDER {asked}` (syncmask {version}) draws the same."
    if not (folder / PLAN).is_file():
        return "A folder of photos with metadata; how it came to be is for its publisher to say."
    settings = json.loads((folder / PLAN).read_text(encoding="utf-8"))["settings"]
    sentences = ["`syncmask corpus convert` wrote these files; the photos' bytes are as they were."]
    if filters := settings.get("columns", {}).get("where"):
        kept = ", ".join(
            f"{name}={name_of(str(value)) if '/' in str(value) else value}" for name, value in filters.items()
        )
        sentences.append(f"Only rows with {plain(kept)} were kept.")
    if settings.get("min_words", 1) > 1:
        sentences.append(f"Rows whose text has fewer than {settings['min_words']} words were left out.")
    skipped = len(complete_lines(folder / SKIPPED))
    checked = "Every photo was decoded" if settings.get("verify") else "Photos were not decoded"
    sentences.append(f"{checked}; {skipped:,} rows were left out for want of a photo, a text or an item.")
    return " ".join(sentences)
