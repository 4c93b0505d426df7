"""What may be told of a machine and its user: names instead of places, known options instead of whole commands."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import PurePosixPath

from syncmask.evaluation.result import Result
from syncmask.processing.corpus import GENERATED, GENERATED_VARIANTS

LIBRARIES = ("python", "syncmask", "torch", "transformers", "datasets", "numpy")
HOMES = ("home", "Users")
UNNAMED = "files"
# What a result's `corpus` may tell; names of files are shortened.
CORPUS_FACTS = (
    *("name", "source", "fingerprint", "split", "rows", "items", "gallery", "products", "draws", "queries"),
    *("candidates", "same_subcategory", "labels", "label_list", "label_source", "labels_with_rows", "unknown_labels"),
    *("rows_without_label", "missing_photos", "comparable", "fusion_layer"),
)
LABEL_SOURCES = ("the model", "the train split")
PROGRAMS = {
    "syncmask": "syncmask",
    "__main__.py": "syncmask",
    "pretrain.py": "python -m syncmask.training.pretrain",
    "finetune.py": "python -m syncmask.training.finetune",
}
# The commands that write results, as far as a card tells of them.
MEASURING = {"evaluate": ("evaluate", "RUN"), "explain": ("explain", "RUN", "--pointing")}
# Options whose values are numbers or choices, and those whose values are places or names.
PLAIN_OPTIONS = {
    *("--protocol", "--split", "--max-rows", "--rerank-k", "--rerank-queries", "--variants", "--batch-size", "--seed"),
    *("--task", "--config", "--epochs", "--max_steps", "--num_items", "--preset", "--mask_strategy"),
}
NAMED_OPTIONS = {"--corpus", "--candidates", "--labels"}
PLAIN_VALUE = re.compile(r"[\w.,-]{1,32}")
PLACE = re.compile(r"""(?<![\w.])(?:[A-Za-z]:|~)?(?:[/\\][^\s/\\'"`,;:()]+)+""")


def corpus_name(name: str, source: str) -> str:
    """What a card calls a corpus: a place on a disk is known by its last part alone."""
    return name if source in ("generated", "hub") else name_of(name)


def name_of(path: str) -> str:
    """The last part of a path or an address; "files" where that names a user.

    Example:
        >>> name_of("/home/ada/shop"), name_of("/home/ada"), name_of("s3://key:secret@host/x")
        ('shop', 'files', 'files')
    """
    parts = PurePosixPath(path.replace("\\", "/")).parts
    if "://" in path or not parts or parts[-1] in ("/", ".", "..") or parts[-1].startswith("~"):
        return UNNAMED
    return UNNAMED if parts[-2:-1] and parts[-2] in HOMES or parts == ("/", "root") else parts[-1]


def without_places(text: str) -> str:
    """A sentence with names instead of absolute paths.

    Example:
        >>> without_places("/home/ada/shop/a.jpg is no photo")
        'a.jpg is no photo'
    """
    return PLACE.sub(lambda match: name_of(match.group()), text)


def public(result: Result) -> Result:
    """The same figures without what tells of a machine or a user."""
    about = {name: result.corpus[name] for name in CORPUS_FACTS if name in result.corpus}
    about["source"] = about.get("source") or guess_source(about.get("name"))
    about["name"] = corpus_name(str(about.get("name", "")), about["source"])
    if about.get("label_source", LABEL_SOURCES[0]) not in LABEL_SOURCES:
        about["label_source"] = name_of(about["label_source"])
    teacher = str(result.model.get("teacher", ""))
    model = {"path": "final", "sha256": result.model.get("sha256", "")}
    if teacher:
        model["teacher"] = name_of(teacher) if "/" in teacher or "\\" in teacher else teacher
    versions = {name: str(result.versions[name]) for name in LIBRARIES if name in result.versions}
    return replace(result, corpus=about, model=model, versions=versions, command=public_command(result.command))


def public_command(command: str) -> str:
    """What may be told of a command: the program, the options that say how it measured, names instead of places.

    Example:
        >>> public_command("syncmask evaluate /home/ada/runs/x --protocol items --hub_token hf_abc")
        'syncmask evaluate RUN --protocol items'
    """
    words = command.split()
    if not words or name_of(words[0]) not in PROGRAMS:
        return ""
    told = [PROGRAMS[name_of(words[0])], *(word for name in words[1:2] for word in MEASURING.get(name, ()))]
    parts = [piece for word in words[1:] for piece in (word.split("=", 1) if word.startswith("--") else [word])]
    for option, value in zip(parts, parts[1:]):
        value = name_of(value) if option in NAMED_OPTIONS else value
        if option in PLAIN_OPTIONS | NAMED_OPTIONS and PLAIN_VALUE.fullmatch(value):
            told += [option, value]
    return " ".join(told)


def guess_source(name: object) -> str:
    """What kind of source a corpus is that was recorded without it: never taken for one that is published."""
    return "generated" if name in (GENERATED, GENERATED_VARIANTS) else "files"
