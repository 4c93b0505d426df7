"""Settings from a YAML file and the command line: `--config` gives defaults, `--field value` wins over them."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.resources
import sys
import typing
from pathlib import Path
from typing import Any, NoReturn

import yaml

from .arguments import OBJECTIVES, TrainArguments, sections_of
from .fields import convert, default_of, metavar, nearest

# A saved config.yaml tells under this key what made it (versions, fingerprint, command); it is no setting.
ABOUT = "about"
DESCRIPTIONS = {
    "pretraining": "Pretrain SyncMask.",
    "retrieval": "Train for image-text retrieval: contrast and matching of photos and texts.",
    "composed": "Train for composed retrieval: a reference photo and a text of what should differ find the target.",
    "classification": "Train to recognise category and subcategory from photo, text, or both.",
}


def config_names(task: str = "pretraining") -> list[str]:
    """Return the names of the configs that come with the package: of a head its own, else such as `quickstart`."""
    folder = importlib.resources.files("syncmask.training").joinpath("configs")
    names = sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return [name for name in names if (name == task if name in OBJECTIVES else task == "pretraining")]


def load_arguments(
    argv: list[str] | None = None,
    task: str = "pretraining",
    defaults: dict[str, dict[str, Any]] | None = None,
    config: str | None = None,
) -> TrainArguments:
    """Read settings: the fields' defaults, then `defaults`, then `--config NAME_OR_FILE`, then `--field value`.

    Args:
        argv: the command line without the program's name; None = that of the running program.
        task: what is trained, a key of OBJECTIVES.
        defaults: {section: {field: value}} that replaces the fields' own.
        config: what `--config` is where it is not given.

    Returns:
        Settings of the right types and within their bounds. `run_name` falls back to the config's name.

    Raises:
        SystemExit: with a message on stderr, where a name is unknown (the nearest one is told), a value has
            the wrong type or lies out of bounds, or the file cannot be read.

    Example:
        >>> load_arguments(["--learning_rate", "3e-4", "--no-augment"]).optim.learning_rate
        0.0003
    """
    sections = sections_of(task)
    parser = build_parser(task)
    given, unknown = parser.parse_known_args(with_underscores(argv))
    if unknown:
        refuse_unknown(parser, unknown[0])
    options = vars(given)
    config = options.pop("config", config)
    try:
        read = read_config(config, task) if config else {}
        values = {name: (defaults or {}).get(name, {}) | read.get(name, {}) for name in sections}
        for name, kind in sections.items():
            types_of = typing.get_type_hints(kind)
            mine = {key: raw for key, raw in options.items() if key in types_of}
            values[name] |= {key: convert(key, types_of[key], raw) for key, raw in mine.items()}
        if not values["run"].get("run_name"):
            values["run"]["run_name"] = Path(config).stem if config else "pretrain"
        return TrainArguments(**{name: kind(**values[name]) for name, kind in sections.items()})
    except (ValueError, OSError) as problem:
        parser.error(str(problem))


def build_parser(task: str) -> argparse.ArgumentParser:
    """Make the command line from the dataclasses; values stay text until `convert` reads them."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTIONS[task],
        usage="%(prog)s [--config NAME_OR_FILE] [--FIELD VALUE ...]",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    known = ", ".join(config_names(task))
    parser.add_argument("--config", metavar="NAME_OR_FILE", help=f"settings in YAML: a file, or one of {known}")
    for name, kind in sections_of(task).items():
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


def read_config(name_or_file: str, task: str) -> dict[str, dict[str, Any]]:
    """Read a YAML config into {section: {field: value}}, types converted; ValueError for unknown keys."""
    sections = sections_of(task)
    try:
        loaded = yaml.safe_load(config_text(name_or_file, config_names(task))) or {}
    except yaml.YAMLError as problem:
        raise ValueError(f"{name_or_file} is no valid YAML: {problem}") from problem
    if not isinstance(loaded, dict):
        raise ValueError(f"{name_or_file} holds a {type(loaded).__name__}, but must be a mapping of sections")
    loaded.pop(ABOUT, None)
    values = {name: {} for name in sections}
    for section, entries in loaded.items():
        if section not in sections or not isinstance(entries, dict | None):
            raise ValueError(f"{name_or_file}: {wrong_section(str(section), sections)}")
        for key, raw in (entries or {}).items():
            types_of = typing.get_type_hints(sections[section])
            if key not in types_of:
                raise ValueError(f"{name_or_file}: {wrong_key(section, str(key), sections)}")
            values[section][key] = convert(f"{name_or_file}: {section}.{key}", types_of[key], raw)
    return values


def config_text(name_or_file: str, names: list[str]) -> str:
    """Return the text of a file, or of the packaged config of that name, one of `names`."""
    if Path(name_or_file).is_file():
        return Path(name_or_file).read_text(encoding="utf-8")
    if name_or_file not in names:
        hint = nearest(name_or_file, names)
        raise ValueError(f"config {name_or_file!r} is neither a file nor one of {', '.join(names)}{hint}")
    packaged = importlib.resources.files("syncmask.training").joinpath("configs", f"{name_or_file}.yaml")
    return packaged.read_text(encoding="utf-8")


def wrong_section(section: str, sections: dict[str, type]) -> str:
    """Say what is wrong with a top-level key."""
    for name, kind in sections.items():
        if section in typing.get_type_hints(kind):
            return f"{section} belongs under `{name}:`"
    if section in sections:
        return f"{section} must hold settings, each on a line of its own: `name: value`"
    return f"unknown section {section}{nearest(section, list(sections))} (known: {', '.join(sections)})"


def wrong_key(section: str, key: str, sections: dict[str, type]) -> str:
    """Say what a key in a section should have been, or where it belongs."""
    homes = {field_name: name for name, kind in sections.items() for field_name in typing.get_type_hints(kind)}
    if key in homes:
        return f"{key} belongs under `{homes[key]}:`, not under `{section}:`"
    return f"unknown setting {section}.{key}{nearest(key, list(homes))}"


def save_config(path: str | Path, arguments: TrainArguments, extra: dict[str, Any] | None = None) -> None:
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
