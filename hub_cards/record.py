"""What a run folder says of its model. Only what is named here leaves the run for a card."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from safetensors import safe_open

from syncmask.evaluation.archive import complete_lines
from syncmask.evaluation.loading import MODEL
from syncmask.processing.corpus import GENERATED_VARIANTS

from .public import LIBRARIES, corpus_name, guess_source

# Of config.yaml, section by section: no name, no folder, nothing that a user types but numbers and choices.
SETTINGS = {
    "data": ("image_size", "augment", "max_text_length", "vocab_size", "shuffle_buffer", "num_items", "corpus_seed"),
    "model": ("preset", "freeze_towers", "lora_rank", "lora_alpha"),
    "objective": (
        *("itc_weight", "itm_weight", "mlm_weight", "mim_weight", "mask_strategy", "word_mask_rate", "patch_mask_rate"),
        *("random_mask_share", "mask_temperature", "soft_target_weight", "teacher_momentum", "grouping"),
        *("grouped_share", "drop_image_share", "drop_text_share", "balance"),
    ),
    "optim": (
        *("per_device_batch_size", "gradient_accumulation_steps", "learning_rate", "warmup_steps", "weight_decay"),
        *("epochs", "max_steps", "max_minutes", "max_grad_norm", "layer_decay"),
    ),
    "run": ("seed", "mixed_precision", "final_weights", "deterministic"),
}
# Of the section `model`: what training can start from.
STARTS = ("init_from", "vision", "albef")


@dataclass(frozen=True)
class Corpus:
    """What a model was trained on.

    Attributes:
        name: of a generated corpus or of a dataset on the Hub; of files the last part of their place.
        source: "generated", "files" or "hub"; "files" too where the run does not tell.
        splits: {split: {rows, items}}; {} where the run does not tell.
        train_rows: None where the run does not tell.
        filters: column=value of the rows that were kept.
        variants: whether rows are triplets made of products and colours.
    """

    name: str
    source: str
    splits: dict[str, dict[str, int]] = field(default_factory=dict)
    train_rows: int | None = None
    filters: tuple[str, ...] = ()
    variants: bool = False


@dataclass(frozen=True)
class Record:
    """A run, as its card may tell of it.

    Attributes:
        head: name of the model's class. config: final/config.json. parameters: numbers in final/model.safetensors.
        max_text_length: tokens of a text; None where the tokenizer has no limit.
        settings: the allow-listed ones, sections as in config.yaml.
        start: a key of STARTS, "" for random weights. started_from: its names on the Hub.
        step, epoch: what was trained; None where metrics.jsonl does not tell.
        substitutes: photos that could not be read and were replaced.
        processes, threads: of the training.
        usage: of usage.json, `total` and `parts`; {} where there is none.
        versions: of Python and of the libraries that can change a figure.
    """

    head: str
    config: dict
    parameters: int
    dtype: str
    max_text_length: int | None
    corpus: Corpus
    settings: dict[str, dict]
    start: str
    started_from: tuple[str, ...]
    step: int | None
    epoch: int | None
    substitutes: int
    processes: int | None
    usage: dict
    versions: dict[str, str]


def read_record(run: Path) -> Record:
    """Read a run folder.

    Raises:
        FileNotFoundError: it has no config.yaml or no final model.
    """
    final = run / "final"
    for file in (run / "config.yaml", final / "config.json", final / MODEL):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is not there: a card is made of a run that has ended, with its final/")
    content = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) or {}
    about = content.get("about", {})
    config = json.loads((final / "config.json").read_text(encoding="utf-8"))
    usage = read_usage(run / "usage.json")
    step, epoch = progress(run, usage)
    versions = about.get("versions", {})
    return Record(
        head=(config.get("architectures") or ["SyncMaskModel"])[0],
        config=config,
        parameters=count_parameters(final / MODEL),
        dtype=config.get("dtype", "float32"),
        max_text_length=text_limit(final),
        corpus=read_corpus(content.get("data", {}), about),
        settings={name: chosen(content.get(name, {}), names) for name, names in SETTINGS.items()},
        start=next((name for name in STARTS if content.get("model", {}).get(name)), ""),
        started_from=tuple(str(name) for name in about.get("started_from") or ()),
        step=step,
        epoch=epoch,
        substitutes=len(complete_lines(run / "substitutes.jsonl")),
        processes=about.get("processes"),
        usage=usage,
        versions={name: str(versions[name]) for name in LIBRARIES if name in versions},
    )


def chosen(section: Mapping, names: Iterable[str]) -> dict:
    """Keep the named settings of a section that are set."""
    return {name: section[name] for name in names if section.get(name) is not None}


def read_corpus(data: Mapping, about: Mapping) -> Corpus:
    """Tell the corpus of a run by its settings and what training noted of it."""
    named = data.get("data_dir") if data.get("corpus") == "folder" else data.get("corpus")
    source = about.get("corpus_source", guess_source(named))
    rows = str(about.get("corpus_fingerprint", "")).split("-")[1:2]
    splits = {
        str(split): {key: int(size[key]) for key in ("rows", "items")}
        for split, size in about.get("splits", {}).items()
    }
    return Corpus(
        name=corpus_name(str(named or ""), source),
        source=source,
        splits=splits,
        train_rows=int(rows[0]) if rows and rows[0].isdigit() else None,
        filters=tuple(str(entry) for entry in data.get("where") or ()),
        variants=bool(data.get("variants")) or named == GENERATED_VARIANTS,
    )


def count_parameters(weights: Path) -> int:
    """Count the numbers of a safetensors file without reading them."""
    with safe_open(str(weights), framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def text_limit(final: Path) -> int | None:
    """Read the tokens that a text may have, of the tokenizer's own settings."""
    file = final / "tokenizer_config.json"
    limit = json.loads(file.read_text(encoding="utf-8")).get("model_max_length") if file.is_file() else None
    return int(limit) if limit and limit < 1e6 else None


def progress(run: Path, usage: dict) -> tuple[int | None, int | None]:
    """Return the last step and the whole epochs; metrics.jsonl has a line every so many steps, usage.json the end."""
    lines = complete_lines(run / "metrics.jsonl")
    last = json.loads(lines[-1]) if lines else {}
    steps = [step for step in (last.get("step"), usage.get("total", {}).get("steps")) if step is not None]
    return max(steps, default=None), last.get("epoch")


def read_usage(file: Path) -> dict:
    """Read usage.json; {} where there is none, or another version's."""
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return content if content.get("version") == 1 else {}
