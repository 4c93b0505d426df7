"""Train a head: `accelerate launch -m syncmask.training.finetune --task retrieval --init_from runs/quickstart`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path

import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import DatasetDict

from syncmask import (
    SyncMaskForComposedImageRetrieval,
    SyncMaskForImageTextClassification,
    SyncMaskForImageTextRetrieval,
    SyncMaskProcessor,
)
from syncmask.evaluation.loading import find_run

from .arguments import DataArguments, TrainArguments
from .build import build_contrast, build_model, build_processor, start_of
from .data import pair_data, side_of, train_data
from .launch import launch
from .parsing import load_arguments
from .task_classification import Classification, find_labels, warn_of_unseen
from .task_composed import REFERENCE, REFERENCE_ID, Composed
from .task_retrieval import Retrieval

PROGRAM = "syncmask.training.finetune"


def main(argv: list[str] | None = None):
    """Parse, build, train, evaluate; problems that are known of are explained."""
    words = sys.argv[1:] if argv is None else argv
    task, rest = task_of(words)
    launch(partial(read_arguments, task, rest), BUILDERS[task], PROGRAM, words)


def task_of(words: list[str]) -> tuple[str, list[str]]:
    """Take `--task NAME` out of the command line; `--help` behind it lists that task's settings."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}",
        add_help=False,
        allow_abbrev=False,
        description="Train a head on a pretrained model. `--task NAME --help` lists every setting of a task.",
    )
    parser.add_argument("--task", choices=list(BUILDERS), help="what is trained")
    given, rest = parser.parse_known_args(words)
    if given.task is None:
        parser.print_help()
        asked = {"-h", "--help"} & set(rest)
        parser.exit(0 if asked else 2, "" if asked else f"\nsay what to train: --task {'|'.join(BUILDERS)}\n")
    return given.task, rest


def read_arguments(task: str, words: list[str]) -> TrainArguments:
    """Read a task's settings; the corpus is that of the run that training starts from, where none is named."""
    arguments = load_arguments(words, task, config=task)
    start = arguments.model.init_from
    if start is None:
        return arguments
    side = side_of(SyncMaskProcessor.from_pretrained(start_of(start)))
    named = arguments.data.corpus != DataArguments().corpus or any(
        word.partition("=")[0] == "--corpus" for word in words
    )
    data = ({} if named else data_of_run(start)) | {"image_size": side}
    return load_arguments(words, task, {"data": data}, config=task)


def data_of_run(start: str) -> dict:
    """Return the corpus settings of the run that a model comes from; {} where it belongs to none."""
    run = find_run(Path(start))
    if run is None:
        return {}
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")).get("data", {})
    names = {item.name for item in dataclasses.fields(DataArguments)}
    return {name: value for name, value in settings.items() if name in names}


def build_retrieval(
    arguments: TrainArguments, accelerator: Accelerator, corpus: DatasetDict
) -> tuple[Retrieval, SyncMaskForImageTextRetrieval]:
    """Put model, teacher and pairs together."""
    seed = arguments.run.seed
    processor = build_processor(arguments.data, arguments.model, corpus["train"]["text"], seed)
    set_seed(seed)
    model = build_model(SyncMaskForImageTextRetrieval, arguments.model, processor).to(accelerator.device)
    data = pair_data(corpus["train"], arguments.data, arguments.objective, processor, seed)
    contrast = build_contrast(arguments, accelerator, data, model, layer=None)
    return Retrieval(accelerator, processor, contrast, corpus.get("validation"), seed), model


def build_composed(
    arguments: TrainArguments, accelerator: Accelerator, corpus: DatasetDict
) -> tuple[Composed, SyncMaskForComposedImageRetrieval]:
    """Put model and triplets together; SystemExit where the corpus has none."""
    seed, rows = arguments.run.seed, corpus["train"]
    if not {REFERENCE, REFERENCE_ID} <= set(rows.column_names):
        raise SystemExit(
            f"composed retrieval needs triplets (columns {REFERENCE}, {REFERENCE_ID}); {arguments.data.corpus!r} has "
            f"{', '.join(rows.column_names)}. Name a corpus of them: --corpus garment-variants, or FashionIQ's folder."
        )
    processor = build_processor(arguments.data, arguments.model, rows["text"], seed)
    set_seed(seed)
    model = build_model(SyncMaskForComposedImageRetrieval, arguments.model, processor).to(accelerator.device)
    data = train_data(rows, arguments.data, processor, seed, reference_column=REFERENCE)
    batch = arguments.optim.per_device_batch_size * accelerator.num_processes
    return Composed(data, processor, corpus.get("validation"), seed, batch), model


def build_classification(
    arguments: TrainArguments, accelerator: Accelerator, corpus: DatasetDict
) -> tuple[Classification, SyncMaskForImageTextClassification]:
    """Put model and labelled rows together; SystemExit where there are no labels."""
    objective, seed, rows = arguments.objective, arguments.run.seed, corpus["train"]
    label_sets = find_labels(rows, objective.label_columns)
    rows = rows.filter(lambda *labels: any(labels), input_columns=list(label_sets))
    for split in set(corpus) - {"train"}:
        warn_of_unseen(corpus[split], label_sets, split)
    processor = build_processor(arguments.data, arguments.model, rows["text"], seed)
    set_seed(seed)
    kind = SyncMaskForImageTextClassification
    model = build_model(kind, arguments.model, processor, label_sets=label_sets).to(accelerator.device)
    data = train_data(rows, arguments.data, processor, seed)
    batch = arguments.optim.per_device_batch_size * accelerator.num_processes
    return Classification(objective, data, processor, label_sets, corpus.get("validation"), seed, batch), model


BUILDERS = {"retrieval": build_retrieval, "composed": build_composed, "classification": build_classification}


if __name__ == "__main__":
    main()
