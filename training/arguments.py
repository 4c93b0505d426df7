"""The settings of pretraining: five dataclasses, read from a YAML file and the command line.

The dataclasses are the one list of settings: `--help`, the YAML check and the resolved config.yaml are made
from them. A YAML file gives defaults, section by section; `--field value` wins over it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.resources
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from .fields import Checked, convert, default_of, metavar, nearest, setting, share


@dataclass
class DataArguments(Checked):
    """What is read: the corpus, its columns, and how a row becomes pixels and tokens."""

    corpus: str = setting(
        "garments",
        "'garments' (generated, with ground truth), a folder of images with metadata, a parquet or Arrow "
        "folder, or the name of a dataset on the Hugging Face Hub",
    )
    data_dir: str | None = setting(None, "folder for generated data; none = the cache of `datasets`")
    image_column: str | None = setting(None, "column of the photos; none = found by name")
    text_column: str | None = setting(None, "column of the texts; none = found by name")
    item_id_column: str | None = setting(None, "column that is equal for photos of one item; none = found by name")
    where: list[str] = setting(
        [], "keep only rows whose column has this value: column=value; may be repeated, all must hold"
    )
    num_items: int | None = setting(
        None, "items of the generated corpus, each with 2 to 4 photos; none = its own default", low=8
    )
    corpus_seed: int = setting(0, "seed of the generated corpus and of item-wise splits", low=0)
    image_size: int = setting(224, "pixels on a side, a multiple of the patch size", low=8)
    tokenizer: str | None = setting(
        None, "folder or Hub name of a tokenizer; none = train a WordPiece on the train split's texts"
    )
    vocab_size: int = setting(8192, "entries of a tokenizer that is trained here, at most", low=64)
    max_text_length: int | None = setting(
        None, "tokens of a text, at most; none = the corpus's 99th percentile, at most 128", low=4
    )
    augment: bool = setting(True, "crop, flip and shift colours of training photos, seeded by row and epoch")
    num_workers: int = setting(0, "processes that decode photos, for each training process", low=0)

    def __post_init__(self):
        super().__post_init__()
        self.filters()

    def filters(self) -> dict[str, str]:
        """Return `where` as {column: value}; ValueError where an entry has no `=`.

        Example:
            >>> DataArguments(where=["text_origin=description"]).filters()
            {'text_origin': 'description'}
        """
        for entry in self.where:
            if not entry.partition("=")[0] or "=" not in entry:
                raise ValueError(f"where is {entry!r}, but must look like column=value")
        return dict(entry.split("=", 1) for entry in self.where)


@dataclass
class ModelArguments(Checked):
    """What is trained."""

    preset: Literal["tiny", "small", "base"] = setting(
        "small", "size of the model: tiny trains on a laptop's CPU, base is the paper's size"
    )
    model_overrides: dict[str, Any] = setting(
        {},
        "settings of SyncMaskConfig that replace the preset's; a mapping in YAML, JSON on the command line",
    )
    init_from: str | None = setting(None, "folder or Hub name of a model whose weights training starts from")


@dataclass
class ObjectiveArguments(Checked):
    """The four losses, the masks, the momentum teacher, and how batches are put together."""

    itc_weight: float = setting(1.0, "weight of image-text contrast", low=0)
    itm_weight: float = setting(1.0, "weight of image-text matching", low=0)
    mlm_weight: float = setting(1.0, "weight of masked words", low=0)
    mim_weight: float = setting(1.0, "weight of masked patches", low=0)
    mask_strategy: Literal["random", "attention", "evidence"] = setting(
        "attention",
        "what decides which words and patches are hidden: chance, the teacher's cross-attention (the paper), "
        "or how much the photo raises the teacher's belief in a word (ours, about 15 percent slower)",
    )
    mask_layer: int | None = setting(
        None, "fusion layer that scores are read from, 0 = the first; none = the model's default", low=0
    )
    mask_instance_weight: float | None = setting(
        None,
        "1 = a word's score for this pair alone, 0 = its mean over all photos; none = 1 for attention, "
        "0.5 for evidence",
        low=0,
        high=1,
    )
    word_mask_rate: float = share(0.3, "share of a text's words that is hidden")
    patch_mask_rate: float = share(0.4, "share of a photo's patches that is hidden")
    mask_temperature: float = setting(0.25, "0 = always the highest scores; larger = more chance in the choice", low=0)
    random_mask_share: float = share(0.25, "share of what is hidden that is drawn without looking at scores")
    evidence_share: float = share(0.25, "evidence: share of each batch that is measured in a step")
    evidence_span: int = setting(3, "evidence: neighbouring words hidden together, at most", low=1)
    evidence_folds: int = setting(3, "evidence: passes over which a text's words are spread", low=2)
    evidence_others: int = setting(1, "evidence: other items' photos that the own photo is compared to", low=1)
    word_mean_decay: float = share(0.99, "decay of the running mean of a word's score, a step")
    soft_target_weight: float = share(0.4, "share of the contrast targets that the teacher gives")
    soft_target_ramp_steps: int = setting(1000, "steps from 0 to soft_target_weight", low=0)
    teacher_momentum: float = share(0.995, "momentum of the teacher; smaller for short runs, such as 0.98")
    gate_threshold: float = setting(
        0.1,
        "masks stay random until hidden words are this much likelier (in nats) to the teacher with their own "
        "photo than with another item's",
    )
    gate_every: int = setting(100, "steps between two tests of the gate", low=1)
    gate_max_steps: int = setting(2000, "step at which the gate opens anyway", low=0)
    gate_probe_pairs: int = setting(256, "train pairs set aside for testing the gate", low=2)
    mask_ramp_steps: int = setting(500, "steps over which scores take over once the gate is open", low=0)
    grouping: Literal["random", "grouped"] = setting(
        "grouped", "batches at random, or of similar pairs (hard negatives) once matching has begun to learn"
    )
    grouped_share: float = share(
        0.5,
        "grouping: share of an epoch's batches that is grouped; the others stay random, so that a batch also "
        "compares what lies far apart",
    )
    semi_hard_margin: float | None = setting(
        None, "negatives must be this much less similar than the positive (cosine); none = no such rule"
    )
    overlap_tau: float | None = setting(
        None,
        "word overlap from which another item's text is no negative; none = measured on the corpus",
        above=0,
    )


@dataclass
class OptimArguments(Checked):
    """AdamW, its schedule, and when training ends."""

    per_device_batch_size: int = setting(64, "pairs in a batch of one process", low=1)
    gradient_accumulation_steps: int = setting(1, "batches whose gradients make one step", low=1)
    learning_rate: float = setting(1e-4, "peak learning rate", above=0)
    learning_rate_floor: float = share(0.01, "share of the peak at which the cosine schedule ends")
    weight_decay: float = setting(0.02, "AdamW's; biases, norms, positions and the temperature get none", low=0)
    warmup_steps: int = setting(500, "steps of linear warm-up", low=0)
    epochs: int = setting(30, "passes over the train split", low=1)
    max_steps: int | None = setting(None, "end after this many steps, if epochs have not ended before", low=1)
    max_minutes: float | None = setting(
        None, "end in good order after this wall time; the schedule still follows the steps", above=0
    )
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm", above=0)


@dataclass
class RunArguments(Checked):
    """Where results go, how often, and how the machine is used."""

    output_dir: str = setting("runs", "folder of run folders")
    run_name: str | None = setting(None, "name of the run's folder; none = the name of the config")
    seed: int = setting(0, "seed of weights, batches, augmentation and masks", low=0)
    mixed_precision: Literal["no", "bf16", "fp16"] = setting("no", "number format of matrix products")
    num_threads: int | None = setting(
        None, "CPU threads of a process; none = cores divided by the processes of this machine", low=1
    )
    log_with: list[str] = setting([], "trackers beside metrics.jsonl, such as tensorboard or wandb; may be repeated")
    log_every: int = setting(20, "steps between two lines of metrics.jsonl", low=1)
    log_batches: bool = setting(False, "write the rows of every batch to batches.jsonl")
    checkpoint_every: int | None = setting(
        None, "steps between two checkpoints; the end of each epoch writes one in any case", low=1
    )
    keep_last: int = setting(2, "newest checkpoints that are kept, beside the best", low=1)
    best_metric: str = setting("recall_mean", "validation metric, higher is better, that decides the best one")
    resume: bool = setting(False, "go on from the newest complete checkpoint of the run's folder")
    overwrite: bool = setting(False, "empty the run's folder if it exists")
    validate_every_epochs: int = setting(1, "epochs between two validations", low=1)
    final_weights: Literal["student", "teacher"] = setting(
        "student", "which weights `final/` holds: the trained ones or their moving average"
    )
    evaluate: bool = setting(True, "run the evaluation protocols at the end")
    deterministic: bool = setting(False, "use deterministic algorithms only, for bit-equal re-runs")

    def __post_init__(self):
        super().__post_init__()
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite are both on: one keeps the run's folder, the other empties it")

    @property
    def folder(self) -> Path:
        """The run's folder, `output_dir/run_name`."""
        return Path(self.output_dir) / (self.run_name or "pretrain")


@dataclass
class PretrainArguments:
    """All settings of a pretraining run; field names are unique across the five sections."""

    data: DataArguments = field(default_factory=DataArguments)
    model: ModelArguments = field(default_factory=ModelArguments)
    objective: ObjectiveArguments = field(default_factory=ObjectiveArguments)
    optim: OptimArguments = field(default_factory=OptimArguments)
    run: RunArguments = field(default_factory=RunArguments)


SECTIONS = {
    "data": DataArguments,
    "model": ModelArguments,
    "objective": ObjectiveArguments,
    "optim": OptimArguments,
    "run": RunArguments,
}
# A saved config.yaml tells under this key what made it (versions, fingerprint, command); it is no setting.
ABOUT = "about"


def config_names() -> list[str]:
    """Return the names of the configs that come with the package, such as `quickstart`."""
    folder = importlib.resources.files("syncmask.training").joinpath("configs")
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_arguments(argv: list[str] | None = None) -> PretrainArguments:
    """Read settings: the fields' defaults, then `--config NAME_OR_FILE`, then `--field value`.

    Args:
        argv: the command line without the program's name; None = that of the running program.

    Returns:
        Settings of the right types and within their bounds. `run_name` falls back to the config's name.

    Raises:
        SystemExit: with a message on stderr, where a name is unknown (the nearest one is told), a value has
            the wrong type or lies out of bounds, or the file cannot be read.

    Example:
        >>> load_arguments(["--learning_rate", "3e-4", "--no-augment"]).optim.learning_rate
        0.0003
    """
    parser = build_parser()
    given, unknown = parser.parse_known_args(with_underscores(argv))
    if unknown:
        refuse_unknown(parser, unknown[0])
    options = vars(given)
    config = options.pop("config", None)
    try:
        values = read_config(config) if config else {name: {} for name in SECTIONS}
        for name, kind in SECTIONS.items():
            types_of = typing.get_type_hints(kind)
            mine = {key: raw for key, raw in options.items() if key in types_of}
            values[name] |= {key: convert(key, types_of[key], raw) for key, raw in mine.items()}
        if not values["run"].get("run_name"):
            values["run"]["run_name"] = Path(config).stem if config else "pretrain"
        return PretrainArguments(**{name: kind(**values[name]) for name, kind in SECTIONS.items()})
    except (ValueError, OSError) as problem:
        parser.error(str(problem))


def build_parser() -> argparse.ArgumentParser:
    """Make the command line from the dataclasses; values stay text until `convert` reads them."""
    parser = argparse.ArgumentParser(
        description="Pretrain SyncMask.",
        usage="%(prog)s [--config NAME_OR_FILE] [--FIELD VALUE ...]",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    known = ", ".join(config_names())
    parser.add_argument("--config", metavar="NAME_OR_FILE", help=f"settings in YAML: a file, or one of {known}")
    for name, kind in SECTIONS.items():
        group = parser.add_argument_group(name, kind.__doc__.splitlines()[0])
        types_of = typing.get_type_hints(kind)
        for item in dataclasses.fields(kind):
            add_option(group, item, types_of[item.name])
    return parser


def add_option(group: argparse._ArgumentGroup, item: dataclasses.Field, kind: Any) -> None:
    """Add `--field VALUE`, and `--no-field` for a switch."""
    default = default_of(item)
    text = f"{item.metadata['help']} (default: {'none' if default in (None, [], {}) else default})"
    common = {"dest": item.name, "help": text.replace("%", "%%")}
    if kind is bool:
        group.add_argument(f"--{item.name}", nargs="?", const="true", metavar="true|false", **common)
        group.add_argument(
            f"--no_{item.name}", action="store_const", const="false", dest=item.name, help=argparse.SUPPRESS
        )
    elif typing.get_origin(kind) is list:
        group.add_argument(f"--{item.name}", nargs="+", action="extend", metavar="VALUE", **common)
    else:
        group.add_argument(f"--{item.name}", metavar=metavar(kind), **common)


def with_underscores(argv: list[str] | None) -> list[str] | None:
    """Let `--no-augment` and `--num-items` mean `--no_augment` and `--num_items`; values stay as they are."""
    if argv is None:
        argv = sys.argv[1:]
    heads = [word.partition("=") for word in argv]
    return [
        head.replace("-", "_").replace("__", "--", 1) + sign + value if head.startswith("--") else head + sign + value
        for head, sign, value in heads
    ]


def refuse_unknown(parser: argparse.ArgumentParser, word: str) -> NoReturn:
    """End with the nearest known option's name."""
    if not word.startswith("--"):
        parser.error(f"{word!r} belongs to no option; every setting is given as --field value")
    known = [option for action in parser._actions for option in action.option_strings]
    parser.error(f"unknown option {word.partition('=')[0]}{nearest(word.partition('=')[0], known)}")


def read_config(name_or_file: str) -> dict[str, dict[str, Any]]:
    """Read a YAML config into {section: {field: value}}, types converted; ValueError for unknown keys."""
    try:
        loaded = yaml.safe_load(config_text(name_or_file)) or {}
    except yaml.YAMLError as problem:
        raise ValueError(f"{name_or_file} is no valid YAML: {problem}") from problem
    if not isinstance(loaded, dict):
        raise ValueError(f"{name_or_file} holds a {type(loaded).__name__}, but must be a mapping of sections")
    loaded.pop(ABOUT, None)
    values = {name: {} for name in SECTIONS}
    for section, entries in loaded.items():
        if section not in SECTIONS or not isinstance(entries, dict | None):
            raise ValueError(f"{name_or_file}: {wrong_section(str(section))}")
        for key, raw in (entries or {}).items():
            types_of = typing.get_type_hints(SECTIONS[section])
            if key not in types_of:
                raise ValueError(f"{name_or_file}: {wrong_key(section, str(key))}")
            values[section][key] = convert(f"{name_or_file}: {section}.{key}", types_of[key], raw)
    return values


def config_text(name_or_file: str) -> str:
    """Return the text of a file, or of the packaged config of that name."""
    if Path(name_or_file).is_file():
        return Path(name_or_file).read_text(encoding="utf-8")
    names = config_names()
    if name_or_file not in names:
        hint = nearest(name_or_file, names)
        raise ValueError(f"config {name_or_file!r} is neither a file nor one of {', '.join(names)}{hint}")
    packaged = importlib.resources.files("syncmask.training").joinpath("configs", f"{name_or_file}.yaml")
    return packaged.read_text(encoding="utf-8")


def wrong_section(section: str) -> str:
    """Say what is wrong with a top-level key."""
    for name, kind in SECTIONS.items():
        if section in typing.get_type_hints(kind):
            return f"{section} belongs under `{name}:`"
    if section in SECTIONS:
        return f"{section} must hold settings, each on a line of its own: `name: value`"
    return f"unknown section {section}{nearest(section, list(SECTIONS))} (known: {', '.join(SECTIONS)})"


def wrong_key(section: str, key: str) -> str:
    """Say what a key in a section should have been, or where it belongs."""
    homes = {field_name: name for name, kind in SECTIONS.items() for field_name in typing.get_type_hints(kind)}
    if key in homes:
        return f"{key} belongs under `{homes[key]}:`, not under `{section}:`"
    return f"unknown setting {section}.{key}{nearest(key, list(homes))}"


def save_config(path: str | Path, arguments: PretrainArguments, extra: dict[str, Any] | None = None) -> None:
    """Write every setting as YAML; `load_arguments(["--config", path])` reads it back equal.

    Args:
        path: the file, `config.yaml` of the run's folder.
        arguments: the settings as resolved.
        extra: what made them (versions, corpus fingerprint, command line), written under `about`; plain
            values. Its `command`, if any, is also the file's first line.
    """
    extra = extra or {}
    first = f"# {extra['command']}\n" if extra.get("command") else ""
    sections = dataclasses.asdict(arguments) | ({ABOUT: extra} if extra else {})
    Path(path).write_text(first + yaml.safe_dump(sections, sort_keys=False, width=100), encoding="utf-8")
